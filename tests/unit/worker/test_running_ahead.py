"""Steps launched on top of one another give the tokens of single steps, and wait for nothing."""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import Any

import pytest
import torch

from cluster.base.errors import InternalError
from replicas.api import GenerationRequest, SamplingParams
from replicas.engine.scheduler import Scheduler
from replicas.engine.scheduler_config import SchedulerConfig
from replicas.engine.scheduler_output import SchedulerOutput
from replicas.engine.step_runner import StepRunner
from replicas.sampling.sampler import NOT_FINITE
from replicas.worker.in_process_executor import InProcessExecutor
from replicas.worker.model_runner import ModelRunner
from tests.support.fake_decoder import BLOCK_SIZE, NO_WEIGHTS, FakeDecoder, fake_kv_caches
from tests.support.pretend_device import DEVICE, HostWaitsError, PretendDevice, pretend_device

GREEDY = SamplingParams(temperature=0.0, max_tokens=9)
ON_THE_DEVICE = [
    GREEDY,
    SamplingParams(temperature=0.8, seed=3, max_tokens=11),
    SamplingParams(temperature=1.3, top_k=5, seed=4, max_tokens=7, n=2),
    SamplingParams(temperature=0.9, top_p=0.6, seed=5, max_tokens=12),
    SamplingParams(temperature=1.0, min_p=0.1, top_p=0.9, seed=6, max_tokens=9),
    SamplingParams(temperature=0.0, max_tokens=10, stop_token_ids=tuple(range(30)), min_tokens=4),
    SamplingParams(temperature=0.7, seed=8, logit_bias=((7, 4.0), (9, -3.0)), max_tokens=8),
]
ON_THE_HOST = [
    SamplingParams(temperature=0.6, frequency_penalty=0.4, seed=2, max_tokens=9),
    SamplingParams(temperature=0.0, repetition_penalty=1.4, max_tokens=7),
    SamplingParams(temperature=0.0, logprobs=3, prompt_logprobs=1, max_tokens=6),
]


def _requests(params: list[SamplingParams]) -> list[GenerationRequest]:
    return [
        GenerationRequest(
            request_id=f"r{index}",
            prompt_token_ids=tuple((5 * index + 3 * place) % 53 for place in range(3 + 4 * index)),
            params=each,
        )
        for index, each in enumerate(params)
    ]


def _runner(device: PretendDevice | None, poison: frozenset[int]) -> ModelRunner:
    ticks = itertools.count()
    where = None if device is None else DEVICE
    return ModelRunner(
        FakeDecoder(poison=poison, device=where),
        NO_WEIGHTS,
        fake_kv_caches(24, where),
        block_size=BLOCK_SIZE,
        max_context=64,
        is_output_rank=True,
        clock=lambda: float(next(ticks)),
        device=device,
    )


def _generate(
    requests: list[GenerationRequest],
    device: PretendDevice | None,
    poison: frozenset[int] = frozenset(),
) -> dict[tuple[str, int], list[Any]]:
    """What each choice gets; two steps deep on a device. Few blocks, so that some are preempted."""
    config = SchedulerConfig(
        max_running_requests=5,
        max_step_tokens=13,
        max_context=64,
        block_size=BLOCK_SIZE,
        num_blocks=24,
    )
    scheduler = Scheduler(config, ())
    for request in requests:
        scheduler.add(request, 0.0)
    said: dict[tuple[str, int], list[Any]] = defaultdict(list)
    # All of it: torch does not let views of such tensors cross into inference mode.
    with torch.inference_mode():
        executor = InProcessExecutor(_runner(device, poison))
        steps = StepRunner(scheduler, executor, step_timeout_s=60.0)
        depth = 1 if device is None else 2
        while True:
            while steps.num_in_flight < depth and steps.submit():
                pass
            if not steps.num_in_flight:
                return dict(said)
            for delta in steps.collect():
                entry = (delta.token_ids, delta.logprobs, delta.finish_reason, delta.error)
                said[delta.request_id, delta.index].append(entry)


def _told(said: dict[tuple[str, int], list[Any]]) -> dict[tuple[str, int], Any]:
    """Deltas as one: where they are cut depends on the steps."""
    return {
        who: (
            [token for delta in deltas for token in delta[0]],
            [
                (entry.token_id, pytest.approx(entry.logprob, abs=1e-5), entry.rank)
                for delta in deltas
                for entry in delta[1]
            ],
            deltas[-1][2],
        )
        for who, deltas in said.items()
    }


@pytest.mark.parametrize("seed", range(3))
def test_no_step_waits_and_tokens_are_the_same(seed: int) -> None:
    params = ON_THE_DEVICE[seed:] + ON_THE_DEVICE[:seed]
    expected = _told(_generate(_requests(params), None))
    with pretend_device() as device:
        actual = _told(_generate(_requests(params), device))
    assert actual == expected
    assert device.num_ahead > 10


def test_steps_that_need_the_host_stand_between_those_that_do_not() -> None:
    params = [*ON_THE_HOST, *ON_THE_DEVICE]
    expected = _told(_generate(_requests(params), None))
    with pretend_device(strict=False) as device:
        actual = _told(_generate(_requests(params), device))
    assert actual == expected
    assert device.num_waits > 0
    assert device.num_ahead > 0


def test_a_row_without_finite_logits_fails_alone() -> None:
    requests = _requests([GREEDY] * 3)
    poison = frozenset({requests[1].prompt_token_ids[-1]})
    with pretend_device() as device:
        said = _generate(requests, device, poison)
    assert NOT_FINITE in str(said["r1", 0][-1][3])
    alone = _generate(requests, None, poison)
    for name in ("r0", "r2"):
        assert _told(said)[name, 0] == _told(alone)[name, 0]


def test_the_pretend_device_refuses_what_waits() -> None:
    with pretend_device() as device:
        numbers = torch.ones(3, device=DEVICE)
        for look in (
            lambda: numbers.sum().item(),
            lambda: numbers.tolist(),
            lambda: bool((numbers > 0).any()),
            lambda: numbers[numbers > 0],
            lambda: numbers.cpu(),
            lambda: torch.ones(3).to(DEVICE),
        ):
            with pytest.raises(HostWaitsError):
                look()
        with pytest.raises(AssertionError, match="mixes"):
            numbers + torch.ones(3)
    assert device.num_waits == 6


def test_steps_end_in_order_and_no_third_one_begins() -> None:
    runner = _runner(None, frozenset())
    first, second = (runner.launch(SchedulerOutput(step=step)) for step in range(2))
    with pytest.raises(InternalError, match="third"):
        runner.launch(SchedulerOutput(step=2))
    with pytest.raises(InternalError, match="order"):
        runner.finish(second)
    del first
