"""One rank of the exchange benchmark: does what the plan says, when the others do.

    python -m bench.moe_ranks PLAN.json RANK

Ranks agree on the moment to begin through shared memory, not over the links that are measured. Rank
0 also sets the link before each case and reads its counters; it writes what all ranks measured.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import mmap
import struct
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench.netrig.rig import Control, Link
from cluster.base.env import default_cache_dir
from cluster.dist.expert_peers import join_expert_peers
from cluster.dist.rank_topology import RankTopology
from cluster.dist.rendezvous import Rendezvous
from moe.exchange.base import Exchange
from moe.exchange.choose import choose
from moe.exchange.exchanges import Exchanges
from moe.exchange.link_costs import LinkCosts
from moe.exchange.wire import WireFormat
from moe.expert_slots import ExpertSlots
from replicas.kernels.select import select_row_work

_LEAD_S = 0.06
# Processors that have idled begin slowly and with empty caches: a layer took twice as long as one
# of a model does, between whose exchanges processors work. So they are kept at work, as if they
# went through weights, until all of them have to rest for a common start.
_SWEPT_BYTES = 4 * 2**20
_REST_S = 0.01
# Often enough for the lead, seldom enough not to take processors from ranks that are still at work.
_POLL_S = 0.01
_SETTLE_S = 0.12
_PATIENCE_S = 60.0


class Conductor:
    """When everybody is ready, a moment to begin; when everybody has ended, a duration."""

    def __init__(self, path: Path, rank: int, size: int) -> None:
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 8 * (1 + 2 * size))
        self._rank, self._size = rank, size
        self._turn = 0.0
        self._weights = torch.ones(_SWEPT_BYTES // 4)

    def meet(self) -> None:
        """Return when all ranks are here; rank 0 leads."""
        self._turn += 1
        self._set(1 + self._rank, self._turn)
        self._until(lambda: all(self._get(1 + r) >= self._turn for r in range(self._size)))

    def begin(self) -> float:
        """Return at the same moment everywhere: that moment, on the machine's clock."""
        self.meet()
        if self._rank == 0:
            self._set(0, time.monotonic() + _LEAD_S)
        self._until(lambda: self._get(0) > time.monotonic() - _LEAD_S)
        moment_s = self._get(0)
        while time.monotonic() < moment_s - _REST_S:
            self._weights.sum()
        time.sleep(max(0.0, moment_s - time.monotonic()))
        return moment_s

    def end(self, begun_s: float) -> float:
        """Seconds from the beginning to the last rank's end."""
        self._set(1 + self._size + self._rank, time.monotonic())
        self.meet()
        ends = [self._get(1 + self._size + rank) for rank in range(self._size)]
        return max(ends) - begun_s

    def _until(self, done: Any) -> None:
        give_up_s = time.monotonic() + _PATIENCE_S
        while not done():
            if time.monotonic() > give_up_s:
                raise TimeoutError("another rank of the benchmark is lost")
            time.sleep(_POLL_S)

    def _get(self, index: int) -> float:
        value: float = struct.unpack_from("=d", self._memory, 8 * index)[0]
        return value

    def _set(self, index: int, value: float) -> None:
        struct.pack_into("=d", self._memory, 8 * index, value)


