"""Greedy answers of a served model over both fronts, beside those of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import grpc
import openai
import torch
import transformers

from router.proto import penstock_pb2 as pb
from router.proto import penstock_pb2_grpc as pb_grpc

PROMPTS = ("def ", "import os\n\n\nclass Reader:\n", "for name in names:\n    ")
NUM_TOKENS = 16

Answers = Mapping[str, tuple[list[int], str]]
"""Tokens and text of each prompt."""


def transformers_answers(path: Path) -> Answers:
    """What transformers answers to `PROMPTS` with the checkpoint at `path`, in fp32."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    answers: dict[str, tuple[list[int], str]] = {}
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(
            **inputs, do_sample=False, max_new_tokens=NUM_TOKENS, min_new_tokens=NUM_TOKENS
        )
        tokens = output[0, inputs["input_ids"].shape[1] :].tolist()
        answers[prompt] = tokens, str(tokenizer.decode(tokens, skip_special_tokens=True))
    return answers


def check_tokens_over_grpc(address: str, model: str, answers: Answers) -> None:
    """All prompts at once; each must give the expected tokens."""
    sampling = pb.SamplingOptions(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    with grpc.insecure_channel(address) as channel:
        stub = pb_grpc.PenstockStub(channel)
        calls = {
            prompt: stub.Generate(
                pb.GenerateRequest(model=model, text=prompt, sampling=sampling), timeout=60
            )
            for prompt in PROMPTS
        }
        for prompt, call in calls.items():
            tokens = [token for piece in call for token in piece.token_ids]
            assert tokens == answers[prompt][0]


def check_texts_over_http(address: str, model: str, answers: Answers) -> None:
    """One prompt after another; each must give the expected text."""
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        for prompt in PROMPTS:
            answer = client.completions.create(
                model=model,
                prompt=prompt,
                temperature=0,
                max_tokens=NUM_TOKENS,
                extra_body={"ignore_eos": True},
            )
            assert answer.choices[0].text == answers[prompt][1]
