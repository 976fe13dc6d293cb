"""Tensor-parallel linears and the MLPs made of them (Megatron-LM, arXiv 1909.08053, section 3).

Layers are plain objects: they hold shapes and the communicator, never weights. `forward` takes the
tensors of the acquired unit and finds its own by name; how those were cut is in `shards.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch.nn import functional

from cluster.dist.communicator import Communicator
from replicas.kernels.ops import Kernels, MlpNames
from replicas.kernels.torch_ops import TORCH_KERNELS
from replicas.layers.activations import kernel_activation


class ColumnLinear:
    """Output features split over ranks: no communication, the output stays local."""

    def __init__(self, name: str, kernels: Kernels = TORCH_KERNELS) -> None:
        self._kernels = kernels
        self._weight = f"{name}.weight"
        self._bias = f"{name}.bias"

    def forward(self, input_TD: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """This rank's features, (T, local out)."""
        return self._kernels.linear(input_TD, tensors, self._weight, tensors.get(self._bias))


class RowLinear:
    """Input features split over ranks: partial sums are added up over the axis."""

    def __init__(
        self, name: str, communicator: Communicator, kernels: Kernels = TORCH_KERNELS
    ) -> None:
        self._kernels = kernels
        self._weight = f"{name}.weight"
        self._bias = f"{name}.bias"
        self._communicator = communicator

    def forward(self, input_TF: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The whole output, (T, D), the same on every rank."""
        if self._communicator.size == 1:
            return self._kernels.linear(input_TF, tensors, self._weight, tensors.get(self._bias))
        return self.complete(self._kernels.linear(input_TF, tensors, self._weight), tensors)

    def complete(
        self, partial_TD: torch.Tensor, tensors: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """The whole output of what the ranks computed without the bias."""
        bias = tensors.get(self._bias)
        output_TD = self._communicator.all_reduce(partial_TD)
        # The bias belongs to the sum, so it is added after it, once.
        return output_TD if bias is None else output_TD + bias


class GatedMlp:
    """down(act(gate(x)) * up(x)), gate and up fused in one linear (Shazeer, arXiv 2002.05202)."""

    def __init__(
        self,
        activation: Callable[[torch.Tensor], torch.Tensor],
        communicator: Communicator,
        kernels: Kernels = TORCH_KERNELS,
    ) -> None:
        self._kernels = kernels
        self._activation = activation
        self._up = ColumnLinear("up", kernels)
        self._down = RowLinear("down", communicator, kernels)
        self._is_whole = communicator.size == 1
        self._names = MlpNames(
            up="up.weight",
            up_bias="up.bias",
            down="down.weight",
            down_bias="down.bias" if self._is_whole else None,
        )

    def forward(self, hidden_TD: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """MLP output, (T, D)."""
        if self._activation is functional.silu:
            output_TD = self._kernels.silu_mlp(hidden_TD, tensors, self._names)
            return output_TD if self._is_whole else self._down.complete(output_TD, tensors)
        gate_up_TF = self._up.forward(hidden_TD, tensors)
        gate_TF, up_TF = gate_up_TF.chunk(2, dim=-1)
        return self._down.forward(self._activation(gate_TF) * up_TF, tensors)


class PlainMlp:
    """down(act(up(x))), `activation` by its name."""

    def __init__(
        self, activation: str, communicator: Communicator, kernels: Kernels = TORCH_KERNELS
    ) -> None:
        self._activation = kernel_activation(activation, kernels)
        self._up = ColumnLinear("up", kernels)
        self._down = RowLinear("down", communicator, kernels)

    def forward(self, hidden_TD: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """MLP output, (T, D)."""
        return self._down.forward(self._activation(self._up.forward(hidden_TD, tensors)), tensors)
