"""What whole layers take beyond virtual time: each scheme, with few rows and with more.

The simulator knows of messages, bytes and calls. What processors do besides, which ranks may share,
it does not: how often ranks are woken, how long they queue for a core, what they do to their rows.
Here that is the difference between timed layers and their virtual time, a line over the rows of a
rank. It may be negative: costs measured message by message are in part paid side by side.

A layer is timed as a model meets it. Weights have swept the caches since the last one, for a short
layer is mostly code and data that are no longer near; and everybody rests first, else ranks that
are ahead would do part of their work while others end theirs, and a layer would look too short.
"""

from __future__ import annotations

import itertools
import statistics
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
_PAUSE_S = 0.01
_SWEPT_BYTES = 4 * 2**20
"""More than a core's own cache."""
_NUM_LAYERS = 3
"""The same number at all ranks, whatever they measure."""


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
        self._weights = torch.ones(_SWEPT_BYTES // 4)
        self._answers_AD = torch.empty((0, format.dim), dtype=torch.float64)

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
        cases = [
            (scheme, rows)
            for scheme in schemes_of(self._topology)
            for rows in (FEW_ROWS, MORE_ROWS)
        ]
        own_s = []
        for scheme, rows in cases:
            use(scheme)
            own_s += self._layers_s(exchange, rows)
        # A layer lasts until its last rank, and that is another one each time.
        longest = iter(self._probe.slowest(own_s))
        longest_s = [list(itertools.islice(longest, _NUM_LAYERS)) for _ in cases]
        beyond_s = [
            statistics.median(took_s) - self._virtual_s(scheme, rows, costs)
            for (scheme, rows), took_s in zip(cases, longest_s, strict=True)
        ]
        found = []
        for (scheme, _), few_s, more_s in zip(
            cases[::2], beyond_s[::2], beyond_s[1::2], strict=True
        ):
            row_s = (more_s - few_s) / (MORE_ROWS - FEW_ROWS)
            found.append((str(scheme), few_s - FEW_ROWS * row_s, row_s))
        return tuple(found)

    def _virtual_s(self, scheme: Scheme, rows: int, costs: LinkCosts) -> float:
        traffic = traffic_of(rows, self._format)
        return simulate(scheme, self._topology, traffic, costs, self._slot_rows)

    def _layers_s(self, exchange: Exchange, rows: int) -> list[float]:
        """Seconds of dispatch and combine without experts, at this rank, of each of some layers."""
        dim, top_k = self._format.dim, self._format.top_k
        num_slots = self.slots(self._topology, self._format).num_slots
        hidden = torch.randn((rows, dim), generator=self._generator).to(self._format.dtype)
        scores = torch.rand((rows, num_slots), generator=self._generator)
        chosen, weights = scores.topk(top_k, dim=1).indices, torch.ones((rows, top_k))

        def layer() -> float:
            self._weights.sum()
            time.sleep(_PAUSE_S)
            begin_s = time.perf_counter()
            arrivals = exchange.dispatch(hidden, chosen, weights).wait()
            exchange.combine(self._sums(arrivals.hidden_AD.shape[0]), arrivals)
            return time.perf_counter() - begin_s

        layer()  # the first use of buffers and connections is slower
        return [layer() for _ in range(_NUM_LAYERS)]

    def _sums(self, num_rows: int) -> torch.Tensor:
        """What experts would answer; made before the layers that count."""
        if self._answers_AD.shape[0] < num_rows:
            # Written: pages that nobody has written are all the same one, which is always near.
            self._answers_AD = self._answers_AD.new_ones((num_rows, self._format.dim))
        return self._answers_AD[:num_rows]
