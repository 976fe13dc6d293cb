"""Connections along a rail: what arrives, in which order, who is let in and how waits end."""

from __future__ import annotations

import itertools
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch._C._distributed_c10d import HashStore, PrefixStore

from cluster.base.errors import InternalError, PenstockError
from cluster.dist.peer_streams import PeerStreams, StreamsMeeting, join_peer_streams
from cluster.dist.peer_watch import PeerWatch
from cluster.dist.rank_topology import RankTopology

RANKS = (1, 4, 6)
SECRET = "0f" * 16
MORE_THAN_A_BUFFER = 48 * 2**20


def watch_of(rank: int) -> PeerWatch:
    topology = RankTopology(tuple("abcdefg"))
    return PeerWatch(rank=rank, topology=topology, host="127.0.0.1", key="k", timeout_s=5.0)


def meeting_of(keys: object, secret: str = SECRET, timeout_s: float = 10.0) -> StreamsMeeting:
    return StreamsMeeting(keys=keys, host="127.0.0.1", secret=secret, timeout_s=timeout_s)


@pytest.fixture
def joined():
    """The streams of all members, each with its own watch."""
    keys, watches = PrefixStore("test", HashStore()), {rank: watch_of(rank) for rank in RANKS}

    def join(rank: int) -> PeerStreams:
        return join_peer_streams(meeting_of(keys), RANKS, rank, watches[rank])

    with ThreadPoolExecutor(len(RANKS)) as pool:
        streams = list(pool.map(join, RANKS))
    yield streams
    for watch in watches.values():
        watch.close()
    for stream in streams:
        stream.close()
        stream.close()


def filled(num_bytes: int, seed: int) -> torch.Tensor:
    return torch.arange(num_bytes).add(seed).mul(31).remainder(251).to(torch.uint8)


def received(stream: PeerStreams, peer: int) -> tuple[tuple[int, ...], torch.Tensor]:
    """The next message, whose note says its length."""
    came = {}

    def place(note):
        came["note"], came["data"] = note, torch.empty(note[1], dtype=torch.uint8)
        return came["data"]

    stream.receive(peer, place, "a test")
    return came["note"], came["data"]


def test_messages_arrive_whole_and_in_order_whatever_their_size(joined):
    sizes = [0, 1, 300_000, MORE_THAN_A_BUFFER, 7, 0, 12]
    pairs = list(itertools.permutations(range(len(RANKS)), 2))
    # All send everything before anybody reads: nothing may wait for a reader.
    for source, target in pairs:
        for number, size in enumerate(sizes):
            data = filled(size, 10 * source + target + number)
            joined[source].send(target, (number, size, -source), data)

    def read(pair):
        source, target = pair
        return [received(joined[target], source) for _ in sizes]

    with ThreadPoolExecutor(len(pairs)) as pool:
        answers = list(pool.map(read, pairs))
    for (source, target), came in zip(pairs, answers, strict=True):
        for number, (size, (note, data)) in enumerate(zip(sizes, came, strict=True)):
            assert note == (number, size, -source)
            assert torch.equal(data, filled(size, 10 * source + target + number))
    # What could be sent at once again is: a thread that has caught up is not asked.
    joined[0].send(1, (9, 3, 0), filled(3, 5))
    assert torch.equal(received(joined[1], 0)[1], filled(3, 5))


class SlowLink:
    """Takes nothing at first, then all: in the caller's thread at once, in another when told to."""

    def __init__(self) -> None:
        self.taken, self.is_first, self.go_on = [], True, threading.Event()

    def sendmsg(self, message, ancillary=(), flags=0):
        if flags and self.is_first:
            self.is_first = False
            raise BlockingIOError
        if not flags:
            self.go_on.wait(5)
        self.taken.append(b"".join(message))
        return sum(map(len, message))

    def shutdown(self, how):
        self.go_on.set()

    def close(self):
        pass


def test_nothing_overtakes_what_could_not_leave_at_once():
    watch = watch_of(RANKS[0])
    link: Any = SlowLink()
    streams = PeerStreams(0, {1: link}, watch)
    for number in range(3):
        streams.send(1, (number, 1, 0), filled(1, number))
    link.go_on.set()
    watch.close()
    streams.close()
    assert [message[0] for message in link.taken] == [0, 1, 2]


def test_a_message_that_does_not_fit_its_place_is_refused(joined):
    joined[0].send(1, (0, 0, 0), filled(20, 1))
    with pytest.raises(InternalError, match="20 bytes of member 0 do not fill 24"):
        joined[1].receive(0, lambda note: torch.empty(24, dtype=torch.uint8), "a test")


def test_a_wait_ends_when_the_peer_has_gone(joined, monkeypatch):
    monkeypatch.setattr("cluster.dist.peer_watch.DIAGNOSIS_S", 0.2)
    joined[2].close()
    with pytest.raises(PenstockError, match="a test"):
        received(joined[0], 2)
    with pytest.raises(PenstockError):
        joined[0].send(1, (0, 1, 0), filled(1, 0))


def test_breaking_ends_a_wait_and_a_send_that_nobody_reads(joined, monkeypatch):
    monkeypatch.setattr("cluster.dist.peer_watch.DIAGNOSIS_S", 0.2)
    joined[0].send(2, (0, MORE_THAN_A_BUFFER, 0), filled(MORE_THAN_A_BUFFER, 0))
    breaker = threading.Timer(0.2, joined[0]._break)
    breaker.start()
    begin_s = time.monotonic()
    with pytest.raises(PenstockError):
        received(joined[0], 1)
    joined[0].close()
    assert time.monotonic() - begin_s < 3.0
    breaker.join()


def is_turned_away(address, hello: bytes) -> bool:
    """Whether who says that is told nothing, and the connection ends."""
    with socket.create_connection(address, timeout=5) as stranger:
        try:
            stranger.sendall(hello)
            stranger.shutdown(socket.SHUT_WR)
            return stranger.recv(1) == b""
        except TimeoutError:
            return False
        except OSError:  # closed before everything was read
            return True


def test_strangers_and_members_of_another_epoch_are_not_let_in():
    keys, watches = PrefixStore("test", HashStore()), {rank: watch_of(rank) for rank in RANKS[:2]}

    def first() -> PeerStreams:
        return join_peer_streams(meeting_of(keys), RANKS[:2], RANKS[0], watches[RANKS[0]])

    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(first)
        address = json.loads(keys.get("address/0"))
        hellos = [b"", b"GET / HTTP/1.1\r\n\r\n" + bytes(40), b"ff" * 16 + b"\x01\0\0\0"]
        hellos += [SECRET.encode() + bytes([member, 0, 0, 0]) for member in (0, 2)]
        assert all(is_turned_away(address, hello) for hello in hellos)
        assert not waiting.done()
        second = join_peer_streams(meeting_of(keys), RANKS[:2], RANKS[1], watches[RANKS[1]])
        streams = [waiting.result(timeout=10), second]
    second.send(0, (1, 4, 2), filled(4, 4))
    assert torch.equal(received(streams[0], 1)[1], filled(4, 4))
    for watch, stream in zip(watches.values(), streams, strict=True):
        watch.close()
        stream.close()


def test_who_does_not_come_is_named():
    watch = watch_of(RANKS[0])
    with pytest.raises(RuntimeError, match=r"no connection to ranks \[4, 6\]"):
        join_peer_streams(
            meeting_of(PrefixStore("test", HashStore()), timeout_s=0.3), RANKS, RANKS[0], watch
        )
    watch.close()
