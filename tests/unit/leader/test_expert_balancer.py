"""A rebalance is announced once, used when all ranks are ready, given up when one cannot be."""

from __future__ import annotations

import asyncio

import numpy as np

from cluster.base.errors import UnavailableError
from moe.expert_table import ExpertTable, starting_tables
from replicas.engine.lockstep import ExpertOrders
from replicas.leader.expert_balancer import ExpertBalancer
from replicas.leader.expert_upkeep import ExpertUpkeep
from replicas.leader.expert_watch import ExpertWatch

SKEWED = {0: np.array([90.0, 80.0, 5, 5, 5, 5, 5, 5]), 3: np.ones(8)}


def balancer(max_moves: int = 4) -> ExpertBalancer:
    tables = starting_tables([(0, 8), (3, 8)], 4, 1)
    return ExpertBalancer(tables, ("a", "a", "b", "b"), max_moves=max_moves)


def states(*prepared: int, announced: int = 1, failure: str = "") -> list[dict]:
    return [
        {
            "rows": [[1] * 8, [1] * 8],
            "num_dropped": 0,
            "announced": announced,
            "prepared": version,
            "move_failure": failure,
        }
        for version in prepared
    ]


def test_ranks_switch_at_the_first_step_after_all_are_ready():
    experts = balancer()
    before = experts.tables
    assert experts.orders() == ExpertOrders()
    assert experts.propose(SKEWED)
    announced = experts.orders()
    assert announced.rebalance is not None
    assert (announced.table, announced.rebalance.version) == (0, 1)
    assert [table.layer for table in announced.rebalance.tables] == [0]
    assert not experts.propose(SKEWED)
    experts.hear(states(1, 0, 1, 1))
    assert experts.orders() == ExpertOrders()
    assert experts.tables == before
    experts.hear(states(1, 1, 1, 1))
    assert experts.orders() == ExpertOrders(table=1)
    assert experts.orders() == ExpertOrders(table=1)
    assert experts.tables[0] == announced.rebalance.tables[0]
    assert experts.tables[3] == before[3]
    assert experts.is_resting


def test_a_rank_that_cannot_prepare_ends_the_rebalance():
    experts = balancer()
    assert experts.propose(SKEWED)
    experts.orders()
    experts.hear(states(1, 1, 0, 1, failure="the file is gone"))
    assert experts.orders() == ExpertOrders(abort=True)
    assert experts.orders() == ExpertOrders()
    assert experts.propose(SKEWED)
    again = experts.orders().rebalance
    assert again is not None
    # What a rank said of the former attempt says nothing of this one.
    experts.hear(states(0, 0, 0, 0, announced=1, failure="the file is gone"))
    experts.hear(states(1, 1, 1, 1))
    assert experts.orders() == ExpertOrders()
    experts.hear(states(2, 2, 2, 2, announced=2))
    assert experts.orders() == ExpertOrders(table=again.version)


def test_loads_are_levelled_in_few_moves_and_then_left_alone():
    experts = balancer(max_moves=2)

    def imbalance() -> float:
        return experts.tables[0].placement().imbalance(SKEWED[0], 4)

    begun = imbalance()
    while experts.propose(SKEWED):
        version = experts.orders().rebalance.version
        moved = experts.num_moves
        experts.hear(states(*[version] * 4, announced=version))
        experts.orders()
        assert experts.num_moves - moved <= 2
        assert [len(held) for held in experts.tables[0].logical_by_rank] == [3] * 4
    assert imbalance() < 1.1 < begun
    assert experts.version >= 1


def test_upkeep_reports_the_load_and_moves_experts_only_when_asked_to():
    async def run(interval_s: float | None) -> tuple[list, ExpertBalancer]:
        experts, reports, step, enough = balancer(), [], 0, asyncio.Event()

        async def ask() -> list[dict]:
            nonlocal step
            if step == 2:
                raise UnavailableError("a rank is slow")
            version = experts.version + (not experts.is_resting)
            answer = states(*[version] * 4, announced=version)
            answer[0]["rows"] = [[1000 * step, 900 * step, *[1] * 6], [step] * 8]
            return answer

        def report(record) -> None:
            reports.append(record)
            if len(reports) == 8:
                enough.set()

        def next_step() -> int:
            nonlocal step
            step += 1
            experts.orders()
            return step

        upkeep = ExpertUpkeep(
            ask_ranks=ask,
            newest_step=next_step,
            watch=ExpertWatch(tuple(experts.tables.values())),
            balancer=experts,
            interval_s=interval_s,
            report=report,
            period_s=0.01,
        )
        task = asyncio.create_task(upkeep.run())
        await asyncio.wait_for(enough.wait(), 10)
        task.cancel()
        return reports, experts

    reports, experts = asyncio.run(run(0.01))
    assert experts.version >= 1
    assert reports[-1].table >= 1
    assert reports[-1].num_moves >= 1
    assert reports[-1].layers[0].imbalance < reports[0].layers[0].imbalance
    _, still = asyncio.run(run(None))
    assert still.version == 0


def test_a_forced_placement_goes_the_same_way():
    experts = balancer()
    held = ((0, 1, 2), (2, 3, 4), (4, 5, 6), (0, 6, 7))
    assert experts.force([ExpertTable(layer=0, logical_by_rank=held)])
    experts.orders()
    experts.hear(states(1, 1, 1, 1))
    experts.orders()
    assert experts.tables[0].logical_by_rank == held
    assert experts.num_moves == 4
