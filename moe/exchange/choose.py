"""Which scheme a step should use: the one that should be fastest, by virtual time and by how long
the layers of the probe took; of those that cannot be told apart, the one that sends least. Pure.

All ranks hold the same costs (`calibrate` sees to that) and the same numbers, so they come to the
same answer; the step header then only has to carry the name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cluster.dist.rank_topology import RankTopology
from moe.exchange.answers import answers_for
from moe.exchange.link_costs import LinkCosts
from moe.exchange.schemes import DEFAULT_SLOT_ROWS, Scheme
from moe.exchange.simulate import Traffic, simulate
from moe.exchange.wire import WireFormat

_LIGHTEST_FIRST = (Scheme.HIERARCHICAL, Scheme.PREPOSTED, Scheme.FLAT)
"""By bytes between nodes, then by messages. What else uses the links is not in the probe."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A scheme, why, and what each was expected to take."""

    scheme: Scheme
    reason: str
    expected_s: dict[Scheme, float]


def schemes_of(topology: RankTopology) -> list[Scheme]:
    """Those that differ: with one level `hierarchical` is `flat` under another name."""
    both = topology.has_two_levels
    return [scheme for scheme in Scheme if both or scheme is not Scheme.HIERARCHICAL]


def traffic_of(rows: int, format: WireFormat, max_nodes: int = 0) -> Traffic:
    """A layer's traffic, for the simulator; arguments as for `choose`."""
    return Traffic(
        rows=rows,
        top_k=format.top_k,
        row_bytes=format.row_bytes,
        answer_bytes=answers_for(format.dim, format.combine).num_bytes,
        max_nodes=max_nodes,
    )


def choose(
    rows: int,
    topology: RankTopology,
    costs: LinkCosts,
    format: WireFormat,
    *,
    slot_rows: int = DEFAULT_SLOT_ROWS,
    max_nodes: int = 0,
) -> Choice:
    """The scheme for a layer.

    Args:
        rows: the most that any rank has in this step.
        topology: of the group.
        costs: the same at all ranks.
        format: of rows on the wire.
        slot_rows: rows of a slot of `preposted`.
        max_nodes: nodes a token may visit (group-limited routing); 0: any number.
    """
    traffic = traffic_of(rows, format, max_nodes)
    expected = {}
    for scheme in schemes_of(topology):
        virtual_s = simulate(scheme, topology, traffic, costs, slot_rows)
        expected[scheme] = costs.layer_s(scheme, virtual_s)
    best = _lightest_of_the_fast(expected, costs.doubt)
    figures = ", ".join(f"{scheme} {1e3 * time_s:.3g} ms" for scheme, time_s in expected.items())
    shape = "+".join(str(len(ranks)) for ranks in topology.nodes)
    reason = f"{best} for {rows} rows a rank on {shape} ranks: {figures} expected per layer"
    return Choice(scheme=best, reason=reason, expected_s=expected)


def _lightest_of_the_fast(expected_s: dict[Scheme, float], doubt: float) -> Scheme:
    limit_s = (1 + doubt) * min(expected_s.values())
    return next(s for s in _LIGHTEST_FIRST if expected_s.get(s, math.inf) <= limit_s)
