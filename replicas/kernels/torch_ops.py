"""The kernels written in torch: every device, every dtype; what other sets are tested against."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import functional

from cluster.base.errors import InternalError
from moe.experts import GroupedExperts
from moe.gating import route
from moe.spec import GateSpec
from replicas.kernels.expert_ops import ExpertSet
from replicas.kernels.ops import HeadShape, HeadTensors, Kernels, MlpNames


class TorchKernels:
    """Implements `Kernels`; stateless."""

    name = "torch"

    @property
    def on_host(self) -> TorchKernels:
        """See `Kernels.on_host`: torch computes wherever tensors are."""
        return self

    def pack(self, name: str, weight_OI: torch.Tensor) -> dict[str, torch.Tensor]:
        """The weight as it is."""
        return {name: weight_OI}

    def linear(
        self,
        input_TI: torch.Tensor,
        tensors: Mapping[str, torch.Tensor],
        name: str,
        bias_O: torch.Tensor | None = None,
        *,
        wide: bool = False,
    ) -> torch.Tensor:
        """See `Kernels.linear`; `wide` widens what the model's dtype has rounded."""
        output_TO = functional.linear(input_TI, _plain(tensors[name], name), bias_O)
        return output_TO.float() if wide else output_TO

    def embedding(
        self, ids_T: torch.Tensor, tensors: Mapping[str, torch.Tensor], name: str
    ) -> torch.Tensor:
        """See `Kernels.embedding`."""
        return functional.embedding(ids_T, _plain(tensors[name], name))

    def rms_norm(self, hidden: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
        """See `Kernels.rms_norm`; the product with the weight is in the model's dtype."""
        wide = hidden.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return weight_D * (wide * scale).to(hidden.dtype)

    def add_rms_norm(
        self, hidden_TD: torch.Tensor, delta_TD: torch.Tensor, weight_D: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Kernels.add_rms_norm`."""
        total_TD = hidden_TD + delta_TD
        return total_TD, self.rms_norm(total_TD, weight_D, eps)

    def prepare_heads(
        self, fused_TX: torch.Tensor, shape: HeadShape, tensors: HeadTensors
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `Kernels.prepare_heads`."""
        query_THP, key_TGP, value_TGP = split_heads(fused_TX, shape)
        if tensors.query_norm_P is not None:
            query_THP = self.rms_norm(query_THP, tensors.query_norm_P, shape.norm_eps)
        if tensors.key_norm_P is not None:
            key_TGP = self.rms_norm(key_TGP, tensors.key_norm_P, shape.norm_eps)
        if tensors.cos_sin is not None:
            query_THP = rotate(query_THP, *tensors.cos_sin)
            key_TGP = rotate(key_TGP, *tensors.cos_sin)
        return query_THP, key_TGP, value_TGP

    def silu_mul(self, gate_up_TF: torch.Tensor) -> torch.Tensor:
        """See `Kernels.silu_mul`."""
        gate_TF, up_TF = gate_up_TF.chunk(2, dim=-1)
        return functional.silu(gate_TF) * up_TF

    def gelu(self, input_TF: torch.Tensor, *, with_tanh: bool) -> torch.Tensor:
        """See `Kernels.gelu`."""
        return functional.gelu(input_TF, approximate="tanh" if with_tanh else "none")

    def silu_mlp(
        self, input_TD: torch.Tensor, tensors: Mapping[str, torch.Tensor], names: MlpNames
    ) -> torch.Tensor:
        """See `Kernels.silu_mlp`."""
        return silu_mlp_in_steps(self, input_TD, tensors, names)

    def route(
        self, logits_TE: torch.Tensor, spec: GateSpec, bias_E: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Kernels.route`."""
        return route(logits_TE, spec, bias_E)

    def experts(self, experts: ExpertSet) -> GroupedExperts | None:
        """See `Kernels.experts`; one by one."""
        return None


def silu_mlp_in_steps(
    kernels: Kernels,
    input_TD: torch.Tensor,
    tensors: Mapping[str, torch.Tensor],
    names: MlpNames,
) -> torch.Tensor:
    """What `Kernels.silu_mlp` means, for sets that have nothing faster."""
    gate_up_TF = kernels.linear(input_TD, tensors, names.up, tensors.get(names.up_bias))
    bias_D = None if names.down_bias is None else tensors.get(names.down_bias)
    return kernels.linear(kernels.silu_mul(gate_up_TF), tensors, names.down, bias_D)


def rotate(heads_THP: torch.Tensor, cos_T1P: torch.Tensor, sin_T1P: torch.Tensor) -> torch.Tensor:
    """Rotate each pair (x[i], x[i + P/2]) by its angle; a new tensor of the same shape."""
    first, second = heads_THP.chunk(2, dim=-1)
    return heads_THP * cos_T1P + torch.cat((-second, first), dim=-1) * sin_T1P


def split_heads(
    fused_TX: torch.Tensor, shape: HeadShape
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views of the query, key and value heads of fused rows."""
    heads, kv_heads = shape.num_heads, shape.num_kv_heads
    split = fused_TX.view(fused_TX.shape[0], heads + 2 * kv_heads, shape.head_dim)
    query_THP, key_TGP, value_TGP = torch.split(split, [heads, kv_heads, kv_heads], dim=1)
    return query_THP, key_TGP, value_TGP


def _plain(weight: torch.Tensor, name: str) -> torch.Tensor:
    """A weight that other kernels packed has no bytes here, and torch would not say so."""
    if weight.is_meta:
        raise InternalError(f"The weight {name} was packed for other kernels.")
    return weight


TORCH_KERNELS = TorchKernels()
