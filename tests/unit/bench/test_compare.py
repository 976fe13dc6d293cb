"""Engines that take turns: order, warm-up, and what becomes of one that fails."""

from contextlib import ExitStack, contextmanager

import pytest

from bench.cpu_cases.compare import Contender, Turns, open_all, take_turns
from bench.peers.protocol import PeerError


class Fake:
    def __init__(self, name, *, missing="", broken=False):
        self.name, self.missing, self.broken = name, missing, broken

    def why_not(self, *, online):
        return self.missing

    @contextmanager
    def offline(self, checkpoint):
        if self.broken:
            raise PeerError("did not start")
        yield self.name


def opened(*engines):
    with ExitStack() as stack:
        return open_all(engines, online=False, opening=lambda e: e.offline(None), stack=stack)


def nobody_waits() -> None:
    """The machine counts as idle."""


def test_they_alternate_and_the_first_round_does_not_count():
    order = []

    def run(engine, number):
        order.append((engine, number))
        return 10.0 * number

    turns = take_turns(opened(Fake("ours"), Fake("peer")), run, str, 2, settle=nobody_waits)
    assert order == [(name, number) for number in (0, 1, 2) for name in ("ours", "peer")]
    assert turns.samples == {"ours": [10.0, 20.0], "peer": [10.0, 20.0]}


def test_who_is_missing_or_broken_or_fails_later_keeps_a_row_with_the_reason():
    def run(engine, number):
        if engine == "late" and number == 1:
            raise PeerError("ended")
        return 5.0

    peers = Fake("absent", missing="not installed"), Fake("broken", broken=True), Fake("late")
    turns = take_turns(opened(Fake("ours"), *peers, Fake("fine")), run, str, 2, settle=nobody_waits)
    rows = turns.rows("model decode", ("rate", "tok/s"), float, 1.2)
    assert [row.against for row in rows] == [
        "absent: not measured, not installed",
        "broken: not measured, did not start",
        "late: not measured, ended",
        "fine",
    ]
    assert [row.ratio for row in rows] == [None, None, None, 1.0]
    assert [row.met for row in rows] == [None, None, None, False]
    assert {row.ours for row in rows} == {5.0}


def test_ours_must_run():
    with pytest.raises(PeerError, match="did not start"):
        opened(Fake("ours", broken=True), Fake("peer"))

    def run(engine, number):
        raise PeerError("ended")

    with pytest.raises(PeerError, match="ended"):
        take_turns([Contender(name="ours", opened="ours")], run, str, 1, settle=nobody_waits)


def test_of_milliseconds_less_is_better_and_ours_alone_is_one_row():
    turns = Turns(samples={"ours": [10.0], "peer": [15.0]})
    assert turns.rows("m online", ("TTFT p50", "ms"), float, 1.2)[0].ratio == 1.5
    [alone] = Turns(samples={"ours": [10.0]}).rows("m online", ("output", "tok/s"), float, 1.2)
    assert (alone.ours, alone.against) == (10.0, "")


def test_every_turn_waits_for_a_quiet_machine() -> None:
    order: list[str] = []
    take_turns(
        [Contender(name="ours", opened="ours"), Contender(name="peer", opened="peer")],
        lambda name, _: order.append(name),
        str,
        1,
        settle=lambda: order.append("-"),
    )
    assert order == ["-", "ours", "-", "peer"] * 2
