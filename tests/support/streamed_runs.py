"""Runs that a streamed engine must answer as a resident one does, whatever its passes look like."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.base.plan import OffloadPlan
from replicas.api import FinishReason, GenerationRequest, SamplingParams
from tests.support.in_process_engine import generate_pipelined, in_process_engine
from tests.support.offload_engine import offload_engine
from tests.support.tiny_models import prompt_tokens

GREEDY = SamplingParams(temperature=0.0, max_tokens=8)
SAMPLED = SamplingParams(temperature=1.1, top_p=0.9, seed=7, max_tokens=8, n=2, prompt_logprobs=2)


def requests_of_lengths(
    lengths: Sequence[int], params: SamplingParams = GREEDY
) -> list[GenerationRequest]:
    """A request per prompt length, r0, r1 and so on."""
    return [
        GenerationRequest(
            request_id=f"r{index}",
            prompt_token_ids=tuple(prompt_tokens(length, seed=index)),
            params=params,
        )
        for index, length in enumerate(lengths)
    ]


def check_sampled_run(
    path: Path, plan: OffloadPlan, requests: list[GenerationRequest], **limits: Any
) -> None:
    """Several choices and prompt scores, one step at a time and with a step in flight."""
    expected = in_process_engine(path, **limits).generate(requests)
    for run in (lambda engine, asked: engine.generate(asked), generate_pipelined):
        completions = run(offload_engine(path, plan, **limits), requests)
        assert [c.token_ids for c in completions] == [c.token_ids for c in expected]
        assert [c.prompt_logprobs for c in completions] == [c.prompt_logprobs for c in expected]


def check_crowded_run(path: Path, plan: OffloadPlan) -> None:
    """More tokens than ten blocks hold at one time: some requests are preempted, none changes."""
    requests = requests_of_lengths((1, 5, 23, 12), SamplingParams(temperature=0.0, max_tokens=10))
    expected = in_process_engine(path).generate(requests)
    engine = offload_engine(path, plan, num_blocks=10, max_step_tokens=16)
    completions = engine.generate(requests)
    assert [c.token_ids for c in completions] == [c.token_ids for c in expected]
    assert engine.stats.num_preemptions > 0


def check_run_with_an_abort(
    path: Path, plan: OffloadPlan, requests: list[GenerationRequest]
) -> None:
    """Request r2 ends early; all others end by length, with the tokens of a run without aborts."""
    expected = in_process_engine(path).generate(requests)
    engine = offload_engine(path, plan, max_step_tokens=8)
    tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
    for request in requests:
        engine.add(request)
    ended = set()
    for number, delta in enumerate(engine.run()):
        tokens[delta.request_id] += delta.token_ids
        if delta.finish_reason is FinishReason.LENGTH:
            ended.add(delta.request_id)
        if number == 3:
            engine.abort("r2")
    assert ended == set(tokens) - {"r2"}
    for completion in expected:
        if completion.request_id != "r2":
            assert tokens[completion.request_id] == completion.token_ids
