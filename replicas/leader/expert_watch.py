"""What a leader knows of its experts: rows per layer and expert, and how evenly the ranks work.

Fed with the ranks' own totals about once a second, off the path of any step. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from moe.expert_table import ExpertTable
from moe.load_stats import LoadStats
from replicas.leader.record import ExpertLayerRecord, ExpertRecord

# Of one layer: what "lately" means in imbalance and balancing.
HALF_LIFE_ROWS = 200_000.0

Counts = npt.NDArray[np.float64]


class ExpertWatch:
    """The load of all mixture layers of one replica.

    Args:
        tables: of all mixture layers, anywhere in their history.
        half_life_rows: rows of one layer after which a count weighs half.
    """

    def __init__(
        self, tables: Sequence[ExpertTable], *, half_life_rows: float = HALF_LIFE_ROWS
    ) -> None:
        self._num_experts = {table.layer: table.slots.num_experts for table in tables}
        shape = (len(tables), max(self._num_experts.values()))
        self._stats = LoadStats(*shape, half_life_rows=half_life_rows)
        self._totals: Counts = np.zeros(shape)
        self._counted: Counts = np.zeros(shape)
        self._num_dropped = self._dropped_counted = 0

    def add(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Take in the newest `ExpertState` fields of all ranks."""
        totals: Counts = np.zeros_like(self._counted)
        for state in states:
            for index, rows in enumerate(state["rows"]):
                totals[index, : len(rows)] += rows
        # The counts of a rank that is lost, or replaced, are lost with it: sums never fall.
        added = np.maximum(totals - self._counted, 0.0)
        self._stats.add(added)
        self._totals += added
        self._counted = totals
        dropped = sum(int(state["num_dropped"]) for state in states)
        self._num_dropped += max(0, dropped - self._dropped_counted)
        self._dropped_counted = dropped

    def loads(self) -> dict[int, Counts]:
        """Recent rows per expert of each layer."""
        load_LE = self._stats.load
        return {
            layer: load_LE[index, :count]
            for index, (layer, count) in enumerate(self._num_experts.items())
        }

    def record(self, tables: Mapping[int, ExpertTable]) -> ExpertRecord:
        """The load as it is reported, with the placement in use."""
        loads = self.loads()
        layers = tuple(
            ExpertLayerRecord(
                layer=layer,
                rows=tuple(int(rows) for rows in self._totals[index, : len(loads[layer])]),
                imbalance=round(_imbalance(tables[layer], loads[layer]), 4),
            )
            for index, layer in enumerate(self._num_experts)
        )
        return ExpertRecord(layers=layers, num_dropped=self._num_dropped)


def _imbalance(table: ExpertTable, load_E: Counts) -> float:
    return table.placement().imbalance(load_E, len(table.logical_by_rank))
