"""Drafts change no token, no logprob and no end, over real models: only the number of steps."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from replicas.api import FinishReason, GenerationRequest, SamplingParams
from replicas.engine.speculation import SpeculationConfig
from replicas.engine.sync_engine import Completion, SyncEngine
from tests.support.compiled_kernels import cpu_kernels
from tests.support.in_process_engine import generate_pipelined, in_process_engine
from tests.support.offload_engine import offload_engine, offload_plan
from tests.support.tiny_models import TINY_NAMES, prompt_tokens, write_checkpoint

__all__ = ["cpu_kernels"]

NOT_TO_THE_BIT = {
    "gpt_oss": "attention sinks have no compiled kernel, and torch's depends on the rows of a step",
    "gpt2_scaled": "torch's GELU rounds a row by its place when the width is no multiple of 32",
}

NUM_TOKENS = 48
SPECULATION = SpeculationConfig(num_tokens=6, min_ngram=1, max_ngram=3)
# Few words to choose from make a random model repeat itself, with a surprise now and then.
FEW = tuple((token, 30.0) for token in range(20, 26))
GREEDY = SamplingParams(temperature=0.0, logit_bias=FEW, max_tokens=NUM_TOKENS, logprobs=1)
RANDOM = SamplingParams(
    temperature=0.7, top_p=0.9, logit_bias=FEW, seed=3, max_tokens=NUM_TOKENS, logprobs=1
)
PENALISED = SamplingParams(
    temperature=0.6,
    seed=11,
    repetition_penalty=1.05,
    presence_penalty=0.1,
    frequency_penalty=0.05,
    no_repeat_ngram_size=9,
    logit_bias=FEW,
    min_tokens=5,
    max_tokens=NUM_TOKENS,
    n=2,
    logprobs=2,
    prompt_logprobs=1,
)


def requests_of(*params: SamplingParams) -> list[GenerationRequest]:
    """Prompts that repeat themselves, one for each of `params`, of different lengths."""
    return [
        GenerationRequest(
            request_id=f"r{index}",
            prompt_token_ids=tuple(prompt_tokens(9 + index, seed=index) * 2),
            params=each,
        )
        for index, each in enumerate(params)
    ]


def said(completions: list[Completion], *, bits: bool = True) -> list[tuple[object, ...]]:
    """All that callers hear; without `bits`, but for the numbers."""
    return [
        (c.token_ids, c.finish_reason, c.stop_token_id)
        + ((c.logprobs, c.prompt_logprobs) if bits else ())
        for c in completions
    ]


def assert_same(
    plain: SyncEngine,
    drafting: SyncEngine,
    requests: list[GenerationRequest],
    *,
    bits: bool = True,
) -> None:
    """Both engines say the same, and the second one had drafts that were right."""
    expected = said(plain.generate(requests), bits=bits)
    assert said(drafting.generate(requests), bits=bits) == expected
    assert drafting.stats.accepted_draft_tokens > 0
    assert plain.stats.draft_tokens == 0


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("name", TINY_NAMES)
def test_every_family_says_the_same(name: str, tmp_path: Path) -> None:
    path = write_checkpoint(name, tmp_path)
    assert_same(
        in_process_engine(path),
        in_process_engine(path, speculation=SPECULATION),
        requests_of(GREEDY, RANDOM, PENALISED),
        bits=name not in NOT_TO_THE_BIT,
    )


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("llama", tmp_path_factory.mktemp("checkpoint") / "llama")


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "qwen3"])
def test_rows_of_a_draft_have_the_bits_of_single_steps_in_bf16(name: str, tmp_path: Path) -> None:
    path = write_checkpoint(name, tmp_path)
    assert_same(
        in_process_engine(path, dtype="bfloat16"),
        in_process_engine(path, dtype="bfloat16", speculation=SPECULATION),
        requests_of(GREEDY, RANDOM, PENALISED),
    )


@pytest.mark.parametrize(
    "limits",
    [
        {"max_step_tokens": 5},
        {"num_blocks": 28, "max_step_tokens": 16},
        {"max_running_requests": 2, "prefix_caching": False},
        {"block_size": 1, "num_blocks": 400},
    ],
)
def test_tight_limits_change_nothing(llama: Path, limits: dict[str, int]) -> None:
    requests = requests_of(GREEDY, RANDOM, GREEDY, PENALISED, RANDOM)
    expected = said(in_process_engine(llama).generate(requests))
    for generate in (SyncEngine.generate, generate_pipelined):
        engine = in_process_engine(llama, speculation=SPECULATION, **limits)
        completions = generate(engine, requests)
        assert said(completions) == expected
        assert engine.stats.accepted_draft_tokens > 0
        assert (engine.stats.num_preemptions > 0) == (limits.get("num_blocks") == 28)
        assert engine.stats.kv_blocks_free == engine.stats.kv_blocks_total


def test_stop_tokens_and_lengths_end_a_draft_where_they_end_a_stream(llama: Path) -> None:
    (whole,) = in_process_engine(llama).generate(requests_of(GREEDY))
    assert len(set(whole.token_ids)) < NUM_TOKENS // 2, "the stream was to repeat itself"
    reasons = set()
    for length in (1, 2, 20, 21, 22, 23, 24):
        for stops in ((), (whole.token_ids[17],), (whole.token_ids[30],)):
            params = dataclasses.replace(
                GREEDY, max_tokens=length, min_tokens=length - 2 if stops else 0
            )
            requests = requests_of(dataclasses.replace(params, stop_token_ids=stops))
            plain = in_process_engine(llama).generate(requests)
            engine = in_process_engine(llama, speculation=SPECULATION)
            assert said(engine.generate(requests)) == said(plain)
            reasons.add(plain[0].finish_reason)
    assert reasons == {FinishReason.STOP, FinishReason.LENGTH}


def test_what_a_draft_wrote_is_not_found_again_as_a_prefix(llama: Path) -> None:
    """Each turn's prompt is the last one with its answer, so that blocks of drafts would be hit."""
    plain = in_process_engine(llama, prefix_caching=False)
    drafting = in_process_engine(llama, speculation=SPECULATION)
    tokens = tuple(prompt_tokens(9) * 2)
    for turn in range(4):
        request = GenerationRequest(
            request_id=f"t{turn}",
            prompt_token_ids=tokens,
            params=dataclasses.replace(RANDOM, max_tokens=21, seed=turn),
        )
        (expected,), (got,) = plain.generate([request]), drafting.generate([request])
        assert said([got]) == said([expected])
        assert (got.num_cached_tokens > 16) == (turn > 0)
        tokens += tuple(expected.token_ids)
    stats = drafting.stats
    assert 0 < stats.accepted_draft_tokens < stats.draft_tokens


def test_streamed_weights_are_read_fewer_times(llama: Path) -> None:
    plan = offload_plan(llama.parent / "disk")
    plain, drafting = (
        offload_engine(llama, plan, speculation=speculation) for speculation in (None, SPECULATION)
    )
    assert_same(plain, drafting, requests_of(GREEDY))
    assert drafting.times.num_steps < 0.75 * plain.times.num_steps
    assert_same(plain, drafting, requests_of(RANDOM, PENALISED))
