"""Moves experts on one rank: fetches weights beside the steps, switches between two of them.

Weights are read from the checkpoint, which every rank's node has: no rank is asked for anything,
and nothing competes with the tokens on the way between nodes. Until the switch the rank holds what
it has and what it is to get, so the leader announces few experts at a time.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from cluster.base.errors import InternalError
from moe.spread_experts import LayerLayout, SpreadExperts
from replicas.engine.lockstep import ExpertOrders, Rebalance
from replicas.layers.weights import ResidentWeights

log = logging.getLogger(__name__)

ReadExpert = Callable[[int, int], Mapping[str, torch.Tensor]]
"""(layer, logical expert) -> the tensors of its unit; called from another thread."""


def expert_name(layer: int, expert: int) -> str:
    """The unit of a routed expert."""
    return f"layer.{layer}.expert.{expert}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prepared:
    version: int
    layouts: tuple[LayerLayout, ...]
    added: Mapping[str, Mapping[str, torch.Tensor]]
    dropped: tuple[str, ...]


class ExpertMover:
    """Obeys the orders of step headers.

    Args:
        experts: the rank's layout.
        weights: what the model computes with.
        read_expert: gives an expert that this rank does not hold.
        table: version of the placement that the rank has now.
    """

    def __init__(
        self,
        experts: SpreadExperts,
        weights: ResidentWeights,
        read_expert: ReadExpert,
        table: int = 0,
    ) -> None:
        self._experts = experts
        self._weights = weights
        self._read_expert = read_expert
        self._lock = threading.Lock()
        self._table = table
        self._wanted = 0
        self._prepared: _Prepared | None = None
        self._failure: tuple[int, str] = (0, "")

    @property
    def prepared(self) -> int:
        """The newest version that this rank is ready for, or uses."""
        prepared = self._prepared
        return self._table if prepared is None else prepared.version

    @property
    def announced(self) -> int:
        """The version that this rank was last told to prepare."""
        return self._wanted

    @property
    def failure(self) -> str:
        """Why what was announced last cannot be prepared; empty when it can."""
        version, reason = self._failure
        return reason if version == self._wanted else ""

    def obey(self, orders: ExpertOrders) -> None:
        """Before a step: switch, if it says so, and begin to prepare what it announces.

        Raises:
            InternalError: the step uses a placement that this rank has not prepared.
        """
        if orders.table != self._table:
            self._switch(orders.table)
        if orders.abort:
            self._expect(0)
        if orders.rebalance is not None:
            self._expect(orders.rebalance.version)
            threading.Thread(
                target=self._prepare, args=(orders.rebalance,), name="expert-mover", daemon=True
            ).start()

    def _expect(self, version: int) -> None:
        with self._lock:
            self._wanted, self._prepared = version, None

    def _switch(self, version: int) -> None:
        prepared, self._prepared = self._prepared, None
        if prepared is None or prepared.version != version:
            raise InternalError(f"Placement {version} of the experts is used but not prepared.")
        self._weights.exchange(prepared.added, prepared.dropped)
        for layout in prepared.layouts:
            self._experts.use(layout)
        self._table = version

    def _prepare(self, rebalance: Rebalance) -> None:
        """Another thread: all the rank needs for the switch."""
        try:
            prepared = self._fetch(rebalance)
        except Exception as error:
            log.warning("experts stay where they are: %s", error)
            self._failure = (rebalance.version, f"{type(error).__name__}: {error}")
            return
        with self._lock:
            if self._wanted == rebalance.version:
                self._prepared = prepared

    def _fetch(self, rebalance: Rebalance) -> _Prepared:
        layouts, added, dropped = [], {}, []
        for table in rebalance.tables:
            layout = self._experts.prepare(table)
            before, after = set(self._experts.held(table.layer)), set(layout.held)
            for expert in sorted(after - before):
                name = expert_name(table.layer, expert)
                added[name] = self._read_expert(table.layer, expert)
            dropped += [expert_name(table.layer, expert) for expert in sorted(before - after)]
            layouts.append(layout)
        return _Prepared(
            version=rebalance.version,
            layouts=tuple(layouts),
            added=added,
            dropped=tuple(dropped),
        )
