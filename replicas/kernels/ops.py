"""What layers ask of a set of kernels. `TorchKernels` is the oracle of every other one.

A set also decides how linear weights lie in memory: `pack` makes the tensors that stand for one
weight in a unit. Weights that were not packed (streamed ones) work with every set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from moe.experts import GroupedExperts
    from moe.spec import GateSpec
    from replicas.kernels.expert_ops import ExpertSet


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadShape:
    """Local heads of a fused q/k/v row, and the epsilon of their norms, if there are any."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadTensors:
    """What turns fused projections into queries and keys; absent parts are left out."""

    query_norm_P: torch.Tensor | None = None
    key_norm_P: torch.Tensor | None = None
    cos_sin: tuple[torch.Tensor, torch.Tensor] | None = None
    """(T, 1, P) each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpNames:
    """A gated MLP's tensors in its unit; gate and up are one weight."""

    up: str
    up_bias: str
    down: str
    down_bias: str | None
    """None: the bias is not to be added, because this is one rank's part of a sum."""


class Kernels(Protocol):
    """Elementary operations on packed rows (T, ...)."""

    name: str

    @property
    def on_host(self) -> Kernels:
        """What computes with this set's weights where they lie in host memory."""
        ...

    def pack(self, name: str, weight_OI: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors that stand for the linear weight `name` in its unit."""
        ...

    def linear(
        self,
        input_TI: torch.Tensor,
        tensors: Mapping[str, torch.Tensor],
        name: str,
        bias_O: torch.Tensor | None = None,
        *,
        wide: bool = False,
    ) -> torch.Tensor:
        """input W^T + bias with the weight `name` of a unit, (T, O).

        Args:
            wide: fp32 output, for logits.
        """
        ...

    def embedding(
        self, ids_T: torch.Tensor, tensors: Mapping[str, torch.Tensor], name: str
    ) -> torch.Tensor:
        """Rows `ids` of the table `name`, (T, D)."""
        ...

    def rms_norm(self, hidden: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
        """hidden / rms(hidden) * weight, the mean of squares in fp32; same shape and dtype."""
        ...

    def add_rms_norm(
        self, hidden_TD: torch.Tensor, delta_TD: torch.Tensor, weight_D: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden + delta, and the RMS norm of that."""
        ...

    def prepare_heads(
        self, fused_TX: torch.Tensor, shape: HeadShape, tensors: HeadTensors
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries (T, H, P), keys and values (T, G, P) of fused projections: normed, rotated.

        May work in place: `fused_TX` is not to be used afterwards.
        """
        ...

    def silu_mul(self, gate_up_TF: torch.Tensor) -> torch.Tensor:
        """silu(first half of a row) * second half, (T, F / 2)."""
        ...

    def gelu(self, input_TF: torch.Tensor, *, with_tanh: bool) -> torch.Tensor:
        """GELU of every value, by its error function or by tanh; same shape."""
        ...

    def silu_mlp(
        self, input_TD: torch.Tensor, tensors: Mapping[str, torch.Tensor], names: MlpNames
    ) -> torch.Tensor:
        """down(silu(gate(x)) * up(x)), (T, D); the same bits as the three calls one by one."""
        ...

    def route(
        self, logits_TE: torch.Tensor, spec: GateSpec, bias_E: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Experts (T, K) int64 and weights (T, K) fp32 of every token; see `moe.gating.route`."""
        ...

    def experts(self, experts: ExpertSet) -> GroupedExperts | None:
        """Routed experts as one call, with the roundings of `linear` and `silu_mul` one by one.

        The compiled kernels add up in the same order too, to the same bits. None: this set has no
        such call for them.
        """
        ...
