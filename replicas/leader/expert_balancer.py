"""Decides which experts move, and when all ranks switch; the leader's half of a rebalance.

    resting ──propose──▶ proposed ──next step──▶ announced ──all ranks ready──▶ ready ──next step──▶
       ▲                                            │ a rank cannot                                │
       └────────────── abort in the next step ◀─────┘                      resting ◀─── switched ──┘

Used from three sides, hence a lock: a thread proposes, the watch of the ranks says what it heard,
and the engine's loop takes the orders of each step.
"""

from __future__ import annotations

import enum
import logging
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from moe.expert_table import ExpertTable
from moe.node_packing import ExpertRanks
from moe.rebalance import Step, follow
from replicas.engine.lockstep import ExpertOrders, Rebalance

log = logging.getLogger(__name__)

Counts = npt.NDArray[np.float64]
# A layer that would gain less is left as it is.
_MIN_GAIN = 0.02
# The solver shares the interpreter with the engine's loop: between layers the loop goes first.
_PAUSE_S = 0.005


class _State(enum.Enum):
    RESTING = enum.auto()
    PROPOSED = enum.auto()
    ANNOUNCED = enum.auto()
    READY = enum.auto()
    ABORTING = enum.auto()


class ExpertBalancer:
    """The placement of a replica's experts, and the next one on its way.

    Args:
        tables: where all ranks begin.
        nodes: node of each rank.
        max_moves: experts that ranks fetch for one switch, over all layers.
    """

    def __init__(
        self, tables: Sequence[ExpertTable], nodes: Sequence[str], *, max_moves: int
    ) -> None:
        names = list(dict.fromkeys(nodes))
        self._nodes = tuple(names.index(node) for node in nodes)
        self._max_moves = max_moves
        self._lock = threading.Lock()
        self._tables = {table.layer: table for table in tables}
        self._state = _State.RESTING
        self._version = self._last_version = 0
        self._next: Rebalance | None = None
        self._next_moves = 0
        self.num_moves = 0
        """Experts that ranks have fetched so far."""

    def regrouped(self, tables: Sequence[ExpertTable], nodes: Sequence[str]) -> ExpertBalancer:
        """What goes on for another set of ranks; what was on its way is forgotten, counts are kept.

        Args:
            tables: where the experts are among them: another version of the placement.
            nodes: node of each.
        """
        other = ExpertBalancer(tables, nodes, max_moves=self._max_moves)
        with self._lock:
            other._version = other._last_version = self._last_version + 1
            other.num_moves = self.num_moves
        return other

    @property
    def tables(self) -> dict[int, ExpertTable]:
        """The placement in use, by layer."""
        with self._lock:
            return dict(self._tables)

    @property
    def version(self) -> int:
        """Of the placement in use; grows with every switch."""
        return self._version

    @property
    def is_resting(self) -> bool:
        """Whether nothing is on its way."""
        return self._state is _State.RESTING

    def propose(self, loads: Mapping[int, Counts]) -> bool:
        """Solve for the load and propose what is worth it; takes a while for many layers.

        Args:
            loads: recent rows per expert of each layer.

        Returns:
            Whether something was proposed.
        """
        steps = self._solve(loads)
        tables = [
            ExpertTable.of(layer, step.placement, len(self._nodes))
            for layer, step in steps.items()
            if step.before - step.after > _MIN_GAIN
        ]
        return bool(tables) and self.force(tables)

    def force(self, tables: Iterable[ExpertTable]) -> bool:
        """Propose these placements; False while another one is on its way."""
        with self._lock:
            if self._state is not _State.RESTING:
                return False
            self._last_version += 1
            self._next = Rebalance(version=self._last_version, tables=tuple(tables))
            self._next_moves = sum(
                len(set(new) - set(old))
                for table in self._next.tables
                for old, new in zip(
                    self._tables[table.layer].logical_by_rank, table.logical_by_rank, strict=True
                )
            )
            self._state = _State.PROPOSED
            return True

    def hear(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Take in the newest `ExpertState` fields of all ranks."""
        with self._lock:
            if self._state is not _State.ANNOUNCED or self._next is None:
                return
            version = self._next.version
            failures = [
                str(state["move_failure"])
                for state in states
                if state["announced"] == version and state["move_failure"]
            ]
            if failures:
                log.warning("a rebalance is given up: %s", failures[0])
                self._state = _State.ABORTING
            elif all(state["prepared"] == version for state in states):
                self._state = _State.READY

    def orders(self) -> ExpertOrders:
        """What the next step says; every order is given in exactly one step."""
        with self._lock:
            if self._state is _State.PROPOSED:
                self._state = _State.ANNOUNCED
                return ExpertOrders(table=self._version, rebalance=self._next)
            if self._state is _State.READY and self._next is not None:
                self._adopt(self._next)
            elif self._state is _State.ABORTING:
                self._state, self._next = _State.RESTING, None
                return ExpertOrders(table=self._version, abort=True)
            return ExpertOrders(table=self._version)

    def _adopt(self, rebalance: Rebalance) -> None:
        self._version = rebalance.version
        self._tables |= {table.layer: table for table in rebalance.tables}
        self.num_moves += self._next_moves
        self._state, self._next = _State.RESTING, None
        log.info(
            "experts: placement %d, %d layer(s) changed, %d expert(s) moved",
            rebalance.version,
            len(rebalance.tables),
            self._next_moves,
        )

    def _solve(self, loads: Mapping[int, Counts]) -> dict[int, Step]:
        """The next step of each layer that has a load; the worst layers may move experts first."""
        tables, left = self.tables, self._max_moves
        num_ranks = len(self._nodes)
        worst_first = sorted(
            (layer for layer in tables if loads[layer].any()),
            key=lambda layer: -tables[layer].placement().imbalance(loads[layer], num_ranks),
        )
        steps = {}
        for layer in worst_first:
            slots = tuple(len(held) for held in tables[layer].logical_by_rank)
            steps[layer] = follow(
                loads[layer],
                tables[layer].placement(),
                ExpertRanks(slots=slots, nodes=self._nodes),
                max_moves=left,
            )
            left -= len(steps[layer].moves)
            time.sleep(_PAUSE_S)
        return steps
