"""A request that goes on in another engine is what it had been undisturbed, wherever it is cut."""

from __future__ import annotations

import dataclasses

import pytest
from engine_settings import engine_settings
from hypothesis import given
from hypothesis import strategies as st
from scheduler_runs import MovedRun, Run, random_run
from simulated_executor import COPYING, EOS, SimulatedExecutor, config, request

from cluster.base.errors import InternalError, OverloadedError
from replicas.api import ChoiceProgress, GenerationRequest, Pooling
from replicas.engine.lockstep_scheduler import LockstepScheduler
from replicas.engine.scheduler import Scheduler
from replicas.engine.scheduler_config import SchedulerConfig
from replicas.engine.speculation import SpeculationConfig
from replicas.engine.sync_engine import SyncEngine
from tests.support.resumption import cut_and_resumed, deltas_of, put_together

PROMPT = tuple((i * i + 3) % 11 for i in range(11))
REQUESTS = [
    request("plain", PROMPT, max_tokens=9, ignore_eos=True),
    request("stops", PROMPT, max_tokens=30, min_tokens=4, stop_token_ids=(3, 5, 9)),
    request("scored", PROMPT, max_tokens=5, logprobs=0, prompt_logprobs=0),
    request("choices", PROMPT, max_tokens=6, n=3, seed=2),
    request("scored-choices", PROMPT, max_tokens=4, n=3, logprobs=0, prompt_logprobs=0),
    request("prompt-only", PROMPT, max_tokens=0, prompt_logprobs=0),
    request("embedding", PROMPT, pooling=Pooling.MEAN),
    request("copies", PROMPT, max_tokens=20, seed=COPYING, ignore_eos=True),
]


def engine(limits: SchedulerConfig) -> SyncEngine:
    return SyncEngine(Scheduler(limits, EOS), SimulatedExecutor(limits))


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"max_step_tokens": 4},
        {"prefix_caching": False, "block_size": 2, "num_blocks": 128},
        {"speculation": SpeculationConfig(num_tokens=3, min_ngram=1, max_ngram=2)},
    ],
    ids=["whole prompts", "small steps", "no cache", "drafts"],
)
@pytest.mark.parametrize("each", REQUESTS, ids=lambda each: each.request_id)
def test_every_cut_goes_on_to_the_undisturbed_end(each: GenerationRequest, limits: dict) -> None:
    deltas = deltas_of(engine(config(**limits)), each)
    whole = put_together(each, deltas)
    for cut in range(len(deltas) + 1):
        other = engine(config(**limits))
        assert cut_and_resumed(each, deltas, cut, other) == whole, cut
        assert other.stats.kv_blocks_free == other.stats.kv_blocks_total


@pytest.mark.parametrize("each", REQUESTS, ids=lambda each: each.request_id)
def test_an_engine_that_knows_the_answer_counts_no_more_than_the_prompt_as_cached(
    each: GenerationRequest,
) -> None:
    deltas = deltas_of(engine(config()), each)
    whole = put_together(each, deltas)
    other = engine(config())
    deltas_of(other, dataclasses.replace(each, request_id="before"))
    for cut in range(1, len(deltas)):
        assert cut_and_resumed(each, deltas, cut, other) == whole, cut
    assert 0 <= other.stats.prefix_hit_tokens <= other.stats.prefix_query_tokens


@engine_settings(max_examples=150)
@given(st.integers(0, 2**32), st.sampled_from((2, 3)), st.booleans())
def test_other_engines_change_no_stream(seed: int, depth: int, speculates: bool) -> None:
    random_run(seed, depth, speculates=speculates, kind=MovedRun)


def test_many_random_runs_move_between_engines() -> None:
    runs = [random_run(seed, 2, kind=MovedRun) for seed in range(100)]
    assert sum(run.num_moves for run in runs if isinstance(run, MovedRun)) > 100
    assert sum(run.num_moved for run in runs if isinstance(run, MovedRun)) > 100


def test_resumed_choices_compute_their_prompt_once() -> None:
    each = REQUESTS[3]
    progress = [ChoiceProgress(index=i, token_ids=(1, 2)) for i in range(3)]
    run = Run(config(prefix_caching=False, max_step_tokens=64))
    run.engine.add(dataclasses.replace(each, resumed=tuple(progress)))
    run.advance()
    run.advance()
    first, second = run.executor.history[:2]
    assert first.num_tokens == len(PROMPT) + 2
    # The parent's next token; the last prompt token and two of output for each of the others.
    assert second.num_tokens == 1 + 2 * 3


def test_a_resumed_request_is_let_in_where_others_are_not_and_runs_first() -> None:
    scheduler = Scheduler(config(max_waiting_requests=2, max_running_requests=1), EOS)
    for name in "ab":
        scheduler.add(request(name, PROMPT, max_tokens=4))
    with pytest.raises(OverloadedError):
        scheduler.add(request("c", PROMPT, max_tokens=4))
    moved = (ChoiceProgress(index=0, token_ids=(1,)),)
    scheduler.add(dataclasses.replace(request("m", PROMPT, max_tokens=4), resumed=moved))
    plan = scheduler.schedule()
    assert plan is not None
    (new,) = plan.new_requests
    assert new.token_ids == (*PROMPT, 1)
    assert new.num_prompt_tokens == len(PROMPT)


def test_lock_step_groups_let_a_resumed_request_in_too() -> None:
    scheduler = LockstepScheduler(
        config(max_waiting_requests=1), 2, choose_scheme=lambda _: ("flat", ""), eos_token_ids=EOS
    )
    scheduler.add(request("a", PROMPT, max_tokens=4))
    with pytest.raises(OverloadedError):
        scheduler.add(request("b", PROMPT, max_tokens=4))
    moved = (ChoiceProgress(index=0, token_ids=(1,)),)
    scheduler.add(dataclasses.replace(request("m", PROMPT, max_tokens=4), resumed=moved))
    assert scheduler.num_unfinished == 2


@pytest.mark.parametrize(
    "progress",
    [
        [ChoiceProgress(index=2)],
        [ChoiceProgress(index=0), ChoiceProgress(index=0)],
        [ChoiceProgress(index=0, token_ids=(1, 2, 3, 4))],
    ],
)
def test_progress_that_cannot_be_is_refused(progress: list[ChoiceProgress]) -> None:
    scheduler = Scheduler(config(), EOS)
    with pytest.raises(InternalError):
        scheduler.add(
            dataclasses.replace(request("r", PROMPT, n=2, max_tokens=4), resumed=tuple(progress))
        )
    assert scheduler.num_unfinished == 0


def test_only_the_loss_of_the_engine_is_called_one() -> None:
    scheduler = Scheduler(config(), EOS)
    scheduler.add(request("r", PROMPT, n=2))
    lost = scheduler.fail_all(InternalError("the engine broke"))
    assert [(delta.index, delta.replica_lost) for delta in lost] == [(0, True), (1, True)]
    run = Run(config())
    run.add(request("bad", PROMPT, max_tokens=4))
    run.executor.errors["0"] = "NaN logits"
    told = run.advance()
    assert [delta.replica_lost for delta in told] == [False]
