"""What whole layers take beyond virtual time: each scheme, with few rows and with more.

The simulator knows of messages, bytes and calls. That sixteen ranks share two cores, how often they
are woken, and what a rank does to its rows it does not: here it is the difference between a timed
layer and its virtual time, a constant and a part per row. Taken with pauses between the layers, as
a model has them: back to back everything is in the cache and nobody sleeps.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from cluster.dist.rank_topology import RankTopology
from moe.exchange.base import Exchange
from moe.exchange.calibrate import Probe
from moe.exchange.choose import schemes_of, traffic_of
from moe.exchange.link_costs import LinkCosts
from moe.exchange.schemes import Scheme
from moe.exchange.simulate import simulate
from moe.exchange.wire import WireFormat
from moe.expert_slots import ExpertSlots

FEW_ROWS, MORE_ROWS = 4, 48
_SLOTS_PER_RANK = 4
_PAUSE_S = 0.003


class LayerProbe:
    """Rows of a probing layer, and how long they take.

    Args:
        probe: of the group.
        topology, format, slot_rows: as the exchanges have them.
        rank: this rank.
    """

    def __init__(
        self, probe: Probe, topology: RankTopology, format: WireFormat, slot_rows: int, rank: int
    ) -> None:
        self._probe = probe
        self._topology = topology
        self._format = format
        self._slot_rows = slot_rows
        self._generator = torch.Generator().manual_seed(rank)

    @staticmethod
    def slots(topology: RankTopology, format: WireFormat) -> ExpertSlots:
        """The placement that the probing layer has."""
        count = max(_SLOTS_PER_RANK * topology.num_ranks, format.top_k)
        return ExpertSlots.even(count, topology.num_ranks)

    def own_costs(
        self, exchange: Exchange, use: Callable[[Scheme], None], costs: LinkCosts
    ) -> tuple[tuple[str, float, float], ...]:
        """`LinkCosts.own`; all ranks call it together.

        Args:
            exchange: of a layer with `slots`.
            use: switches it to another scheme.
            costs: of the links.
        """
        found = []
        for scheme in schemes_of(self._topology):
            use(scheme)
            few_s, more_s = (
                max(0.0, self._layer_s(exchange, rows) - self._virtual_s(scheme, rows, costs))
                for rows in (FEW_ROWS, MORE_ROWS)
            )
            row_s = max(0.0, (more_s - few_s) / (MORE_ROWS - FEW_ROWS))
            found.append((str(scheme), max(0.0, few_s - FEW_ROWS * row_s), row_s))
        return tuple(found)

    def _virtual_s(self, scheme: Scheme, rows: int, costs: LinkCosts) -> float:
        traffic = traffic_of(rows, self._format)
        return simulate(scheme, self._topology, traffic, costs, self._slot_rows)

    def _layer_s(self, exchange: Exchange, rows: int) -> float:
        """Seconds of dispatch and combine without experts, at the slowest rank."""
        dim, top_k = self._format.dim, self._format.top_k
        num_slots = self.slots(self._topology, self._format).num_slots
        hidden = torch.randn((rows, dim), generator=self._generator).to(self._format.dtype)
        scores = torch.rand((rows, num_slots), generator=self._generator)
        chosen, weights = scores.topk(top_k, dim=1).indices, torch.ones((rows, top_k))
        sums = torch.zeros((rows * self._topology.num_ranks, dim), dtype=torch.float64)

        def layer() -> None:
            time.sleep(_PAUSE_S)
            arrivals = exchange.dispatch(hidden, chosen, weights).wait()
            exchange.combine(sums[: arrivals.hidden_AD.shape[0]], arrivals)

        return self._probe.time(layer) - _PAUSE_S
