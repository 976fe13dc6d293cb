"""The compiled library as typed calls on torch tensors; each call releases the GIL.

A call checks what would otherwise read or write beyond a tensor: dtype, device, layout, shape.
Whether a kernel suits a model is asked elsewhere, once (`why_not`); here a wrong argument is a bug
in this program and raises `InternalError`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cluster.base.errors import InternalError
from replicas.kernels.build import KernelsUnavailableError
from replicas.kernels.cpu_calls import ABI, SUFFIX, Calls, calls_of, typed_function
from replicas.kernels.memory import HugePages, ScratchMemory

PACKED = ".packed"
"""Suffix of the tensor with a packed weight's bytes, in its unit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedLinear:
    """A packed weight (O, I) with its bias."""

    packed: torch.Tensor
    shape: torch.Size
    bias_O: torch.Tensor | None = None


class TilesRefusedError(KernelsUnavailableError):
    """The processor has matrix tiles (AMX) and the system keeps them; build without."""


class CpuLibrary:
    """One loaded library.

    Raises:
        KernelsUnavailableError: it cannot be loaded, or is not what this code expects.
    """

    def __init__(self, path: Path) -> None:
        try:
            library = ctypes.CDLL(str(path))
            if library.pk_abi() != ABI:
                raise KernelsUnavailableError(f"{path} has another interface")
            if not library.pk_start():
                raise TilesRefusedError("the system does not grant matrix tiles")
            self._library = library
            self._calls = {dtype: calls_of(library, suffix) for dtype, suffix in SUFFIX.items()}
            self._linear_wide = typed_function(library, "linear", "bf16_f32")
            library.pk_isa.restype = ctypes.c_char_p
            self.isa: str = library.pk_isa().decode()
            self.width: int = library.pk_block_width()
            self._pages = HugePages()
            self.scratch = ScratchMemory()
        except (OSError, AttributeError) as error:
            raise KernelsUnavailableError(f"{path} cannot be loaded ({error})") from error

    def calls(self, dtype: torch.dtype) -> Calls:
        """Bare functions for callers that check once and call often."""
        return self._calls[dtype]

    def function(
        self, name: str, arguments: Sequence[type], result: type | None = None
    ) -> Callable[..., Any]:
        """A function of the library, for who declares its signature and checks its arguments."""
        function = getattr(self._library, name)
        function.argtypes, function.restype = list(arguments), result
        call: Callable[..., Any] = function
        return call

    def pack(self, weight_OI: torch.Tensor) -> torch.Tensor:
        """(O, I) weight -> (blocks, words of 32 bit, width, values per word), zero-padded."""
        _check(weight_OI, dim=2)
        out, width = weight_OI.shape
        per_word = 4 // weight_OI.itemsize
        shape = (-(-out // self.width), -(-width // per_word), self.width, per_word)
        packed = self._pages.zeros(shape, weight_OI.dtype)
        self._calls[weight_OI.dtype].pack(
            weight_OI.data_ptr(), out, width, packed.data_ptr(), torch.get_num_threads()
        )
        return packed

    def linear(
        self,
        input_TI: torch.Tensor,
        packed: torch.Tensor,
        weight_shape: torch.Size,
        bias_O: torch.Tensor | None,
        *,
        wide: bool,
    ) -> torch.Tensor:
        """input W^T + bias, (T, O); `wide`: fp32, without the rounding to the input's dtype."""
        _check(input_TI, dim=2)
        num_rows, width = input_TI.shape
        out_features, in_features = weight_shape
        if packed.dtype != input_TI.dtype or width != in_features:
            raise InternalError(
                f"A {packed.dtype} weight {tuple(weight_shape)} does not fit {width} inputs of "
                f"{input_TI.dtype}."
            )
        dtype = torch.float32 if wide else input_TI.dtype
        output_TO = torch.empty((num_rows, out_features), dtype=dtype)
        if not num_rows:  # matrix tiles cannot be configured for no rows
            return output_TO
        narrow = dtype is input_TI.dtype
        call = self._calls[dtype].linear if narrow else self._linear_wide
        call(
            input_TI.data_ptr(),
            packed.data_ptr(),
            None if bias_O is None else bias_O.data_ptr(),
            output_TO.data_ptr(),
            num_rows,
            out_features,
            width,
            self.scratch.at_least(scratch_bytes(num_rows, width)),
            torch.get_num_threads(),
        )
        return output_TO

    def gated_mlp(
        self,
        input_TI: torch.Tensor,
        up: PackedLinear,
        down: PackedLinear,
    ) -> torch.Tensor:
        """down(silu(gate) * up) with gate and up fused in one weight, (T, O)."""
        _check(input_TI, dim=2)
        num_rows, width = input_TI.shape
        out_features, ffn = down.shape
        fits = up.shape == (2 * ffn, width)
        if not fits or not up.packed.dtype == down.packed.dtype == input_TI.dtype:
            raise InternalError(
                f"MLP weights {tuple(up.shape)} and {tuple(down.shape)} do not fit {width} inputs "
                f"of {input_TI.dtype}."
            )
        output_TO = torch.empty((num_rows, out_features), dtype=input_TI.dtype)
        if not num_rows:
            return output_TO
        self._calls[input_TI.dtype].gated_mlp(
            input_TI.data_ptr(),
            up.packed.data_ptr(),
            None if up.bias_O is None else up.bias_O.data_ptr(),
            down.packed.data_ptr(),
            None if down.bias_O is None else down.bias_O.data_ptr(),
            output_TO.data_ptr(),
            num_rows,
            ffn,
            width,
            out_features,
            self.scratch.at_least(scratch_bytes(num_rows, width, 2 * ffn, ffn)),
            torch.get_num_threads(),
        )
        return output_TO

    def embed(
        self, ids_T: torch.Tensor, packed: torch.Tensor, table_shape: torch.Size
    ) -> torch.Tensor:
        """Rows of a packed table, (T, I)."""
        num_rows, width = table_shape
        if ids_T.numel() and not 0 <= int(ids_T.min()) <= int(ids_T.max()) < num_rows:
            raise InternalError(f"A token id is not one of the {num_rows} rows of the table.")
        output_TI = torch.empty((ids_T.shape[0], width), dtype=packed.dtype)
        self._calls[packed.dtype].embed(
            ids_T.contiguous().data_ptr(),
            packed.data_ptr(),
            output_TI.data_ptr(),
            ids_T.shape[0],
            width,
            torch.get_num_threads(),
        )
        return output_TI

    def rms_norm(
        self,
        input_TD: torch.Tensor,
        delta_TD: torch.Tensor | None,
        weight_D: torch.Tensor,
        eps: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(input + delta, its norm); without delta the first is the input itself."""
        _check(input_TD, dim=2)
        total_TD = input_TD
        if delta_TD is not None:
            _check(delta_TD, dim=2)
            total_TD = torch.empty_like(input_TD)
        output_TD = torch.empty_like(input_TD)
        num_rows, width = input_TD.shape
        self._calls[input_TD.dtype].rms_norm(
            input_TD.data_ptr(),
            None if delta_TD is None else delta_TD.data_ptr(),
            weight_D.data_ptr(),
            total_TD.data_ptr(),
            output_TD.data_ptr(),
            num_rows,
            width,
            eps,
            torch.get_num_threads(),
        )
        return total_TD, output_TD

    def silu_mul(self, gate_up_TF: torch.Tensor) -> torch.Tensor:
        """silu(first half) * second half, (T, F / 2)."""
        _check(gate_up_TF, dim=2)
        num_rows, width = gate_up_TF.shape
        output_TF = torch.empty((num_rows, width // 2), dtype=gate_up_TF.dtype)
        self._calls[gate_up_TF.dtype].silu_mul(
            gate_up_TF.data_ptr(),
            output_TF.data_ptr(),
            num_rows,
            width // 2,
            torch.get_num_threads(),
        )
        return output_TF


def scratch_bytes(num_rows: int, *widths: int) -> int:
    """Room for `num_rows` rows of each width, in tiles (whole ones, at most fp32) and aligned."""
    return 4 * (num_rows + 31) * (sum(widths) + 32 * len(widths)) + 4096


def _check(tensor: torch.Tensor, *, dim: int) -> None:
    if (
        tensor.dtype not in SUFFIX
        or tensor.dim() != dim
        or not tensor.is_contiguous()
        or not tensor.is_cpu
    ):
        raise InternalError(
            f"A CPU kernel got a {tensor.dtype} tensor of shape {tuple(tensor.shape)} and strides "
            f"{tensor.stride()} on {tensor.device}."
        )
