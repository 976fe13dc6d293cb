"""What messages and bytes cost between the ranks of a group, from a few timings of all at once.

Pure and torch-free: a `Stopwatch` times, this decides what, and works costs out. Each figure is a
difference of two timings of the very calls that the exchanges make, so it holds whatever the
processor, the network and the number of ranks that share them add.

    delay     an exchange of empty messages along the rails is two delays and a few messages
    message   ... over all ranks it is many more messages, three times in a row in a layer
    bytes     ... with large messages it is many more bytes
    layers    whole ones of every scheme, with few rows and with many, take another time than the
              virtual one: cores that ranks share, and work on rows (layer_costs.py)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

from cluster.dist.rank_topology import RankTopology
from moe.exchange.link_costs import LinkCosts
from moe.exchange.schemes import Scheme, Way
from moe.exchange.simulate import exchange_s

SMALL_BYTES = 8
LARGE_BYTES = 128 * 1024
ROW_WORK_BYTES = 2 * 2**20
_SHARE = 0.04
"""Of the budget: what repetitions of a timing between nodes may take, if each is as a meeting."""
_IN_A_ROW = 5
"""As the hops of a layer follow each other."""
_LEAST_S = 1e-7
_FITTING_ROUNDS, _MOST_STEPS = 5, 20
_TOLERANCE = 0.01
_DELAY, _MESSAGE, _BYTE = "delay", "message", "byte"
# The receiver's word, the sender's, and the data.
_WIRE_MESSAGES = 3


class Stopwatch(Protocol):
    """Times what ranks do at once, to the last one's end; the same figure at all of them.

    Timings inside nodes (`row_work`, `trip`, `Way.NODE`) are a rank's own until `agree`. Of more
    than one in a row the first does not count: it wakes everybody up.
    """

    @property
    def budget_s(self) -> float:
        """What all timings together should take."""
        ...

    @property
    def left_s(self) -> float:
        """Of the budget."""
        ...

    @property
    def overhead_s(self) -> float:
        """What a timing takes besides the action that is timed: ranks meet and rest."""
        ...

    def row_work(self, times: int) -> float:
        """Seconds in which a rank handles `ROW_WORK_BYTES` of rows, one of several in a row."""
        ...

    def exchange(self, way: Way, num_bytes: int, times: int) -> float:
        """Seconds of a collective with so many bytes to each peer, one of several in a row."""
        ...

    def trip(self, times: int) -> float:
        """Seconds of an empty trip inside the node, without counts, one of several in a row."""
        ...

    def layer(self, scheme: Scheme, rows: int) -> float:
        """Seconds of dispatch and combine without experts."""
        ...

    def agree(self, values: Sequence[float]) -> list[float]:
        """The largest of all ranks' values, each."""
        ...

    def worked_out(self, compute: Callable[[], list[float]], count: int) -> list[float]:
        """So many numbers that every rank would find: one rank of a node computes them for all.

        Ranks may share cores, and what each of them computes the others wait for. The numbers are
        not negative.
        """
        ...


def link_costs(stopwatch: Stopwatch, topology: RankTopology) -> LinkCosts:
    """All costs but `layers`, the same at every rank; all ranks call it together."""
    has_inside = topology.num_nodes == 1 or topology.has_two_levels
    timings: list[Callable[[int], float]] = [stopwatch.row_work]
    if has_inside:
        timings += [
            partial(stopwatch.exchange, Way.NODE, SMALL_BYTES),
            partial(stopwatch.exchange, Way.NODE, LARGE_BYTES),
            stopwatch.trip,
        ]
    row_work_s, *inside = stopwatch.agree([timing(_IN_A_ROW) for timing in timings])
    found: dict[str, Any] = {"row_bytes_per_s": ROW_WORK_BYTES / row_work_s}
    if has_inside:
        found |= inside_nodes(topology, *inside)
    known = LinkCosts(**found)
    if topology.num_nodes == 1:
        return known
    return _with_between(stopwatch, topology, known)


