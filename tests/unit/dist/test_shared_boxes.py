"""Boxes that ranks of a node read from each other: content, growth, ways to lose a peer."""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
from torch._C._distributed_c10d import HashStore, PrefixStore

from cluster.dist.shared_boxes import SharedBoxes, join_shared_boxes


class Watch:
    """What a watch is to the boxes."""

    def __init__(self):
        self.breakers = []
        self.waits = []

    def add_breaker(self, breaker):
        self.breakers.append(breaker)

    @contextlib.contextmanager
    def waiting(self, what):
        self.waits.append(what)
        yield


def joined(ranks, store=None, timeout_s=10.0):
    """Boxes and watch of every rank, each joined on a thread of its own."""
    store = store or HashStore()
    store.set_timeout(timedelta(seconds=timeout_s))
    watches = [Watch() for _ in ranks]

    def join(rank, watch):
        keys = PrefixStore("node", store)
        return join_shared_boxes(keys, tuple(ranks), rank, watch, timeout_s)

    with ThreadPoolExecutor(max_workers=len(ranks)) as pool:
        return list(pool.map(join, ranks, watches)), watches


@pytest.fixture
def pair():
    boxes, watches = joined([4, 5])
    yield boxes, watches
    for box in boxes:
        box.close()
        box.close()


def test_a_peer_reads_what_was_written_in_place(pair):
    (one, other), _ = pair
    box = one.box(0, 5)
    box.copy_(torch.arange(5))
    one.tell(1, 0, (3, -7, 2**40))
    memory, note = other.hear(0, "rows")
    assert note == (3, -7, 2**40)
    assert memory[:5].tolist() == [0, 1, 2, 3, 4]
    box[2] = 99
    assert memory[2] == 99, "no copy was made"
    one.tell(1, 0, (0, 0, 0))
    again, _ = other.hear(0, "rows")
    assert again.data_ptr() == memory.data_ptr()


def test_a_box_that_has_grown_is_a_new_one_and_the_old_one_stays_readable(pair):
    (one, other), _ = pair
    one.box(7, 3).fill_(1)
    one.tell(1, 7, (0, 3, 1))
    old, _ = other.hear(0, "rows")
    large = one.box(7, old.numel() + 1)
    large.fill_(2)
    one.tell(1, 7, (0, large.numel(), 2))
    new, _ = other.hear(0, "rows")
    assert new[: large.numel()].eq(2).all()
    assert old[:3].eq(1).all()


def test_empty_boxes_and_boxes_side_by_side(pair):
    (one, other), _ = pair
    assert one.box(0, 0).numel() == 0
    one.box(1, 1).fill_(6)
    one.tell(1, 0, (0, 0, 1))
    one.tell(1, 1, (0, 1, 1))
    assert other.hear(0, "rows")[1] == (0, 0, 1)
    memory, _ = other.hear(0, "answers")
    assert memory[0] == 6


def test_three_ranks_and_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    descriptors = len(os.listdir("/proc/self/fd"))
    boxes, _ = joined([0, 1, 2])
    for box in boxes:
        box.box(0, 1).fill_(box.rank + 1)
        for peer in range(3):
            if peer != box.rank:
                box.tell(peer, 0, (0, 1, 0))
    for box in boxes:
        heard = {peer: int(box.hear(peer, "rows")[0][0]) for peer in range(3) if peer != box.rank}
        assert heard == {peer: peer + 1 for peer in range(3) if peer != box.rank}
    for box in boxes:
        box.close()
    assert list(tmp_path.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_a_wait_ends_when_the_peer_does(pair):
    (one, other), _ = pair
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting = pool.submit(other.hear, 0, "rows")
        one.close()
        with pytest.raises(RuntimeError, match="member 0 has closed"):
            waiting.result(timeout=5)
    other.box(0, 1)
    with pytest.raises(RuntimeError, match="note to member 0"):
        other.tell(0, 0, (0, 0, 0))


def test_the_watch_ends_a_wait(pair):
    (_, other), (_, watch) = pair
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting = pool.submit(other.hear, 0, "layer 3 dispatch")
        threading.Timer(0.1, watch.breakers[0]).start()
        with pytest.raises(RuntimeError):
            waiting.result(timeout=5)
    assert watch.waits == ["layer 3 dispatch"]


def test_alone_there_is_nothing_to_share():
    assert joined([3])[0] == [None]


@pytest.mark.parametrize("unable", [0, 1, 2])
def test_if_one_cannot_nobody_does(monkeypatch, caplog, unable):
    make = tempfile.TemporaryDirectory
    numbers = itertools.count()

    def folder(**settings):
        if next(numbers) == unable:
            raise OSError(28, "No space left on device")
        return make(**settings)

    monkeypatch.setattr(tempfile, "TemporaryDirectory", folder)
    begin_s = time.monotonic()
    boxes, _ = joined([0, 1, 2])
    assert boxes == [None, None, None]
    assert time.monotonic() - begin_s < 4.0, "nobody waited for those that will not come"
    assert "No space left on device" in caplog.text


def test_a_system_without_anonymous_memory(monkeypatch):
    monkeypatch.delattr(os, "memfd_create")
    assert joined([0, 1])[0] == [None, None]


def test_boxes_are_what_exchanges_expect(pair):
    (one, _), _ = pair
    assert isinstance(one, SharedBoxes)
    assert (one.rank, one.size) == (0, 2)
