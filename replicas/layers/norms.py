"""Normalisations over the last dim; weights come with the unit, replicated on every rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch.nn import functional

from replicas.kernels.ops import Kernels
from replicas.kernels.torch_ops import TORCH_KERNELS


class Norm(Protocol):
    """What a decoder asks of a norm."""

    def forward(self, hidden: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Normalised `hidden`, same shape and dtype."""
        ...


class RmsNorm:
    """x / rms(x) * weight, the mean of squares in fp32 (Zhang and Sennrich, arXiv 1910.07467).

    The product with the weight happens in the model's dtype, as checkpoints were trained.
    """

    def __init__(self, name: str, eps: float, kernels: Kernels = TORCH_KERNELS) -> None:
        self._weight = f"{name}.weight"
        self._eps = eps
        self._kernels = kernels

    def forward(self, hidden: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Normalised `hidden`, same shape and dtype."""
        return self._kernels.rms_norm(hidden, tensors[self._weight], self._eps)

    def add_forward(
        self,
        hidden_TD: torch.Tensor,
        delta_TD: torch.Tensor,
        tensors: Mapping[str, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden + delta, and that normalised, (T, D) each."""
        return self._kernels.add_rms_norm(hidden_TD, delta_TD, tensors[self._weight], self._eps)


class LayerNorm:
    """(x - mean) / std * weight + bias; without affine tensors in the unit, just the first part."""

    def __init__(self, name: str, eps: float) -> None:
        self._weight = f"{name}.weight"
        self._bias = f"{name}.bias"
        self._eps = eps

    def forward(self, hidden: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Normalised `hidden`, same shape and dtype."""
        return functional.layer_norm(
            hidden,
            hidden.shape[-1:],
            tensors.get(self._weight),
            tensors.get(self._bias),
            self._eps,
        )
