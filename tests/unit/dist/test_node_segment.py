"""Memory that ranks of a node share: one for all, notes in order, a refusal where it cannot be."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from torch._C._distributed_c10d import HashStore

from cluster.base.errors import ConfigError, InternalError
from cluster.dist.node_segment import NodeSegment, join_node_segment

NAMES = ("rank 0 (node a)", "rank 1 (node a)", "rank 2 (node a)")


class Watch:
    """Lets errors of the transport through; ends waits when it is told to."""

    def __init__(self) -> None:
        self.breakers: list[Callable[[], None]] = []

    def add_breaker(self, breaker: Callable[[], None]) -> None:
        self.breakers.append(breaker)

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        yield


def joined(sizes: tuple[int, ...], watches: list[Watch]) -> list[Any]:
    """What each member's join gave or raised."""
    keys = HashStore()

    def join(rank: int) -> NodeSegment:
        names, watch = NAMES[: len(sizes)], watches[rank]
        return join_node_segment(keys, rank, names, watch, (sizes[rank], 10.0))  # type: ignore[arg-type]

    with ThreadPoolExecutor(len(sizes)) as pool:
        futures = [pool.submit(join, rank) for rank in range(len(sizes))]
        return [future.exception() or future.result() for future in futures]


@pytest.fixture
def segments() -> Iterator[list[NodeSegment]]:
    made = joined((100_000,) * 3, [Watch() for _ in range(3)])
    yield made
    for segment in made:
        segment.close()


def test_what_one_writes_the_others_see(segments: list[NodeSegment]) -> None:
    for rank, segment in enumerate(segments):
        assert segment.memory.shape == (100_000,)
        segment.memory[rank * 1000 : (rank + 1) * 1000] = rank + 1
    for segment in segments:
        assert segment.memory[:3000].view(3, 1000).float().mean(1).tolist() == [1.0, 2.0, 3.0]
        assert not segment.memory[3000:].any()


def test_notes_arrive_at_all_others_in_order(segments: list[NodeSegment]) -> None:
    for number in range(20):
        segments[1].tell((0, number, -number))
    for peer in (0, 2):
        heard = [segments[peer].hear(1, "a note") for _ in range(20)]
        assert heard == [(0, number, -number) for number in range(20)]


def test_who_waits_notices_that_a_member_is_gone_and_who_tells_does_not(
    segments: list[NodeSegment],
) -> None:
    segments[2].close()
    segments[0].tell((1, 2, 3))
    with pytest.raises(RuntimeError, match="rank 2"):
        segments[0].hear(2, "a note")
    assert segments[1].hear(0, "a note") == (1, 2, 3)


def test_a_verdict_of_the_watch_ends_a_wait() -> None:
    watches = [Watch(), Watch()]
    made = joined((4096, 4096), watches)
    threading.Timer(0.2, watches[0].breakers[0]).start()
    with pytest.raises(RuntimeError, match="rank 1"):
        made[0].hear(1, "a note")
    for segment in made:
        segment.close()


def test_members_that_want_other_sizes_are_told() -> None:
    first, second = joined((4096, 8192), [Watch(), Watch()])
    assert isinstance(second, InternalError)
    assert "8192" in str(second)
    first.close()


def test_where_memory_cannot_be_shared_all_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> int:
        raise OSError("no memory has no name here")

    monkeypatch.setattr(os, "memfd_create", none)
    errors = joined((4096, 4096), [Watch(), Watch()])
    assert [type(error) for error in errors] == [ConfigError, ConfigError]
    assert all("cannot share memory" in str(error) for error in errors)
