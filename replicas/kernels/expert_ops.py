"""What a set of kernels is told about the routed experts that it may compute in one call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertSet:
    """The routed experts of one layer that this rank holds; their tensors stay as they are.

    The tensors are named as in `moe.experts`: gate and up are one weight. The activation is
    silu(gate) * up, or with a `glu_limit` the clamped one of `MoeSpec`.
    """

    tensors: tuple[Mapping[str, torch.Tensor], ...]
    """By slot; at least one."""
    held: tuple[int, ...]
    """Logical expert of each slot."""
    down_bias: bool
    """Whether `down`'s bias, if there is one, is added."""
    glu_limit: float = 0.0
    glu_alpha: float = 1.0

    @property
    def order(self) -> tuple[int, ...]:
        """The slots in ascending order of their experts."""
        return tuple(sorted(range(len(self.held)), key=self.held.__getitem__))
