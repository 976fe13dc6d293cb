"""Linear weights in fp8 (e4m3): a scale per output feature, inputs quantised row by row.

Hopper's tensor cores multiply fp8 at twice the rate of bf16 and read half the bytes; the product of
codes is scaled by (input row, output feature) in the epilogue (`torch._scaled_mm`, row-wise). It is
not exact: 3 bits of mantissa are left. Where the device has no such multiplication the codes are
widened first, which gives the same numbers up to the order of summation and is what tests compare.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch.nn import functional

from replicas.kernels.fp8_layout import fits_fp8

_CODES = ".fp8"
_SCALES = ".fp8_scales"
_DTYPE = torch.float8_e4m3fn

QuantiseRows = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class Fp8Weights:
    """Packs and multiplies fp8 weights.

    Args:
        quantise_rows: (T, I) -> codes (T, I), scales (T, 1).
    """

    def __init__(self, quantise_rows: QuantiseRows) -> None:
        self._quantise_rows = quantise_rows

    def pack(self, name: str, weight_OI: torch.Tensor) -> dict[str, torch.Tensor]:
        """Codes and scales under names of their own; a weight without whole tiles stays plain."""
        if not fits_fp8(weight_OI.shape):
            return {name: weight_OI}
        codes_OI, scales_O1 = quantise_rows(weight_OI)
        return {
            name: torch.empty(weight_OI.shape, dtype=weight_OI.dtype, device="meta"),
            name + _CODES: codes_OI,
            name + _SCALES: scales_O1,
        }

    @staticmethod
    def holds(tensors: Mapping[str, torch.Tensor], name: str) -> bool:
        """Whether the weight `name` of a unit is stored in fp8."""
        return name + _CODES in tensors

    def linear(
        self,
        input_TI: torch.Tensor,
        tensors: Mapping[str, torch.Tensor],
        name: str,
        bias_O: torch.Tensor | None,
        *,
        wide: bool,
    ) -> torch.Tensor:
        """input W^T + bias, (T, O), in the input's dtype, or fp32 when `wide`."""
        codes_OI, scales_O1 = tensors[name + _CODES], tensors[name + _SCALES]
        rows_TI, scales_T1 = self._quantise_rows(input_TI.contiguous())
        if codes_OI.is_cuda:
            product_TO = torch._scaled_mm(
                rows_TI,
                codes_OI.t(),
                scale_a=scales_T1,
                scale_b=scales_O1.t(),
                # Row-wise scaling writes bf16 only; the model's dtype is made of that.
                out_dtype=torch.bfloat16,
            )
        else:
            product_TO = functional.linear(rows_TI.float(), codes_OI.float())
            product_TO = product_TO * scales_T1 * scales_O1.t()
        output_TO = product_TO.to(torch.float32 if wide else input_TI.dtype)
        return output_TO if bias_O is None else output_TO + bias_O

    def embedding(
        self, ids_T: torch.Tensor, tensors: Mapping[str, torch.Tensor], name: str
    ) -> torch.Tensor:
        """Rows of a table that is stored in fp8 because it is the head too."""
        codes_TI = tensors[name + _CODES].view(torch.uint8)[ids_T].view(_DTYPE)
        wide_TI = codes_TI.float() * tensors[name + _SCALES][ids_T]
        return wide_TI.to(tensors[name].dtype)


def quantise_rows(rows_TI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp8 codes (T, I), fp32 scales (T, 1): a row's largest value becomes the largest code."""
    wide_TI = rows_TI.float()
    largest = torch.finfo(_DTYPE).max
    scales_T1 = (wide_TI.abs().amax(dim=1, keepdim=True) / largest).clamp_min(1e-12)
    return (wide_TI / scales_T1).to(_DTYPE), scales_T1
