"""Scheduler, runner and real tiny models in one process, against transformers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from replicas.api import FinishReason, GenerationRequest, Pooling, SamplingParams
from replicas.engine.sync_engine import Completion
from tests.support.in_process_engine import generate_pipelined, in_process_engine
from tests.support.sampling_reference import reference_sample
from tests.support.tiny_models import (
    prompt_tokens,
    reference_greedy,
    reference_logits,
    tiny_model,
    write_checkpoint,
)

FAMILIES = ("llama", "gpt2")
PROMPT_LENGTHS = (1, 5, 23, 12)
NUM_TOKENS = 14
# Logits differ by about 1e-5 between implementations; a closer call may go either way.
SAFE_MARGIN = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    path: Path
    model: PreTrainedModel


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp(request.param)
    return Checkpoint(path=write_checkpoint(request.param, path), model=tiny_model(request.param))


def requests_of(params: SamplingParams, **fields: object) -> list[GenerationRequest]:
    return [
        GenerationRequest(
            request_id=f"r{index}",
            prompt_token_ids=tuple(prompt_tokens(length, seed=index)),
            params=params,
            **fields,
        )
        for index, length in enumerate(PROMPT_LENGTHS)
    ]


def greedy(checkpoint: Checkpoint, request: GenerationRequest) -> list[int]:
    return reference_greedy(checkpoint.model, list(request.prompt_token_ids), NUM_TOKENS)


GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS)


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"max_step_tokens": 3},
        {"max_step_tokens": 7, "max_running_requests": 2},
        {"block_size": 1, "num_blocks": 200, "prefix_caching": False},
    ],
)
def test_greedy_in_any_chunks(checkpoint: Checkpoint, limits: dict[str, int]) -> None:
    engine = in_process_engine(checkpoint.path, **limits)
    requests = requests_of(GREEDY)
    for request, completion in zip(requests, engine.generate(requests), strict=True):
        assert completion.token_ids == greedy(checkpoint, request)
        assert completion.finish_reason is FinishReason.LENGTH


def test_greedy_with_preemption(checkpoint: Checkpoint) -> None:
    # Ten blocks hold one request to its end, and not two.
    engine = in_process_engine(checkpoint.path, num_blocks=10, max_step_tokens=16)
    requests = requests_of(GREEDY)
    completions = engine.generate(requests)
    assert engine.stats.num_preemptions > 0
    assert [c.token_ids for c in completions] == [greedy(checkpoint, r) for r in requests]


def test_sampling_is_the_same_with_and_without_preemption(checkpoint: Checkpoint) -> None:
    params = SamplingParams(
        temperature=1.1,
        top_p=0.9,
        presence_penalty=0.5,
        frequency_penalty=0.3,
        seed=77,
        max_tokens=NUM_TOKENS,
        n=2,
    )
    roomy = in_process_engine(checkpoint.path).generate(requests_of(params))
    tight_engine = in_process_engine(checkpoint.path, num_blocks=11, max_step_tokens=5)
    tight = tight_engine.generate(requests_of(params))
    assert tight_engine.stats.num_preemptions > 0
    assert [c.token_ids for c in tight] == [c.token_ids for c in roomy]


@pytest.mark.parametrize("limits", [{}, {"num_blocks": 11, "max_step_tokens": 5}])
def test_steps_planned_before_their_tokens_are_known_give_the_same_streams(
    checkpoint: Checkpoint, limits: dict[str, int]
) -> None:
    params = SamplingParams(
        temperature=1.1,
        top_p=0.9,
        repetition_penalty=1.1,
        frequency_penalty=0.3,
        min_tokens=2,
        no_repeat_ngram_size=3,
        seed=77,
        max_tokens=NUM_TOKENS,
        n=2,
        logprobs=1,
    )
    straight = in_process_engine(checkpoint.path).generate(requests_of(params))
    stops = tuple({completion.token_ids[5] for completion in straight})
    for changed in (params, dataclasses.replace(params, stop_token_ids=stops)):
        expected = in_process_engine(checkpoint.path).generate(requests_of(changed))
        engine = in_process_engine(checkpoint.path, **limits)
        pipelined = generate_pipelined(engine, requests_of(changed))
        assert [c.token_ids for c in pipelined] == [c.token_ids for c in expected]
        assert [c.finish_reason for c in pipelined] == [c.finish_reason for c in expected]
        assert (engine.stats.num_preemptions > 0) == bool(limits)
        assert (engine._scheduler.num_discarded_tokens > 0) == bool(changed.stop_token_ids)


def test_choices_fork_and_follow_the_scalar_reference(checkpoint: Checkpoint) -> None:
    # 23 tokens in blocks of 4: the choices share five blocks and write into copies of the sixth.
    params = SamplingParams(temperature=0.8, top_k=40, seed=5, max_tokens=NUM_TOKENS, n=2)
    prompt = prompt_tokens(23, seed=9)
    request = GenerationRequest(request_id="forked", prompt_token_ids=tuple(prompt), params=params)
    first, second = in_process_engine(checkpoint.path).generate([request])
    assert first.token_ids != second.token_ids
    for completion in (first, second):
        assert len(completion.token_ids) == NUM_TOKENS
        assert_follows_reference(checkpoint.model, prompt, params, completion)


def assert_follows_reference(
    model: PreTrainedModel, prompt: list[int], params: SamplingParams, completion: Completion
) -> None:
    logits = reference_logits(model, prompt + completion.token_ids)
    num_checked = 0
    for index, token_id in enumerate(completion.token_ids):
        expected = reference_sample(
            logits[len(prompt) + index - 1].tolist(),
            prompt,
            completion.token_ids[:index],
            params,
            completion.index,
        )
        assert expected is not None
        if expected.margin > SAFE_MARGIN:
            assert token_id == expected.token_id
            num_checked += 1
    assert num_checked > NUM_TOKENS // 2


def test_prefix_hit_changes_no_token(checkpoint: Checkpoint) -> None:
    engine = in_process_engine(checkpoint.path)
    shared = prompt_tokens(16, seed=3)
    prompts = [shared + prompt_tokens(5, seed=seed) for seed in (20, 21)] + [shared]
    completions = [
        engine.generate(
            [
                GenerationRequest(
                    request_id=f"p{index}", prompt_token_ids=tuple(prompt), params=GREEDY
                )
            ]
        )[0]
        for index, prompt in enumerate(prompts)
    ]
    assert [c.num_cached_tokens for c in completions] == [0, 16, 12]
    for prompt, completion in zip(prompts, completions, strict=True):
        assert completion.token_ids == reference_greedy(checkpoint.model, prompt, NUM_TOKENS)


def test_prompt_scores_and_logprobs(checkpoint: Checkpoint) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=2, logprobs=2, prompt_logprobs=3)
    engine = in_process_engine(checkpoint.path, max_step_tokens=6)
    requests = requests_of(params)
    # Twice, because the second time everything is in the prefix cache.
    for _ in range(2):
        for request, completion in zip(requests, engine.generate(requests), strict=True):
            prompt = list(request.prompt_token_ids)
            lines = reference_logits(checkpoint.model, prompt + completion.token_ids)
            lines = lines.log_softmax(-1)
            assert completion.prompt_logprobs[0] is None
            scored = [entry for entry in completion.prompt_logprobs if entry is not None]
            scored += completion.logprobs
            tokens = (prompt + completion.token_ids)[1:]
            assert [entry.token_id for entry in scored] == tokens
            for line, entry in zip(lines, scored, strict=False):
                assert entry.logprob == pytest.approx(float(line[entry.token_id]), abs=1e-3)
                assert len(entry.top) == (3 if entry in completion.prompt_logprobs else 2)
                assert entry.top[0][0] == int(line.argmax())


@pytest.mark.parametrize("pooling", [Pooling.LAST, Pooling.MEAN])
def test_embeddings(checkpoint: Checkpoint, pooling: Pooling) -> None:
    engine = in_process_engine(checkpoint.path, max_step_tokens=6)
    requests = requests_of(SamplingParams(), pooling=pooling)
    for _ in range(2):
        for request, completion in zip(requests, engine.generate(requests), strict=True):
            with torch.inference_mode():
                hidden = checkpoint.model.base_model(
                    torch.tensor([request.prompt_token_ids])
                ).last_hidden_state[0]
            expected = hidden[-1] if pooling is Pooling.LAST else hidden.mean(0)
            np.testing.assert_allclose(completion.embedding, expected, rtol=1e-3, atol=1e-4)