class Bench:
    """A rank's exchanges and what it knows of the others."""

    def __init__(self, plan: dict[str, Any], rank: int) -> None:
        self._plan, self._rank = plan, rank
        self._topology = RankTopology.regular(plan["nodes"], plan["local"])
        size = self._topology.num_ranks
        self._conductor = Conductor(Path(plan["conductor"]), rank, size)
        self._control = Control(Path(plan["control"]))
        self._peers = join_expert_peers(
            rank=rank,
            topology=self._topology,
            rendezvous=Rendezvous(
                host=plan["hosts"][0], port=plan["port"], group="bench", connect_timeout_s=90.0
            ),
            timeout_s=30.0,
            bind_host=plan["hosts"][self._topology.node_index(rank)],
        )
        self._format = WireFormat(dim=plan["dim"], dtype=torch.float32, top_k=plan["top_k"])
        self._exchanges = Exchanges(
            self._peers,
            self._topology,
            self._format,
            slot_rows=plan["slot_rows"],
            row_work=select_row_work(default_cache_dir() / "kernels"),
        )
        self._answers = torch.empty((0, plan["dim"]), dtype=torch.float64)
        slots = ExpertSlots.even(plan["experts"], size)
        self._layer = self._exchanges.for_layer(0, slots)

    def run(self) -> list[dict[str, Any]]:
        """All links and cases in order."""
        answers = []
        for link in self._plan["links"]:
            self._conductor.meet()
            if self._rank == 0:
                self._control.shape(Link(**link["shape"]))
            self._conductor.meet()
            probes = [self._probe(budget_s) for budget_s in self._plan["probes_s"]]
            for case in link["cases"]:
                found = self._case(case, [costs for costs, _ in probes])
                local = self._plan["local"]
                answers.append({"link": link["name"], "local": local, **case, **found})
            answers[-1]["costs"] = dataclasses.asdict(probes[0][0])
            answers[-1]["probes_s"] = [took_s for _, took_s in probes]
        self._conductor.meet()
        self._peers.close()
        return answers

    def _probe(self, budget_s: float) -> tuple[LinkCosts, float]:
        """The costs, and how long it took to find them."""
        self._conductor.meet()
        begun_s = time.monotonic()
        costs = self._exchanges.calibrate(budget_s)
        return costs, time.monotonic() - begun_s

    def _case(self, case: dict[str, Any], costs: list[LinkCosts]) -> dict[str, Any]:
        rows, max_nodes = case["rows"], case["max_nodes"]
        generator = torch.Generator().manual_seed(self._rank)
        hidden = torch.randn((rows, self._plan["dim"]), generator=generator)
        chosen = self._routes(rows, max_nodes, generator)
        weights = torch.rand((rows, self._plan["top_k"]), generator=generator)
        choices = [
            choose(
                rows,
                self._topology,
                found,
                self._format,
                slot_rows=self._plan["slot_rows"],
                max_nodes=max_nodes,
            )
            for found in costs
        ]
        schemes = list(choices[0].expected_s)
        times: dict[str, list[float]] = {scheme: [] for scheme in schemes}
        wires: dict[str, list[tuple[int, int]]] = {scheme: [] for scheme in schemes}
        for repeat in range(self._plan["repeats"] + 1):
            for scheme in schemes:  # in turns, so that a disturbance meets all of them
                self._exchanges.use(scheme)
                took_s, wire = self._measure(self._layer, hidden, chosen, weights)
                if repeat:  # the first use of buffers and connections is slower
                    times[scheme].append(took_s)
                    wires[scheme].append(wire)
        return {
            "times_s": times,
            "wires": wires,
            "expected_s": [dict(choice.expected_s) for choice in choices],
            "chosen": [choice.scheme for choice in choices],
        }

    def _measure(
        self,
        exchange: Exchange,
        hidden: torch.Tensor,
        chosen: torch.Tensor,
        weights: torch.Tensor,
    ) -> tuple[float, tuple[int, int]]:
        self._conductor.meet()
        time.sleep(_SETTLE_S)  # what the last round left on the link
        before = self._control.wire()
        begun_s = self._conductor.begin()
        arrivals = exchange.dispatch(hidden, chosen, weights).wait()
        exchange.combine(self._sums(arrivals.hidden_AD.shape[0]), arrivals)
        took_s = self._conductor.end(begun_s)
        time.sleep(_SETTLE_S)
        wire = self._control.wire() - before
        return took_s, (wire.messages, wire.num_bytes)

    def _sums(self, num_rows: int) -> torch.Tensor:
        """What idle experts answer: settled rows, made once."""
        if self._answers.shape[0] < num_rows:
            self._answers = torch.randint(-(2**20), 2**20, (num_rows, self._plan["dim"])).double()
        return self._answers[:num_rows]

    def _routes(self, rows: int, max_nodes: int, generator: torch.Generator) -> torch.Tensor:
        """Random experts, of a few random nodes if the routing is limited."""
        num_experts, top_k = self._plan["experts"], self._plan["top_k"]
        scores = torch.rand((rows, num_experts), generator=generator)
        if max_nodes:
            nodes = self._topology.num_nodes
            node_scores = torch.rand((rows, nodes), generator=generator)
            kept = torch.zeros_like(node_scores).scatter_(1, node_scores.topk(max_nodes).indices, 1)
            scores *= kept.repeat_interleave(num_experts // nodes, dim=1)
        return scores.topk(top_k, dim=1).indices


def main() -> None:
    """Run the plan; rank 0 writes the answers."""
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    plan = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    rank = int(sys.argv[2])
    answers = Bench(plan, rank).run()
    if rank == 0:
        Path(plan["answers"]).write_text(json.dumps(answers), encoding="utf-8")


if __name__ == "__main__":
    main()
