"""Rows per (layer, expert), as the dispatch plans count them: what placement and metrics read.

Counts come free with every dispatch. They are kept as an average that forgets: a window of `rows`
routed rows weighs half as much as the one after it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cluster.base.errors import ConfigError

Counts = npt.NDArray[np.float64]


class LoadStats:
    """Recent load of each expert of each layer.

    Args:
        num_layers: mixture layers.
        num_experts: logical experts per layer; layers with fewer leave the rest at zero.
        half_life_rows: routed rows of one layer after which a count weighs half.

    Raises:
        ConfigError: a size below one.
    """

    def __init__(self, num_layers: int, num_experts: int, *, half_life_rows: float) -> None:
        if num_layers < 1 or num_experts < 1 or half_life_rows <= 0:
            raise ConfigError(
                f"No load can be kept of {num_layers} layers with {num_experts} experts over "
                f"{half_life_rows} rows."
            )
        self._half_life_rows = half_life_rows
        self._load_LE: Counts = np.zeros((num_layers, num_experts))
        self.total_rows = 0.0
        """Routed rows of all layers since the start."""

    @property
    def load(self) -> Counts:
        """A copy of the current averages, (layers, experts), in rows per half-life."""
        return self._load_LE.copy()

    def add(self, counts_LE: Counts) -> None:
        """Take in the rows of a step (or of several).

        Raises:
            ConfigError: the shape is not (layers, experts), or a count is negative.
        """
        if counts_LE.shape != self._load_LE.shape or (counts_LE < 0).any():
            raise ConfigError(f"Counts of shape {counts_LE.shape} do not fit this group's load.")
        rows = float(counts_LE.sum())
        self.total_rows += rows
        per_layer = rows / len(self._load_LE)
        self._load_LE *= 0.5 ** (per_layer / self._half_life_rows)
        self._load_LE += counts_LE
