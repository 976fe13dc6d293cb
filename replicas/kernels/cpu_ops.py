"""The kernels on the compiled library: bf16 and fp32 on the CPU.

A row's bits depend neither on the rows beside it nor on the number of threads. A packed weight is
two tensors of its unit: `name`, an empty one on the meta device that tells its shape, and
`name.packed`, the bytes. A weight that was not packed goes to torch.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from moe.experts import GroupedExperts
from moe.spec import GateSpec
from replicas.kernels.cpu_calls import DTYPES
from replicas.kernels.cpu_experts import CpuExperts
from replicas.kernels.cpu_gates import CpuGates
from replicas.kernels.cpu_gelu import CpuGelu
from replicas.kernels.expert_ops import ExpertSet
from replicas.kernels.loader import PACKED, CpuLibrary, PackedLinear
from replicas.kernels.ops import HeadShape, HeadTensors, MlpNames
from replicas.kernels.torch_ops import TORCH_KERNELS, silu_mlp_in_steps, split_heads


class CpuKernels:
    """Implements `Kernels` on one library."""

    name = "cpu"

    def __init__(self, library: CpuLibrary) -> None:
        self.library = library
        self._gates = CpuGates(library)
        self._gelu = CpuGelu(library)

    @property
    def on_host(self) -> CpuKernels:
        """See `Kernels.on_host`."""
        return self

    @staticmethod
    def why_not(dtype: torch.dtype, device: str) -> list[str]:
        """All reasons why these kernels cannot serve a model; empty when they can."""
        reasons = []
        if device.split(":")[0] != "cpu":
            reasons.append(f"they run on cpu tensors, not on {device}")
        if dtype not in DTYPES:
            reasons.append(f"they know float32 and bfloat16, not {dtype}")
        return reasons

    def pack(self, name: str, weight_OI: torch.Tensor) -> dict[str, torch.Tensor]:
        """The weight in the library's block layout; the caller should drop the original."""
        return {
            name: torch.empty(weight_OI.shape, dtype=weight_OI.dtype, device="meta"),
            name + PACKED: self.library.pack(weight_OI.contiguous()),
        }

    def linear(
        self,
        input_TI: torch.Tensor,
        tensors: Mapping[str, torch.Tensor],
        name: str,
        bias_O: torch.Tensor | None = None,
        *,
        wide: bool = False,
    ) -> torch.Tensor:
        """See `Kernels.linear`; fp32 sums, rounded once."""
        packed = tensors.get(name + PACKED)
        if packed is None:
            return TORCH_KERNELS.linear(input_TI, tensors, name, bias_O, wide=wide)
        shape = tensors[name].shape
        return self.library.linear(input_TI.contiguous(), packed, shape, bias_O, wide=wide)

    def embedding(
        self, ids_T: torch.Tensor, tensors: Mapping[str, torch.Tensor], name: str
    ) -> torch.Tensor:
        """See `Kernels.embedding`; a table that is also the head lies packed."""
        packed = tensors.get(name + PACKED)
        if packed is None:
            return TORCH_KERNELS.embedding(ids_T, tensors, name)
        return self.library.embed(ids_T, packed, tensors[name].shape)

    def rms_norm(self, hidden: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
        """See `Kernels.rms_norm`."""
        if hidden.dim() != 2:
            return TORCH_KERNELS.rms_norm(hidden, weight_D, eps)
        return self.library.rms_norm(hidden.contiguous(), None, weight_D, eps)[1]

    def add_rms_norm(
        self, hidden_TD: torch.Tensor, delta_TD: torch.Tensor, weight_D: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Kernels.add_rms_norm`."""
        return self.library.rms_norm(hidden_TD.contiguous(), delta_TD.contiguous(), weight_D, eps)

    def prepare_heads(
        self, fused_TX: torch.Tensor, shape: HeadShape, tensors: HeadTensors
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `Kernels.prepare_heads`; in place, the results are views."""
        fused_TX = fused_TX.contiguous()
        query_norm_P, key_norm_P, cos_sin = (
            tensors.query_norm_P,
            tensors.key_norm_P,
            tensors.cos_sin,
        )
        if cos_sin is not None or query_norm_P is not None or key_norm_P is not None:
            cos_T1P, sin_T1P = cos_sin or (None, None)
            self.library.calls(fused_TX.dtype).prepare_heads(
                fused_TX.data_ptr(),
                None if query_norm_P is None else query_norm_P.data_ptr(),
                None if key_norm_P is None else key_norm_P.data_ptr(),
                None if cos_T1P is None else cos_T1P.data_ptr(),
                None if sin_T1P is None else sin_T1P.data_ptr(),
                fused_TX.shape[0],
                shape.num_heads,
                shape.num_kv_heads,
                shape.head_dim,
                shape.norm_eps,
                torch.get_num_threads(),
            )
        return split_heads(fused_TX, shape)

    def silu_mul(self, gate_up_TF: torch.Tensor) -> torch.Tensor:
        """See `Kernels.silu_mul`."""
        return self.library.silu_mul(gate_up_TF.contiguous())

    def gelu(self, input_TF: torch.Tensor, *, with_tanh: bool) -> torch.Tensor:
        """See `Kernels.gelu`."""
        return self._gelu.forward(input_TF.contiguous(), with_tanh=with_tanh)

    def silu_mlp(
        self, input_TD: torch.Tensor, tensors: Mapping[str, torch.Tensor], names: MlpNames
    ) -> torch.Tensor:
        """See `Kernels.silu_mlp`; one call when both weights are packed."""
        up, down = tensors.get(names.up + PACKED), tensors.get(names.down + PACKED)
        if up is None or down is None:
            return silu_mlp_in_steps(self, input_TD, tensors, names)
        bias_D = None if names.down_bias is None else tensors.get(names.down_bias)
        return self.library.gated_mlp(
            input_TD.contiguous(),
            PackedLinear(
                packed=up, shape=tensors[names.up].shape, bias_O=tensors.get(names.up_bias)
            ),
            PackedLinear(packed=down, shape=tensors[names.down].shape, bias_O=bias_D),
        )

    def route(
        self, logits_TE: torch.Tensor, spec: GateSpec, bias_E: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Kernels.route`."""
        return self._gates.route(logits_TE, spec, bias_E)

    def experts(self, experts: ExpertSet) -> GroupedExperts | None:
        """See `Kernels.experts`; for packed weights whose halves are whole blocks."""
        if CpuExperts.why_not(self.library, experts):
            return None
        return CpuExperts(self.library, experts)
