"""Who is left when a leader calls its ranks together, over real sockets; ranks are threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator

import pytest

from cluster.base.errors import WorkerDiedError
from replicas.worker import roll_call
from replicas.worker.frames import FrameKind
from replicas.worker.gathering import Gathered, Gathering
from replicas.worker.link_listener import LinkListener
from replicas.worker.worker_link import WorkerLink

SIZE = 4
NODES = ("a", "a", "b", "b")


class Ranks:
    """Four ranks; those in `deaf` read their orders and answer none."""

    def __init__(self) -> None:
        self.deaf: set[int] = set()
        self.silent: set[int] = set()
        self.asked: list[tuple[frozenset[int], float]] = []
        self.links: list[WorkerLink] = []
        listener = LinkListener(size=SIZE, epoch="e", secret="s", host="127.0.0.1", nodes=NODES)
        for rank in range(SIZE):
            self.links.append(
                WorkerLink.connect(
                    listener.address, rank=rank, epoch="e", secret="s", timeout_s=5.0
                )
            )
            threading.Thread(target=self._serve, args=(rank,), daemon=True).start()
        self.leader = listener.accept_all(timeout_s=5.0)
        listener.close()

    def _serve(self, rank: int) -> None:
        link = self.links[rank]
        while (order := link.receive_order(None)) is not None:
            if rank in self.deaf:
                continue
            if order[0] is FrameKind.HALT:
                link.send_halted()
            elif order[0] is FrameKind.GATHER:
                link.send_gathered(Gathered(rank=rank, epoch="e2", schemes=[]))

    def find_silent(self, ranks: Collection[int], timeout_s: float) -> set[int]:
        self.asked.append((frozenset(ranks), timeout_s))
        time.sleep(0.01)
        return set(ranks) & self.silent

    def halt(self, timeout_s: float = 5.0, tp_size: int = 1) -> roll_call.RollCall:
        return roll_call.halt(self.leader, timeout_s, self.find_silent, tp_size=tp_size)


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    monkeypatch.setattr(roll_call, "_SUSPICION_S", 0.05)
    four = Ranks()
    yield four
    four.leader.close()


def later(action: Callable[[], object], after_s: float) -> None:
    threading.Timer(after_s, action).start()


def test_a_rank_that_leaves_two_questions_unanswered_is_lost(ranks: Ranks) -> None:
    ranks.deaf, ranks.silent = {2}, {2}
    call = ranks.halt()
    assert call.present == (0, 1, 3)
    assert "stopped" in call.absent[2]
    assert len(ranks.asked) == 2


def test_a_suspect_is_asked_once_and_at_once(ranks: Ranks) -> None:
    ranks.deaf = ranks.silent = {2, 3}
    ranks.leader.suspects = {2, 3}
    assert ranks.halt().present == (0, 1)
    ((asked, timeout_s),) = ranks.asked
    assert asked == {2, 3}
    assert timeout_s < 1.0


def test_a_rank_that_computes_is_waited_for_whoever_suspects_it(ranks: Ranks) -> None:
    ranks.deaf = {2}
    ranks.leader.suspects = {2}
    later(ranks.links[2].send_halted, 0.4)
    assert ranks.halt().present == (0, 1, 2, 3)
    assert len(ranks.asked) > 2
    assert ranks.leader.suspects == set()


def test_it_is_lost_at_the_deadline_though_it_answers(ranks: Ranks) -> None:
    ranks.deaf = {2}
    assert ranks.halt(timeout_s=0.3).present == (0, 1, 3)


def test_peers_of_a_lost_rank_are_not_waited_for(ranks: Ranks) -> None:
    ranks.deaf, ranks.silent = {2, 3}, {3}
    begun_s = time.monotonic()
    call = ranks.halt(timeout_s=20.0, tp_size=2)
    assert time.monotonic() - begun_s < 5.0
    assert call.present == (0, 1)
    assert "tensor-parallel" in call.absent[2]


def gatherings() -> dict[int, Gathering]:
    told = Gathering(
        epoch="e2",
        members=tuple(range(SIZE)),
        nodes=NODES,
        peers_host="h",
        peers_port=1,
        tensor_host="h",
        tensor_port=2,
    )
    return dict.fromkeys(range(SIZE), told)


def test_a_rank_that_stops_before_it_has_gathered_is_named_and_suspected(ranks: Ranks) -> None:
    assert len(roll_call.gather(ranks.leader, gatherings(), 5.0, ranks.find_silent)) == SIZE
    ranks.deaf, ranks.silent = {1, 2}, {2}
    with pytest.raises(WorkerDiedError, match=r"rank 2 of 4 \(node b\) gave no sign of life"):
        roll_call.gather(ranks.leader, gatherings(), 5.0, ranks.find_silent)
    assert ranks.leader.suspects == {2}


def test_a_rank_that_ends_before_it_has_gathered_is_named(ranks: Ranks) -> None:
    ranks.deaf = {3}
    later(ranks.links[3].close, 0.1)
    with pytest.raises(WorkerDiedError, match=r"rank 3 of 4 \(node b\) ended"):
        roll_call.gather(ranks.leader, gatherings(), 5.0, ranks.find_silent)
