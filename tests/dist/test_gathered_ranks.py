"""Data-parallel ranks that read weights together: transformers' tokens, idle ranks and faults."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from offload.layout import read_store
from offload.placement import is_routed
from replicas.api import FinishReason
from tests.support.compiled_kernels import cpu_kernels
from tests.support.lockstep_ranks import LockstepRanks, model_plan
from tests.support.loop_run import (
    LoopRun,
    check_alone_and_together,
    check_random_arrivals,
    greedy,
    said_by_transformers,
)
from tests.support.offload_engine import offload_plan, unit_names

__all__ = ["cpu_kernels"]

pytestmark = pytest.mark.dist

MODEL = Path(__file__).parents[2] / "examples" / "models" / "demo-moe"
PROMPTS = [[5 + i, 6, 7] * (1 + 6 * i) for i in range(5)]
NUM_TOKENS = 12
BASES = tuple(name for name in unit_names(MODEL) if not is_routed(name))
CASES = {
    "two ranks, everything streamed": (2, 1, {"expert_slots": 3}),
    "four ranks, everything streamed": (4, 1, {"expert_slots": 2, "ring_slots": 4}),
    "two groups of two": (2, 2, {"expert_slots": 2, "ring_slots": 2}),
    "the rest of the layers stays": (2, 1, {"expert_slots": 3, "resident_units": BASES}),
    "everything but the head stays": (
        2,
        1,
        {"resident_units": tuple(name for name in unit_names(MODEL) if name != "head")},
    ),
}


@pytest.fixture(scope="module", params=CASES)
def ranks(request, tmp_path_factory):
    dp, tp, changes = CASES[request.param]
    disk = tmp_path_factory.mktemp("disk")
    plan = offload_plan(disk, num_sharing=dp, **changes)
    # Blocks for few requests at a time: some are preempted.
    group = LockstepRanks(model_plan(MODEL, dp=dp, tp=tp, offload=plan, num_blocks=8))
    yield group
    group.close()


@pytest.fixture(scope="module")
def oracle() -> list[list[int]]:
    return said_by_transformers(MODEL, PROMPTS, NUM_TOKENS)


def test_tokens_are_those_of_transformers_alone_and_together(ranks, oracle):
    check_alone_and_together(ranks, PROMPTS, oracle)


def test_requests_that_give_way_and_come_back_change_no_token(ranks):
    """Four requests of four blocks each for every group, which has eight blocks."""
    prompts = [[20 + i, 6, 7] for i in range(4 * ranks.plan.dp_size)]
    engine = ranks.engine()
    completions = engine.generate([greedy(f"long{n}", p, 60) for n, p in enumerate(prompts)])
    assert engine.stats.num_preemptions > 0
    assert [completion.token_ids for completion in completions] == said_by_transformers(
        MODEL, prompts, 60
    )


def test_random_arrivals_aborts_and_idle_groups_change_no_token(ranks, oracle):
    check_random_arrivals(ranks, PROMPTS, oracle, 20)


def test_a_rank_stores_and_so_reads_its_part_only(ranks):
    offload, size = ranks.plan.offload, ranks.plan.dp_size
    stores = [read_store(path) for path in Path(offload.disk_path).glob("*.weights")]
    assert len(stores) == ranks.plan.num_ranks
    for store in stores:
        for unit in store.units:
            record = store.record_of(unit.name)
            if not is_routed(unit.name):
                assert record.num_bytes <= record.piece_of / size + 4096


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("kind", ["lossless", "int8", "int4"])
def test_records_that_are_smaller_give_the_tokens_of_one_rank(kind, tmp_path):
    """A replica of one rank, whose tokens are compared with resident weights elsewhere."""
    form = {"compression": kind} if kind == "lossless" else {"precision": kind}
    answers = []
    for dp in (1, 2):
        plan = offload_plan(tmp_path / str(dp), num_sharing=dp, expert_slots=4, **form)
        ranks = LockstepRanks(model_plan(MODEL, dp=dp, tp=1, offload=plan, dtype="bfloat16"))
        try:
            completions = ranks.engine().generate(
                [greedy(f"r{n}", prompt) for n, prompt in enumerate(PROMPTS)]
            )
        finally:
            ranks.close()
        answers.append([completion.token_ids for completion in completions])
    assert answers[0] == answers[1]


def streaming_pair(disk: Path) -> LockstepRanks:
    plan = offload_plan(disk, num_sharing=2, expert_slots=3)
    return LockstepRanks(model_plan(MODEL, dp=2, tp=1, offload=plan))


def run_until_lost(ranks: LockstepRanks, lose) -> tuple[LoopRun, float]:
    """Long requests on both groups, then `lose()`; the run and how long its end took."""
    run = LoopRun(ranks)
    for number in range(4):
        run.loop.add_request(greedy(f"r{number}", PROMPTS[number], 400))
    run.wait_for_tokens("r3", 3)
    lose()
    lost_s = time.monotonic()
    assert run.loop.wait_drained(10.0)
    assert set(run.ends.values()) == {FinishReason.ERROR}
    return run, time.monotonic() - lost_s


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_rank_is_named(signum, tmp_path):
    ranks = streaming_pair(tmp_path)
    try:
        run, took_s = run_until_lost(ranks, lambda: ranks.signal(1, signum))
    finally:
        ranks.close()
    assert took_s < 5.0
    assert [error.code for error in run.fatal] == ["worker_died"]
    (cause,) = run.causes
    assert "ank 1" in cause


def test_a_record_that_is_damaged_at_one_rank_ends_all_and_answers_nothing_wrong(tmp_path, oracle):
    ranks = streaming_pair(tmp_path)
    (store,) = [
        store
        for store in map(read_store, tmp_path.glob("*.weights"))
        if store.record_of("layer.1").piece_at
    ]

    def damage() -> None:
        with store.path.open("r+b") as file:
            file.seek(store.record_of("layer.1").offset + 100)
            file.write(b"\x55\xaa" * 8)

    try:
        run, _ = run_until_lost(ranks, damage)
    finally:
        ranks.close()
    assert {error.code for error in run.fatal} == {"corrupt_weights"}
    for number in range(4):
        said = run.tokens[f"r{number}"][:NUM_TOKENS]
        assert said == oracle[number][: len(said)]
