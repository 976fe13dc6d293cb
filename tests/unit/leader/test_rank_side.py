"""What a leader does about lost ranks; links are real, ranks are threads without a model."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from pathlib import Path
from typing import Any

import pytest

from cluster.base.errors import PenstockError, UnavailableError, WorkerDiedError
from cluster.base.plan import to_json
from moe.expert_table import starting_tables
from replicas.leader import expert_side
from replicas.leader.rank_side import RankEvents, RankSide
from replicas.leader.record import LossRecord
from replicas.worker import wire
from replicas.worker.frames import FrameKind
from replicas.worker.gathering import Gathered, Gathering
from replicas.worker.link_listener import LinkListener
from replicas.worker.worker_link import WorkerLink
from tests.support.lockstep_ranks import HOST, model_plan

TABLES = starting_tables([(0, 8)], 3)
ERROR = WorkerDiedError("Rank 1 ended while rank 0 waited.")


class FakeRank:
    """Obeys HALT and GATHER; `kill` closes its socket."""

    def __init__(self, rank: int, listener: LinkListener) -> None:
        self.gatherings: list[Gathering] = []
        self.is_deaf = False
        self._rank = rank
        self.link = WorkerLink.connect(
            listener.address, rank=rank, epoch="e", secret="s", timeout_s=5.0
        )
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while (order := self.link.receive_order(None)) is not None:
            kind, payload = order
            if self.is_deaf:
                continue
            if kind is FrameKind.HALT:
                self.link.send_halted()
            elif kind is FrameKind.GATHER:
                told = wire.decode_gathering(payload)
                self.gatherings.append(told)
                self.link.send_gathered(
                    Gathered(
                        rank=self._rank,
                        epoch=told.epoch,
                        schemes=[(64, "flat", "asked for")],
                        num_fetched=2,
                        costs=told.costs,
                    )
                )


class FakeGroup:
    """A `WorkerGroup` without Ray."""

    def __init__(self) -> None:
        self.nodes = ("a", "b", "c")
        self.facts: dict[str, Any] = {
            "schemes": [(64, "flat", "asked for")],
            "experts": [to_json(table) for table in TABLES],
            "costs": b"measured",
        }
        self.actors = self
        self.fakes: dict[int, FakeRank] = {}
        self.added: list[tuple[int, ...]] = []
        self.refuses_to_add = 0
        self.failing = asyncio.Event()

    def connect(self, ranks) -> Any:
        listener = LinkListener(
            size=3, epoch="e", secret="s", host=HOST, nodes=self.nodes, ranks=ranks
        )
        fakes = {rank: FakeRank(rank, listener) for rank in ranks}
        link = listener.accept_all(5.0)
        listener.close()
        self.fakes |= fakes
        return link

    async def start(self, host: str, on_progress: Any) -> Any:
        return self.connect(range(3))

    async def add(self, ranks, tables) -> Any:
        self.added.append(tuple(ranks))
        assert tables == TABLES
        if self.refuses_to_add:
            self.refuses_to_add -= 1
            raise UnavailableError("No machine has room.")
        return self.connect(ranks)

    async def places(self, ranks) -> list[tuple[str, int]]:
        return [(HOST, 1000 + rank) for rank in ranks]

    async def silent(self, ranks, timeout_s) -> set[int]:
        return {rank for rank in ranks if rank not in self.fakes or self.fakes[rank].is_deaf}

    async def wait_failure(self) -> PenstockError:
        await self.failing.wait()
        return ERROR

    async def expert_states(self, ranks) -> list[dict[str, Any]]:
        raise UnavailableError("They have nothing to say.")

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(self.fakes)

    def lose(self, ranks) -> None:
        for rank in ranks:
            self.fakes.pop(rank).link.close()

    def kill(self) -> None:
        self.lose(tuple(self.fakes))


class Side:
    """A rank side with its events written down."""

    def __init__(self, **plan: Any) -> None:
        limits = {"max_rank_restarts": plan.pop("max_rank_restarts", 0)}
        whole = model_plan(Path("/m"), dp=3, tp=1, survives=True, **plan)
        whole = dataclasses.replace(whole, scheduler=dataclasses.replace(whole.scheduler, **limits))
        self.groups: list[FakeGroup] = []
        self.losses: list[LossRecord | None] = []
        self.newcomers = asyncio.Event()
        self.side = RankSide(
            whole,
            self._make_group,
            HOST,
            RankEvents(
                on_progress=lambda phase, fraction: None,
                on_lost=lambda error: None,
                on_experts=lambda record: None,
                on_loss=self.losses.append,
                on_newcomers=self.newcomers.set,
                newest_step=lambda: 0,
            ),
        )

    def _make_group(self, epoch: str) -> Any:
        self.groups.append(FakeGroup())
        return self.groups[-1]


def run(scenario) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 30.0))


def test_survivors_gather_and_the_lost_rank_joins_again_as_soon_as_it_can(monkeypatch):
    monkeypatch.setattr(expert_side, "_FIRST_RETRY_S", 0.02)

    async def scenario() -> None:
        side = Side(lost_groups=1)
        await side.side.start()
        group = side.groups[0]
        group.refuses_to_add = 2
        group.fakes[1].link.close()
        recovery = await side.side.recover(ERROR)
        assert recovery is not None
        assert recovery.keeps_cache
        assert side.side.groups() == (0, 2)
        assert len(side.groups) == 1
        first, second = group.fakes[0].gatherings[-1], group.fakes[2].gatherings[-1]
        assert first.members == second.members == (0, 2)
        assert first.epoch == second.epoch
        assert first.forgets_rows
        assert first.tables[0].slots.num_experts == 8
        (loss,) = side.losses
        assert loss is not None
        assert (loss.ranks, loss.nodes, loss.num_groups) == ((1,), ("b",), 2)
        assert loss.cause == ERROR.cause
        await side.newcomers.wait()
        assert await side.side.take_in() is side.side.executor
        assert side.side.groups() == (0, 1, 2)
        assert group.fakes[1].gatherings[-1].tables == TABLES
        assert not group.fakes[0].gatherings[-1].forgets_rows
        assert side.losses[-1] is None
        assert group.added == [(1,)] * 3
        side.side.stop()

    run(scenario)


def test_a_rank_that_does_not_halt_is_let_go_when_a_peer_suspects_it():
    async def scenario() -> None:
        side = Side(lost_groups=1)
        await side.side.start()
        group = side.groups[0]
        group.fakes[1].is_deaf = True
        group.fakes[2].link.send_fault(ERROR.to_dict(), lost=(1,))
        assert await side.side.recover(ERROR) is not None
        assert side.side.groups() == (0, 2)
        assert 1 not in group.fakes
        side.side.stop()

    run(scenario)


def test_too_few_slots_end_the_replica_with_cause_and_remedy():
    async def scenario() -> None:
        side = Side(lost_groups=0)
        await side.side.start()
        side.groups[0].fakes[1].link.close()
        with pytest.raises(WorkerDiedError, match="The other ranks cannot go on") as ended:
            await side.side.recover(ERROR)
        assert ERROR.cause in ended.value.cause
        assert "has 8" in ended.value.cause
        assert "moe.failover.lost_groups" in ended.value.remedy
        side.side.stop()

    run(scenario)


def test_where_survivors_cannot_go_on_all_ranks_are_replaced_if_the_plan_allows():
    async def scenario() -> None:
        side = Side(lost_groups=0, max_rank_restarts=1)
        await side.side.start()
        side.groups[0].fakes[1].link.close()
        recovery = await side.side.recover(ERROR)
        assert recovery is not None
        assert not recovery.keeps_cache
        assert len(side.groups) == 2
        assert side.side.groups() == (0, 1, 2)
        assert side.losses == [None]
        side.side.stop()

    run(scenario)


def test_newcomers_that_are_lost_before_they_join_leave_the_others_serving():
    async def scenario() -> None:
        side = Side(lost_groups=1)
        await side.side.start()
        group = side.groups[0]
        group.fakes[1].link.close()
        await side.side.recover(ERROR)
        await side.newcomers.wait()
        side.newcomers.clear()
        group.fakes[1].link.close()
        with pytest.raises(WorkerDiedError, match="could not be taken in"):
            await side.side.take_in()
        assert await side.side.recover(ERROR) is not None
        assert side.side.groups() == (0, 2)
        await side.newcomers.wait()
        await side.side.take_in()
        assert side.side.groups() == (0, 1, 2)
        side.side.stop()

    run(scenario)
