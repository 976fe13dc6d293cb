"""The engine on the GPU's kernels, interpreted: the same greedy tokens as transformers."""

from __future__ import annotations

from pathlib import Path

import pytest

from replicas.api import GenerationRequest, SamplingParams
from tests.support.in_process_engine import in_process_engine
from tests.support.tiny_models import prompt_tokens, reference_greedy, tiny_model, write_checkpoint

pytest.importorskip("triton", reason="Triton's kernels need triton (part of the dev extra)")

NUM_TOKENS = 4


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_oss", "deepseek_v3"])
def test_greedy_equals_transformers(family: str, tmp_path: Path) -> None:
    """Chunked prompts beside decodes, so that both attention launches are in one step.

    Head norms, sinks, and latents as keys and values among them.
    """
    path = write_checkpoint(family, tmp_path)
    requests = [
        GenerationRequest(
            request_id=f"r{length}",
            prompt_token_ids=tuple(prompt_tokens(length, seed=length)),
            params=SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS),
        )
        for length in (3, 14)
    ]
    engine = in_process_engine(path, kernels="triton", attention="triton_paged", max_step_tokens=8)
    model = tiny_model(family)
    for request, completion in zip(requests, engine.generate(requests), strict=True):
        expected = reference_greedy(model, list(request.prompt_token_ids), NUM_TOKENS)
        assert completion.token_ids == expected
