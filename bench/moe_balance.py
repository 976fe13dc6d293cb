"""Balance and traffic of expert placement against EPLB's method, on skewed and drifting loads.

    python -m bench.moe_balance [--layers 8] [--windows 12]

Static: one placement for a known load; max/mean rank load, and rows per token that cross between
nodes under group-limited routing (copies on the own node first). Drift: within each window the load
moves by 20 % towards another one in ten parts; ours follows after every part, EPLB was placed once,
or is placed anew after every window. No model runs: these are counts and times of pure functions.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bench.eplb_baseline import eplb_global, eplb_hierarchical
from bench.moe_traffic import Routing, inter_node_rows
from bench.report import Row, Samples, compared, measured, write_report
from moe.node_packing import ExpertRanks
from moe.placement import place_layer
from moe.rebalance import follow

NODES = 4
PARTS = 10
DRIFT = 0.2
TOKENS = 3000


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One size of group."""

    experts: int
    num_ranks: int
    spare: int
    zipf: float

    @property
    def name(self) -> str:
        """As it stands in the table."""
        return f"{self.experts}e/{self.num_ranks} ranks zipf {self.zipf}"

    @property
    def ranks(self) -> ExpertRanks:
        """Equal slots on four nodes."""
        slots = (self.experts + self.spare) // self.num_ranks
        nodes = tuple(rank * NODES // self.num_ranks for rank in range(self.num_ranks))
        return ExpertRanks(slots=(slots,) * self.num_ranks, nodes=nodes)

    @property
    def routing(self) -> Routing:
        """Eight experts from at most four of eight groups."""
        return Routing(
            num_experts=self.experts, top_k=8, num_groups=8, top_groups=4, zipf=self.zipf
        )


SHAPES = tuple(
    Shape(experts=experts, num_ranks=ranks, spare=spare, zipf=zipf)
    for experts, ranks, spare in ((64, 16, 16), (256, 32, 32))
    for zipf in (0.6, 1.0)
)


def main() -> None:
    """Measure, print and write bench/results/moe_balance.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8, help="independent loads per case")
    parser.add_argument("--windows", type=int, default=12, help="windows of drift")
    options = parser.parse_args()
    rows: list[Row] = []
    for shape in SHAPES:
        rows += static_rows(shape, options.layers)
        rows += drift_rows(shape, options.windows)
    write_report(
        "moe_balance",
        rows,
        notes=(
            "EPLB hierarchical and global are written anew from the published description",
            f"drift: {DRIFT:.0%} of the load changes per window, in {PARTS} parts; "
            "targets of imbalance are budgets: ratio = budget / ours",
        ),
    )


def static_rows(shape: Shape, layers: int) -> Iterator[Row]:
    """A known load, placed by each method."""
    rng = np.random.default_rng(shape.experts)
    balance: dict[str, list[float]] = {"ours": [], "hierarchical": [], "global": []}
    traffic: dict[str, list[float]] = {name: [] for name in balance}
    solve_ms = []
    for _ in range(layers):
        logits = shape.routing.logits(rng)
        tokens = shape.routing.tokens(logits, TOKENS, rng)
        load = np.bincount(tokens.ravel(), minlength=shape.experts).astype(float)
        started_s = time.perf_counter()
        ours = place_layer(load, shape.ranks, clusters=shape.routing.groups)
        solve_ms.append((time.perf_counter() - started_s) * 1e3)
        placements = {
            "ours": ours,
            "hierarchical": eplb_hierarchical(load.tolist(), shape.ranks, shape.routing.groups),
            "global": eplb_global(load.tolist(), shape.ranks),
        }
        for name, placement in placements.items():
            balance[name].append(placement.imbalance(load, shape.num_ranks))
            traffic[name].append(inter_node_rows(tokens, placement, shape.ranks.nodes, rng))
    peak = measured(shape.name, "static max/mean", "", _samples(balance["ours"]))
    yield compared(peak, "budget 1.005", _samples([1.005]), target=1, lower_is_better=True)
    for name in ("hierarchical", "global"):
        against = f"EPLB {name}"
        yield compared(peak, against, _samples(balance[name]), lower_is_better=True)
    moved = measured(shape.name, "inter-node rows/token", "", _samples(traffic["ours"]))
    for name, target in (("hierarchical", 1 / 1.1), ("global", None)):
        yield compared(
            moved,
            f"EPLB {name}",
            _samples(traffic[name]),
            target=target,
            lower_is_better=True,
        )
    yield measured(shape.name, "solve, per layer", "ms", _samples(solve_ms))


def drift_rows(shape: Shape, windows: int) -> Iterator[Row]:
    """A load that moves while the group serves."""
    rng = np.random.default_rng(1)
    ranks = shape.ranks
    load = _zipf(shape, rng)
    placement = place_layer(load, ranks)
    once = renewed = eplb_global(load.tolist(), ranks)
    ours, eplb_once, eplb_renewed, step_ms, moves = [], [], [], [], 0
    for _ in range(windows):
        target = (1 - DRIFT) * load + DRIFT * _zipf(shape, rng)
        for part in range(1, PARTS + 1):
            now = load + (target - load) * part / PARTS
            ours.append(placement.imbalance(now, ranks.num_ranks))
            eplb_once.append(once.imbalance(now, ranks.num_ranks))
            eplb_renewed.append(renewed.imbalance(now, ranks.num_ranks))
            started_s = time.perf_counter()
            step = follow(now, placement, ranks, max_moves=1)
            step_ms.append((time.perf_counter() - started_s) * 1e3)
            placement, moves = step.placement, moves + len(step.moves)
        load = target
        renewed = eplb_global(load.tolist(), ranks)
    mean = measured(shape.name, "drift, mean max/mean", "", _samples([float(np.mean(ours))]))
    yield compared(mean, "budget 1.10", _samples([1.10]), target=1, lower_is_better=True)
    for name, values in (("once", eplb_once), ("each window", eplb_renewed)):
        theirs = _samples([float(np.mean(values))])
        yield compared(mean, f"EPLB global, {name}", theirs, lower_is_better=True)
    part_moved = moves / windows / sum(ranks.slots)
    slabs = measured(shape.name, "slabs moved per window", "%", _samples([part_moved * 100]))
    yield compared(slabs, "budget 5 %", _samples([5.0]), target=1, lower_is_better=True)
    yield measured(shape.name, "follow, per layer and part", "ms", _samples(step_ms))


def _zipf(shape: Shape, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    load = 1.0 / np.arange(1, shape.experts + 1) ** shape.zipf
    rng.shuffle(load)
    scaled: npt.NDArray[np.float64] = load / load.sum()
    return scaled


def _samples(values: list[float]) -> Samples:
    return Samples(values=tuple(values))


if __name__ == "__main__":
    main()
