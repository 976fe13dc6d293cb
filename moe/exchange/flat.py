"""Straight to the rank: one copy of a row for each rank that holds some of its experts.

One hop over the whole group. All messages leave at once, so nothing beats it where messages cost
nothing; each rank sends to every other, though, and a row crosses to a node once per rank there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moe.exchange.answers import Leg
from moe.exchange.base import Arrivals
from moe.exchange.hops import Trip
from moe.exchange.wire import WireFormat
from moe.expert_slots import ExpertSlots
from moe.plan import NOWHERE, RowPlan
from moe.row_moves import Piece, RowMoves


class SlotHomes:
    """The rank of every slot of a layer, and this rank's share; shared by all schemes.

    Args:
        slots: of the layer.
        rank: this rank in the whole group.
        format: of rows on the wire.
        moves: what plans and takes apart rows.
    """

    def __init__(self, slots: ExpertSlots, rank: int, format: WireFormat, moves: RowMoves) -> None:
        self.first = slots.firsts[rank]
        self.num_local = slots.counts[rank]
        self.format = format
        self.moves = moves
        self.rank_S = torch.tensor([*slots.rank_of_slot, NOWHERE])
        """One entry more, reached by index -1, for what is nowhere."""

    def unpack(self, pieces: Sequence[Piece], ticket: object) -> Arrivals:
        """What a rank computes with, from the rows that reached it; a copy of them."""
        rows = self.moves.split(self.format, pieces)
        return Arrivals(
            hidden_AD=rows.hidden_AD,
            slot_AK=rows.expert_AK - self.first,
            weight_AK=rows.weight_AK,
            num_local=self.num_local,
            ticket=ticket,
        )


class OneHopExchange:
    """An exchange over a single hop; `flat` with a counted one, `preposted` with slots.

    Args:
        name: of the scheme.
        leg: over all ranks.
        where: the layer's experts.
        layer: how errors name it.
    """

    def __init__(self, *, name: str, leg: Leg, where: SlotHomes, layer: str) -> None:
        self.name = name
        self._leg = leg
        self._where = where
        self._layer = layer

    def dispatch(
        self, hidden_TD: torch.Tensor, expert_TK: torch.Tensor, weight_TK: torch.Tensor
    ) -> OneHopPending:
        """Start to send each row once to every rank it visits."""
        where = self._where
        plan = where.moves.plan(expert_TK, where.rank_S, self._leg.hop.group.size)
        trip = self._leg.open([where.format.pack(hidden_TD, expert_TK, weight_TK)], plan)
        return OneHopPending(plan, trip, where, f"{self._layer} dispatch")

    def combine(self, partial_AD: torch.Tensor, arrivals: Arrivals) -> torch.Tensor:
        """Partial sums home, added and rounded once."""
        ticket: _Ticket = arrivals.ticket
        what = f"{self._layer} combine"
        answers = self._leg.answers
        return answers.bring_home(ticket.trip, ticket.plan, partial_AD, what).rounded()


@dataclass(frozen=True, slots=True)
class _Ticket:
    plan: RowPlan
    trip: Trip


@dataclass(frozen=True, slots=True)
class OneHopPending:
    """Rows on their way to the ranks of their experts."""

    plan: RowPlan
    trip: Trip
    where: SlotHomes
    what: str

    def wait(self) -> Arrivals:
        """The arrived rows and their local experts."""
        return self.where.unpack(self.trip.arrive(self.what), _Ticket(self.plan, self.trip))
