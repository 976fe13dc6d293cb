"""The kernels of a GPU: Triton for what happens on rows, cuBLAS for linears, fp8 when asked for.

`TorchKernels` is the oracle. On the CPU this set runs only in Triton's interpreter, for tests.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

import torch

from cluster.base.env import triton_interpreter
from cluster.base.errors import InternalError
from moe.experts import GroupedExperts
from moe.spec import GateSpec
from replicas.kernels.expert_ops import ExpertSet
from replicas.kernels.fp8 import Fp8Weights
from replicas.kernels.ops import HeadShape, HeadTensors, Kernels, MlpNames
from replicas.kernels.torch_ops import TORCH_KERNELS, silu_mlp_in_steps, split_heads
from replicas.kernels.triton_experts import TritonExperts

# A row of a norm is held by one program; beyond this it would spill its registers.
_MAX_ROW = 32768
_GATE_STRETCH = 1024
FP8_SINCE = 89
"""CUDA architecture (compute capability x 10) from which tensor cores multiply e4m3."""
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class TritonKernels:
    """Implements `Kernels`; stateless but for how linears are stored.

    Args:
        fp8: hold linear weights in fp8 (e4m3) with a scale per output feature, and quantise their
            inputs row by row; about half the bytes per token, and no longer exact.
    """

    def __init__(self, *, fp8: bool = False) -> None:
        # The kernels import Triton, which many machines do not have: only who asks for it pays.
        from replicas.kernels.gpu import row_kernels

        self.name = "triton, fp8" if fp8 else "triton"
        self._programs = row_kernels
        self._fp8 = Fp8Weights(self._quantise_rows) if fp8 else None

    @property
    def on_host(self) -> Kernels:
        """See `Kernels.on_host`; other sums, so other last bits.

        Raises:
            InternalError: fp8 weights are not computed with there.
        """
        if self._fp8 is not None:
            raise InternalError("Fp8 weights cannot be computed with on the host.")
        return TORCH_KERNELS

    @staticmethod
    def why_not(dtype: torch.dtype, device: str, *, fp8: bool = False) -> list[str]:
        """All reasons why this set cannot serve a model; empty when it can."""
        reasons = []
        if importlib.util.find_spec("triton") is None:
            reasons.append("triton is not installed")
        if device.split(":")[0] == "cpu" and not triton_interpreter():
            reasons.append(f"it runs on cuda tensors, not on {device}")
        if dtype not in _DTYPES:
            reasons.append(f"it does not know {dtype}")
        if fp8 and not reasons and (arch := _cuda_arch()) is not None and arch < FP8_SINCE:
            reasons.append(f"fp8 needs CUDA architecture {FP8_SINCE} or newer, this is {arch}")
        return reasons

    def pack(self, name: str, weight_OI: torch.Tensor) -> dict[str, torch.Tensor]:
        """The weight as it is, or its fp8 codes and scales."""
        return self._fp8.pack(name, weight_OI) if self._fp8 else {name: weight_OI}

    def linear(
        self,
        input_TI: torch.Tensor,
        tensors: Mapping[str, torch.Tensor],
        name: str,
        bias_O: torch.Tensor | None = None,
        *,
        wide: bool = False,
    ) -> torch.Tensor:
        """See `Kernels.linear`."""
        if self._fp8 and self._fp8.holds(tensors, name):
            return self._fp8.linear(input_TI, tensors, name, bias_O, wide=wide)
        return TORCH_KERNELS.linear(input_TI, tensors, name, bias_O, wide=wide)

    def embedding(
        self, ids_T: torch.Tensor, tensors: Mapping[str, torch.Tensor], name: str
    ) -> torch.Tensor:
        """See `Kernels.embedding`; a table that is also the head may lie in fp8."""
        if self._fp8 and self._fp8.holds(tensors, name):
            return self._fp8.embedding(ids_T, tensors, name)
        return TORCH_KERNELS.embedding(ids_T, tensors, name)

    def rms_norm(self, hidden: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
        """See `Kernels.rms_norm`."""
        return self._norm(hidden.contiguous(), None, weight_D, eps)[1]

    def add_rms_norm(
        self, hidden_TD: torch.Tensor, delta_TD: torch.Tensor, weight_D: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Kernels.add_rms_norm`."""
        return self._norm(hidden_TD.contiguous(), delta_TD.contiguous(), weight_D, eps)

    def prepare_heads(
        self, fused_TX: torch.Tensor, shape: HeadShape, tensors: HeadTensors
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `Kernels.prepare_heads`; in place, the results are views."""
        normed = tensors.query_norm_P is not None
        if tensors.cos_sin is None and not normed:
            return TORCH_KERNELS.prepare_heads(fused_TX, shape, tensors)
        fused_TX = fused_TX.contiguous()
        cos_T1P, sin_T1P = tensors.cos_sin or (fused_TX, fused_TX)
        self._programs.prepare_heads_kernel[
            (fused_TX.shape[0], shape.num_heads + shape.num_kv_heads)
        ](
            fused_TX,
            tensors.query_norm_P if normed else fused_TX,
            tensors.key_norm_P if normed else fused_TX,
            cos_T1P.contiguous(),
            sin_T1P.contiguous(),
            fused_TX.stride(0),
            shape.norm_eps,
            HEADS=shape.num_heads,
            DIM=shape.head_dim,
            HALF=_power_of_two(shape.head_dim // 2),
            NORMED=normed,
            ROTATED=tensors.cos_sin is not None,
        )
        return split_heads(fused_TX, shape)

    def silu_mul(self, gate_up_TF: torch.Tensor) -> torch.Tensor:
        """See `Kernels.silu_mul`."""
        gate_up_TF = gate_up_TF.contiguous()
        num_rows, width = gate_up_TF.shape[0], gate_up_TF.shape[1] // 2
        output_TF = gate_up_TF.new_empty((num_rows, width))
        grid = (num_rows, -(-width // _GATE_STRETCH))
        self._programs.silu_mul_kernel[grid](gate_up_TF, output_TF, width, WIDTH=_GATE_STRETCH)
        return output_TF

    def gelu(self, input_TF: torch.Tensor, *, with_tanh: bool) -> torch.Tensor:
        """See `Kernels.gelu`; torch's."""
        return TORCH_KERNELS.gelu(input_TF, with_tanh=with_tanh)

    def silu_mlp(
        self, input_TD: torch.Tensor, tensors: Mapping[str, torch.Tensor], names: MlpNames
    ) -> torch.Tensor:
        """See `Kernels.silu_mlp`; step by step."""
        return silu_mlp_in_steps(self, input_TD, tensors, names)

    def route(
        self, logits_TE: torch.Tensor, spec: GateSpec, bias_E: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Kernels.route`; torch's."""
        return TORCH_KERNELS.route(logits_TE, spec, bias_E)

    def experts(self, experts: ExpertSet) -> GroupedExperts | None:
        """See `Kernels.experts`; for weights that are stored plainly."""
        return None if TritonExperts.why_not(experts) else TritonExperts(experts)

    def _norm(
        self, hidden: torch.Tensor, delta: torch.Tensor | None, weight_D: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        width = hidden.shape[-1]
        if width > _MAX_ROW:
            if delta is None:
                return hidden, TORCH_KERNELS.rms_norm(hidden, weight_D, eps)
            return TORCH_KERNELS.add_rms_norm(hidden, delta, weight_D, eps)
        total = hidden if delta is None else torch.empty_like(hidden)
        output = torch.empty_like(hidden)
        self._programs.add_rms_norm_kernel[(hidden.numel() // width,)](
            hidden,
            hidden if delta is None else delta,
            weight_D,
            total,
            output,
            width,
            eps,
            HAS_DELTA=delta is not None,
            WIDTH=_power_of_two(width),
        )
        return total, output

    def _quantise_rows(self, rows_TI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """fp8 codes (T, I) and fp32 scales (T, 1) of a contiguous input."""
        codes_TI = torch.empty_like(rows_TI, dtype=torch.float8_e4m3fn)
        scales_T1 = rows_TI.new_empty((rows_TI.shape[0], 1), dtype=torch.float32)
        width = rows_TI.shape[1]
        self._programs.quantise_rows_kernel[(rows_TI.shape[0],)](
            rows_TI,
            codes_TI,
            scales_T1,
            width,
            torch.finfo(torch.float8_e4m3fn).max,
            WIDTH=_power_of_two(width),
        )
        return codes_TI, scales_T1


def _power_of_two(value: int) -> int:
    return 1 << max(0, value - 1).bit_length()


def _cuda_arch() -> int | None:
    """What Triton compiles for; None in its interpreter."""
    if triton_interpreter():
        return None
    from triton.runtime import driver

    return int(driver.active.get_current_target().arch)