def _with_between(stopwatch: Stopwatch, topology: RankTopology, known: LinkCosts) -> LinkCosts:
    # How long ranks take to meet says how far they are from each other.
    more = int(_SHARE * stopwatch.budget_s / stopwatch.overhead_s)
    # Between two hops along a rail there is one inside the node: they are not in a row.
    rail_s = [
        [stopwatch.exchange(Way.RAIL, num_bytes, 1) for num_bytes in (SMALL_BYTES, LARGE_BYTES)]
        for _ in range(min(2, 1 + more))  # the first use may be slower
    ]
    small_s, large_s = map(min, zip(*rail_s, strict=True))
    twice_s = 2 * small_s * topology.num_ranks / topology.num_nodes
    times = min(_IN_A_ROW, 2 + more) if twice_s < stopwatch.budget_s else 1
    world_s = stopwatch.exchange(Way.WORLD, SMALL_BYTES, times)
    delay_s, message_s, bytes_per_s = stopwatch.worked_out(
        lambda: between_nodes(topology, known, world_s, small_s, large_s), 3
    )
    return replace(
        known,
        node_delay_s=delay_s,
        node_message_s=message_s,
        node_bytes_per_s=bytes_per_s,
    )


def inside_nodes(
    topology: RankTopology, small_s: float, large_s: float, trip_s: float
) -> dict[str, float]:
    """Calls, messages and bytes where nothing is far away, from three timings."""
    others = max(map(len, topology.nodes)) - 1
    # What a call costs and what its messages cost cannot be told apart here; half is each.
    message_s = small_s / (2 * _WIRE_MESSAGES * max(1, others))
    # Answers to nothing are not sent, so a trip is one hop.
    posted_s = trip_s - _WIRE_MESSAGES * others * message_s
    return {
        "local_bytes_per_s": others * LARGE_BYTES / max(_LEAST_S, large_s - small_s),
        "local_message_s": message_s,
        "call_s": small_s / 2,
        "posted_call_s": max(small_s / 4, posted_s),
    }


def between_nodes(
    topology: RankTopology, known: LinkCosts, world_s: float, rail_s: float, rail_large_s: float
) -> list[float]:
    """Delay, message and rate of a way between nodes, from three timings.

    Handshakes, queues and delays overlap; virtual time knows how, so they are fitted, not solved.
    """

    def fitted(costs: LinkCosts, name: str, way: Way, num_bytes: int, took_s: float) -> LinkCosts:
        def predicted(value: float) -> float:
            return exchange_s(way, topology, _with(costs, name, value), num_bytes)

        return _with(costs, name, _fit(predicted, took_s, took_s))

    if topology.num_ranks > topology.num_nodes:
        # Each of the two timings is of both costs: they settle each other.
        for _ in range(_FITTING_ROUNDS):
            known = fitted(known, _DELAY, Way.RAIL, SMALL_BYTES, rail_s)
            known = fitted(known, _MESSAGE, Way.WORLD, SMALL_BYTES, world_s)
            if _meets(exchange_s(Way.RAIL, topology, known, SMALL_BYTES), rail_s):
                break
    else:
        known = fitted(known, _DELAY, Way.RAIL, SMALL_BYTES, rail_s)
    known = fitted(known, _BYTE, Way.RAIL, LARGE_BYTES, rail_large_s)
    return [max(_LEAST_S, known.node_delay_s), known.node_message_s, known.node_bytes_per_s]


def _with(costs: LinkCosts, name: str, value: float) -> LinkCosts:
    """With another cost; that of a byte is written as a rate."""
    if name == _DELAY:
        return replace(costs, node_delay_s=value)
    if name == _MESSAGE:
        return replace(costs, node_message_s=value)
    return replace(costs, node_bytes_per_s=1 / max(value / LARGE_BYTES, 1e-15))


def _meets(predicted: float, measured: float) -> bool:
    return abs(predicted - measured) <= _TOLERANCE * measured


def _fit(predicted: Callable[[float], float], measured: float, most: float) -> float:
    """The cost between 0 and `most` at which a rising prediction meets a measurement.

    Regula falsi after Illinois: virtual time is made of straight pieces, so a few steps do, and
    ranks that share a core all make them.
    """
    low, high = 0.0, most
    below, above = predicted(low) - measured, predicted(high) - measured
    if below >= 0:
        return low
    if above <= 0:
        return high
    middle = low
    for _ in range(_MOST_STEPS):
        middle = (low * above - high * below) / (above - below)
        off = predicted(middle) - measured
        if abs(off) <= _TOLERANCE * measured / 2:
            break
        if off < 0:
            low, below, above = middle, off, above / 2
        else:
            high, above, below = middle, off, below / 2
    return middle
