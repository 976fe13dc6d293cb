"""What the probe finds on clusters of known cost, and that it keeps to its budget on any link."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from cluster.dist.rank_topology import RankTopology
from moe.exchange.calibrate import LARGE_BYTES, SMALL_BYTES, link_costs
from moe.exchange.choose import choose, schemes_of, traffic_of
from moe.exchange.layer_costs import FEW_ROWS, LayerCosts, layer_costs
from moe.exchange.link_costs import LinkCosts
from moe.exchange.schemes import Scheme, Way
from moe.exchange.simulate import simulate
from moe.exchange.wire import WireFormat
from tests.support.virtual_stopwatch import VirtualStopwatch

GRID = RankTopology.regular(4, 4)
WIRE = WireFormat(dim=1024, dtype=torch.float32, top_k=8)
SLOT_ROWS = 128
NEAR = LinkCosts(
    local_message_s=2e-5,
    local_bytes_per_s=4e9,
    row_bytes_per_s=2e9,
    call_s=1.8e-4,
    posted_call_s=1e-4,
)
LINKS = {
    "fast": {"node_delay_s": 3e-5, "node_message_s": 5e-6, "node_bytes_per_s": 3e9},
    "slow": {"node_delay_s": 2e-3, "node_message_s": 5e-5, "node_bytes_per_s": 6e7},
    "far": {"node_delay_s": 2e-2, "node_message_s": 1e-3, "node_bytes_per_s": 1e9},
    "awful": {"node_delay_s": 0.1, "node_message_s": 2e-3, "node_bytes_per_s": 1e6},
}
OWN = {"flat": (0.02, 7e-5), "hierarchical": (0.012, 5e-5), "preposted": (0.008, 6e-5)}


def cluster(link: str, budget_s: float = 1.0, own: dict[str, tuple[float, float]] = OWN):
    costs = LinkCosts(**(vars_of(NEAR) | LINKS[link]))
    return VirtualStopwatch(GRID, costs, WIRE, own, SLOT_ROWS, budget_s)


def vars_of(costs: LinkCosts) -> dict[str, float]:
    return {
        name: getattr(costs, name) for name in LinkCosts.__dataclass_fields__ if name != "layers"
    }


def probe(stopwatch: VirtualStopwatch) -> tuple[LinkCosts, LayerCosts]:
    costs = link_costs(stopwatch, GRID)

    def virtual(scheme: Scheme, rows: int) -> float:
        return simulate(scheme, GRID, traffic_of(rows, WIRE), costs, SLOT_ROWS)

    return costs, layer_costs(stopwatch, schemes_of(GRID), virtual)


@pytest.mark.parametrize("link", ["slow", "far"])
def test_known_costs_of_links_are_recovered(link):
    stopwatch = cluster(link)
    costs = link_costs(stopwatch, GRID)
    for name, value in LINKS[link].items():
        # A fast link's bytes are hidden behind its delay: there is nothing to recover.
        if name != "node_bytes_per_s" or link == "slow":
            assert getattr(costs, name) == pytest.approx(value, rel=0.15), name
    assert costs.row_bytes_per_s == pytest.approx(NEAR.row_bytes_per_s)
    assert costs.local_bytes_per_s == pytest.approx(NEAR.local_bytes_per_s, rel=0.05)


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("rows", [1, 8, 64, 256])
def test_layers_that_were_not_timed_are_foretold(link, rows):
    stopwatch = cluster(link, budget_s=60.0)
    costs, layers = probe(stopwatch)
    costs = replace(costs, layers=layers.lines)
    for max_nodes in (0, 2):
        choice = choose(rows, GRID, costs, WIRE, slot_rows=SLOT_ROWS, max_nodes=max_nodes)
        for scheme, expected_s in choice.expected_s.items():
            assert rows not in (4, 192)
            truth_s = stopwatch.truth_s(scheme, rows, max_nodes)
            assert expected_s == pytest.approx(truth_s, rel=0.2)


@pytest.mark.parametrize("link", ["fast", "slow", "far"])
@pytest.mark.parametrize("budget_s", [1.0, 2.0, 4.0])
def test_the_budget_holds_on_any_link(link, budget_s):
    stopwatch = cluster(link, budget_s)
    _, layers = probe(stopwatch)
    assert stopwatch.spent_s <= 1.1 * budget_s
    assert len(layers.lines) == 3


def test_where_a_layer_is_longer_than_the_budget_links_alone_count():
    stopwatch = cluster("awful")
    _, layers = probe(stopwatch)
    assert [line[1:] for line in layers.lines] == [(0.0, 1.0)] * 3
    assert layers.doubt == 0.2
    assert "too long" in layers.summary
    assert stopwatch.timed[Way.RAIL, LARGE_BYTES] == 1
    assert stopwatch.timed[Way.WORLD, SMALL_BYTES] == 1
    assert not any(isinstance(what, Scheme) for what, _ in stopwatch.timed)


def test_what_was_not_timed_counts_as_what_was():
    stopwatch = cluster("far", 1.2)
    _, layers = probe(stopwatch)
    assert stopwatch.timed[Scheme.PREPOSTED, FEW_ROWS]
    assert not stopwatch.timed[Scheme.FLAT, FEW_ROWS]
    lines = {name: (base_s, scale) for name, base_s, scale in layers.lines}
    timed = [lines["hierarchical"], lines["preposted"]]
    for part in (0, 1):
        values = sorted(line[part] for line in timed)
        assert values[0] <= lines["flat"][part] <= values[1]
    assert "none of" in layers.summary
    assert "flat" in layers.summary.split("none of")[1]


def test_a_fast_link_leaves_time_for_many_rows_and_for_repetitions():
    stopwatch = cluster("fast", own=dict.fromkeys(OWN, (1e-4, 1e-5)))
    _, layers = probe(stopwatch)
    assert stopwatch.timed[Scheme.FLAT, 192] > 1
    assert stopwatch.timed[Way.RAIL, LARGE_BYTES] > 1
    assert "with 192 rows" in layers.summary
    assert stopwatch.timed[Scheme.FLAT, FEW_ROWS] == 5
    assert layers.doubt == pytest.approx(0.2 / 5**0.5)


def test_the_probe_is_deterministic():
    assert probe(cluster("slow")) == probe(cluster("slow"))


def test_the_first_use_of_a_size_does_not_count_where_there_is_a_second():
    class Cold(VirtualStopwatch):
        def layer(self, scheme: Scheme, rows: int) -> float:
            is_first = not self.timed[scheme, rows]
            return super().layer(scheme, rows) * (3.0 if is_first else 1.0)

    warm = cluster("fast", budget_s=10.0)
    cold = Cold(GRID, warm.costs, WIRE, OWN, SLOT_ROWS, 10.0)
    lines = [numbers(stopwatch) for stopwatch in (cold, warm)]
    assert lines[0] == pytest.approx(lines[1])


def test_where_many_rows_of_all_do_not_fit_the_two_fastest_speak_for_the_third():
    stopwatch = cluster("slow", budget_s=1.3)
    _, layers = probe(stopwatch)
    (rows,) = {rows for what, rows in stopwatch.timed if isinstance(what, Scheme)} - {FEW_ROWS}
    assert stopwatch.timed[Scheme.HIERARCHICAL, rows]
    assert stopwatch.timed[Scheme.PREPOSTED, rows]
    assert not stopwatch.timed[Scheme.FLAT, rows]
    scale = {name: scale for name, _, scale in layers.lines}
    assert min(scale["hierarchical"], scale["preposted"]) < scale["flat"]
    assert scale["flat"] < max(scale["hierarchical"], scale["preposted"])


@pytest.mark.parametrize(("budget_s", "rows"), [(0.7, 64), (6.0, 192)])
def test_a_slope_goes_by_its_own_layers_and_the_fewer_their_rows_by_those_of_all(budget_s, rows):
    stopwatch = cluster("slow", budget_s)
    costs, layers = probe(stopwatch)
    assert stopwatch.timed[Scheme.HIERARCHICAL, rows]
    steps = {
        scheme: [
            cost(rows) - cost(FEW_ROWS)
            for cost in (
                partial(stopwatch.truth_s, scheme),
                lambda n, scheme=scheme: simulate(
                    scheme, GRID, traffic_of(n, WIRE), costs, SLOT_ROWS
                ),
            )
        ]
        for scheme in Scheme
        if stopwatch.timed[scheme, rows]
    }
    took_s, virtual_s = map(sum, zip(*steps.values(), strict=True))
    shared = 16 / rows
    for name, _, scale in layers.lines:
        own_s, own_virtual_s = steps.get(Scheme(name), (took_s, virtual_s))
        expected = (1 - shared) * own_s / own_virtual_s + shared * took_s / virtual_s
        assert scale == pytest.approx(expected)


def numbers(stopwatch: VirtualStopwatch) -> list[float]:
    return [value for _, *values in probe(stopwatch)[1].lines for value in values]
