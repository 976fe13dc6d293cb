"""All exchanges of one rank: built once per epoch, handed to the layers, switched between steps.

A layer holds a `LayerExchange`, which passes each call on to the scheme in use. All ranks must
switch at the same step; the step header is where they agree.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch

from cluster.base.errors import ConfigError
from cluster.dist.peer_group import PeerGroup
from cluster.dist.rank_topology import RankTopology
from moe.exchange.answers import Leg, answers_for
from moe.exchange.base import Arrivals, Exchange, Pending
from moe.exchange.calibrate import link_costs
from moe.exchange.choose import schemes_of, traffic_of
from moe.exchange.flat import OneHopExchange, SlotHomes
from moe.exchange.hierarchical import Route, TwoHopExchange
from moe.exchange.hops import CountedHop, Hop
from moe.exchange.layer_costs import layer_costs
from moe.exchange.link_costs import LinkCosts
from moe.exchange.peers import Peers
from moe.exchange.preposted import SlotHop
from moe.exchange.probe import Probe, Probed, slots_of
from moe.exchange.schemes import DEFAULT_PROBE_S, DEFAULT_SLOT_ROWS, Scheme
from moe.exchange.shared_hop import SharedHop
from moe.exchange.simulate import simulate
from moe.exchange.stream_hop import StreamHop
from moe.exchange.wire import Combine, WireFormat
from moe.expert_slots import ExpertSlots
from moe.row_moves import RowWork

log = logging.getLogger(__name__)


class Exchanges:
    """The exchanges of one rank; all ranks construct theirs together.

    Args:
        peers: the rank's groups, already joined.
        topology: of all ranks.
        format: of rows on the wire, wide enough for every layer.
        slot_rows: rows per peer that `preposted` sends without a second round; memory is
            `slot_rows * row_bytes` per peer on rail and node.
        row_work: what plans, takes apart and adds rows; torch's if not given.
    """

    def __init__(
        self,
        peers: Peers,
        topology: RankTopology,
        format: WireFormat,
        *,
        slot_rows: int = DEFAULT_SLOT_ROWS,
        row_work: RowWork | None = None,
    ) -> None:
        if slot_rows < 1:
            raise ConfigError("A slot holds at least one row.", param="slot_rows")
        self.peers = peers
        self.topology = topology
        self.format = format
        self.slot_rows = slot_rows
        self._row_work = row_work or RowWork()
        self._scheme = Scheme.FLAT
        self._world = CountedHop(peers.world)
        self._rank = peers.world.rank
        self._route = Route(topology, self._rank)
        groups = (peers.rail, peers.node) if topology.has_two_levels else (peers.world,)
        self._slots = [self._without_counts(group) for group in groups]
        self._rail = (
            StreamHop(peers.rail, peers.streams, row_bytes=format.row_bytes)
            if peers.streams is not None
            else None
        )

    @property
    def scheme(self) -> Scheme:
        """The scheme in use."""
        return self._scheme

    @property
    def num_overflows(self) -> int:
        """Messages to this rank that did not fit their slot so far."""
        return sum(hop.num_overflows for hop in self._slots if isinstance(hop, SlotHop))

    def use(self, scheme: Scheme | str) -> None:
        """Switch all layers; between steps, and the same at all ranks.

        Raises:
            ConfigError: there is no such scheme.
        """
        if scheme not in list(Scheme):
            raise ConfigError(f"There is no exchange {scheme!r}.", f"Use one of {list(Scheme)}.")
        self._scheme = Scheme(scheme)

    def calibrate(self, budget_s: float = DEFAULT_PROBE_S) -> LinkCosts:
        """Measure the links; all ranks call it together and get the same.

        Args:
            budget_s: what it may take: what does not fit is not timed.
        """
        slots = slots_of(self.topology, self.format)
        scheme = self._scheme
        probed = Probed(
            peers=self.peers,
            inside=self._slots[-1],
            exchange=self.for_layer(0, slots),
            use=self.use,
            sums=self._row_work.sums,
            format=self.format,
        )
        probe = Probe(probed, slots.num_slots, budget_s)
        costs = link_costs(probe, self.topology)
        links_s = probe.spent_s
        layers = layer_costs(
            probe,
            schemes_of(self.topology),
            lambda scheme, rows: simulate(
                scheme, self.topology, traffic_of(rows, self.format), costs, self.slot_rows
            ),
        )
        self._scheme = scheme
        if self._rank == 0:
            log.info(
                "links measured in %.2f s of %.2f s (without layers %.2f s): %s",
                probe.spent_s,
                budget_s,
                links_s,
                layers.summary,
            )
        return replace(costs, layers=layers.lines, doubt=layers.doubt)

    def for_layer(self, layer: int, slots: ExpertSlots) -> LayerExchange:
        """The exchange of one layer, whose experts lie as given.

        Raises:
            ConfigError: the placement is for another number of ranks.
        """
        if slots.num_ranks != self.topology.num_ranks:
            raise ConfigError(
                f"A placement over {slots.num_ranks} ranks does not fit a group of "
                f"{self.topology.num_ranks}."
            )
        where = SlotHomes(slots, self._rank, self.format, self._row_work.moves)
        return LayerExchange(
            self, {scheme: self._build(scheme, where, f"layer {layer}") for scheme in Scheme}
        )

    def _build(self, scheme: Scheme, where: SlotHomes, layer: str) -> Exchange:
        """One scheme; with one level the two-hop schemes are their one-hop selves."""
        legs = self._legs(scheme)
        if len(legs) == 1:
            name = Scheme.FLAT if scheme is Scheme.HIERARCHICAL else scheme
            return OneHopExchange(name=name, leg=legs[0], where=where, layer=layer)
        return TwoHopExchange(
            name=scheme,
            legs=(legs[0], legs[1]),
            route=self._route,
            where=where,
            layer=layer,
        )

    def _without_counts(self, group: PeerGroup) -> SlotHop | SharedHop:
        """Through memory where the whole group shares it, else into slots."""
        shared = self.peers.shared
        if shared is not None and group.ranks == self.peers.node.ranks:
            return SharedHop(group, shared, row_bytes=self.format.row_bytes)
        return SlotHop(group, row_bytes=self.format.row_bytes, slot_rows=self.slot_rows)

    def _legs(self, scheme: Scheme) -> list[Leg]:
        """Outermost first. A lossy way home is for what crosses between nodes."""
        hops: Sequence[Hop]
        if scheme is Scheme.PREPOSTED:
            hops = self._slots
        elif scheme is Scheme.HIERARCHICAL and self._rail is not None:
            inner = self._slots[-1]
            in_memory = isinstance(inner, SharedHop)
            hops = [self._rail, inner if in_memory else CountedHop(self.peers.node)]
        else:
            hops = [self._world]
        combines = [self.format.combine, Combine.FP32]
        return [
            Leg(hop, answers_for(self.format.dim, combine, self._row_work.sums))
            for hop, combine in zip(hops, combines, strict=False)
        ]


class LayerExchange:
    """One layer's exchange: whatever scheme the group uses at the moment."""

    def __init__(self, group: Exchanges, by_scheme: dict[Scheme, Exchange]) -> None:
        self._group = group
        self._by_scheme = by_scheme

    @property
    def name(self) -> str:
        """The scheme in use."""
        return self._by_scheme[self._group.scheme].name

    def dispatch(
        self, hidden_TD: torch.Tensor, expert_TK: torch.Tensor, weight_TK: torch.Tensor
    ) -> Pending:
        """See `Exchange.dispatch`."""
        exchange = self._by_scheme[self._group.scheme]
        return exchange.dispatch(hidden_TD, expert_TK, weight_TK)

    def combine(self, partial_AD: torch.Tensor, arrivals: Arrivals) -> torch.Tensor:
        """See `Exchange.combine`."""
        return self._by_scheme[self._group.scheme].combine(partial_AD, arrivals)
