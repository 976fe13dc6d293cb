"""A mixture block on kernels and weight units: what `moe` asks for, in the engine's terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from moe.experts import GroupedExperts, Made, Make, Tensors
from replicas.kernels.expert_ops import ExpertSet
from replicas.layers.activations import activation, kernel_activation
from replicas.layers.weights import AnnouncedWeights, ForeseeingWeights, ResidentWeights

if TYPE_CHECKING:
    from moe.block import MixtureBlock
    from moe.spec import MoeSpec
    from replicas.kernels.ops import Kernels
    from replicas.layers.weights import WeightProvider

Gate = Callable[[torch.Tensor], torch.Tensor]
"""Fused gate and up halves of rows -> their product."""


def gated(kernels: Kernels, name: str) -> Gate:
    """act(first half) * second half, with the activation a config calls `name`."""
    inner = activation(name)
    if inner is functional.silu:
        return kernels.silu_mul

    def product(gate_up_TF: torch.Tensor) -> torch.Tensor:
        gate_TF, up_TF = gate_up_TF.chunk(2, dim=-1)
        return inner(gate_TF) * up_TF

    return product


def between(kernels: Kernels, spec: MoeSpec, name: str) -> Gate:
    """What stands between the two linears of an MLP of the mixture."""
    return gated(kernels, name) if spec.gated else kernel_activation(name, kernels)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClampedGlu:
    """(up + 1) * gate * sigmoid(alpha * gate), both clamped first (GPT-OSS, arXiv 2508.10925).

    Computed as (up + 1) * silu(alpha * gate) / alpha.
    """

    kernels: Kernels
    limit: float
    alpha: float

    def __call__(self, gate_up_TF: torch.Tensor) -> torch.Tensor:
        """The product of the two halves of each row, (T, F / 2)."""
        gate_TF, up_TF = gate_up_TF.chunk(2, dim=-1)
        gate_TF = gate_TF.clamp(max=self.limit) * self.alpha
        up_TF = up_TF.clamp(-self.limit, self.limit) + 1
        return self.kernels.silu_mul(torch.cat((gate_TF, up_TF), dim=-1)) / self.alpha


class KernelMath:
    """`ExpertMath` on a set of kernels.

    Args:
        activation_name: the model's own; experts of a spec with a `glu_limit` have another.
    """

    def __init__(self, kernels: Kernels, spec: MoeSpec, activation_name: str) -> None:
        self._kernels = kernels
        self._spec = spec
        self._activation_name = activation_name
        silu = bool(spec.glu_limit) or activation(activation_name) is functional.silu
        self._in_one_call = silu and spec.gated
        self.linear = kernels.linear
        self.route = kernels.route
        self.gate: Gate = between(kernels, spec, activation_name)
        if spec.glu_limit:
            self.gate = ClampedGlu(kernels=kernels, limit=spec.glu_limit, alpha=spec.glu_alpha)

    @cached_property
    def on_host(self) -> KernelMath:
        """See `ExpertMath.on_host`."""
        kernels = self._kernels.on_host
        if kernels is self._kernels:
            return self
        return KernelMath(kernels, self._spec, self._activation_name)

    def grouped(
        self, experts: Sequence[Tensors], held: Sequence[int], *, down_bias: bool
    ) -> GroupedExperts | None:
        """The experts as one call, where the kernels have one for their activation and layout."""
        if not self._in_one_call or not experts:
            return None
        return self._kernels.experts(
            ExpertSet(
                tensors=tuple(experts),
                held=tuple(held),
                down_bias=down_bias,
                glu_limit=self._spec.glu_limit,
                glu_alpha=self._spec.glu_alpha,
            )
        )


class SharedExperts:
    """The MLP that every token visits: this rank's slice of it, not yet summed over ranks.

    Args:
        adds_bias: whether this rank adds the bias of `down`, if there is one: one of them does.
    """

    def __init__(
        self, kernels: Kernels, spec: MoeSpec, activation_name: str, *, adds_bias: bool
    ) -> None:
        self._kernels = kernels
        self._inner = between(kernels, spec, activation_name)
        self._adds_bias = adds_bias

    def __call__(
        self, hidden_TD: torch.Tensor, tensors: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """Partial output, (T, D) fp32."""
        up_bias_F = tensors.get("up.bias")
        down_bias_D = tensors.get("down.bias") if self._adds_bias else None
        up_TF = self._kernels.linear(hidden_TD, tensors, "up.weight", up_bias_F)
        inner_TF = self._inner(up_TF)
        return self._kernels.linear(inner_TF, tensors, "down.weight", down_bias_D, wide=True)


class Foresight:
    """What a layer's mixture will probably visit, seen from the layer before it.

    Args:
        norm: the one before the mixture; hidden states and the layer's tensors -> normed.
    """

    def __init__(
        self, layer: int, norm: Callable[[torch.Tensor, Tensors], torch.Tensor], block: MixtureBlock
    ) -> None:
        self._layer = f"layer.{layer}"
        self._norm = norm
        self._block = block

    def tell(self, hidden_TD: torch.Tensor, weights: WeightProvider) -> None:
        """Let the provider read early what the mixture's gate makes of the residual stream, (T, D),
        which the rest of this layer and the attention in between have yet to change."""
        if isinstance(weights, ForeseeingWeights):
            weights.foresee(
                self._layer,
                lambda tensors: self._block.likely(self._norm(hidden_TD, tensors), tensors),
            )


class ExpertUnits:
    """`ExpertWeights` of one layer from a provider of units.

    Args:
        announced: called when the layer's own experts have been announced.
    """

    def __init__(
        self, weights: WeightProvider, layer: int, announced: Callable[[], None] | None = None
    ) -> None:
        self._weights = weights
        self._prefix = f"layer.{layer}.expert."
        self._announced = announced

    def acquire(self, expert: int) -> Mapping[str, torch.Tensor]:
        """The expert's tensors, valid until released."""
        return self._weights.acquire(f"{self._prefix}{expert}")

    def announce(self, experts: Sequence[int], rows: Sequence[int]) -> Sequence[int]:
        """See `ExpertWeights.announce`."""
        order: Sequence[int] = range(len(experts))
        if isinstance(self._weights, AnnouncedWeights):
            order = self._weights.announce([f"{self._prefix}{expert}" for expert in experts], rows)
        if self._announced is not None:
            self._announced()
        return order

    def release(self, expert: int) -> None:
        """The step is done with this expert."""
        self._weights.release(f"{self._prefix}{expert}")

    def lasting(self, held: tuple[int, ...], make: Make[Made]) -> Made | None:
        """See `ExpertWeights.lasting`; streamed experts come and go."""
        if not isinstance(self._weights, ResidentWeights):
            return None
        return self._weights.derived(
            make, held, lambda: make([self.acquire(expert) for expert in held], held)
        )
