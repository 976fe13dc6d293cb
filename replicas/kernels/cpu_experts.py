"""The compiled routed experts of a layer: one call for all experts that a step's rows visit.

Bits are those of the packed linears and the gate called expert by expert. Neither the batch, the
number of threads nor the slots of the experts change a row's sum.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from ctypes import addressof

import torch

from cluster.base.errors import InternalError
from moe.experts import DOWN, DOWN_BIAS, UP, UP_BIAS
from replicas.kernels.cpu_calls import SUFFIX
from replicas.kernels.cpu_shapes import ExpertsShape
from replicas.kernels.expert_ops import ExpertSet
from replicas.kernels.loader import PACKED, CpuLibrary

_P, _L, _I = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
_SIGNATURE = [_P, _P, _P, _L, _L, _P, _P, _P, _I]


class CpuExperts:
    """Implements `moe.experts.GroupedExperts` on packed weights.

    Args:
        experts: a set that `why_not` has nothing against.
    """

    def __init__(self, library: CpuLibrary, experts: ExpertSet) -> None:
        first = experts.tensors[0]
        self._dtype = first[UP].dtype
        self._dim, ffn = first[DOWN].shape
        self._library = library
        self._experts = experts  # keeps the memory that the addresses lead to
        self._addresses = torch.tensor(
            [_addresses(tensors, down_bias=experts.down_bias) for tensors in experts.tensors]
        )
        self._order = torch.tensor(experts.order)
        self.shape = ExpertsShape(
            self._addresses.data_ptr(),
            self._order.data_ptr(),
            len(experts.tensors),
            self._dim,
            ffn,
            experts.glu_limit,
            experts.glu_alpha,
        )
        """Valid as long as this object."""
        suffix = SUFFIX[self._dtype]
        self._call = library.function(f"pk_experts_{suffix}", _SIGNATURE)
        self._bytes = library.function(f"pk_experts_bytes_{suffix}", [_P, _L, _L], _L)

    @staticmethod
    def why_not(library: CpuLibrary, experts: ExpertSet) -> list[str]:
        """All reasons why the experts cannot go together; empty when they can."""
        first, reasons = experts.tensors[0], []
        shapes = {(tensors[UP].shape, tensors[DOWN].shape) for tensors in experts.tensors}
        dtypes = {tensors[name].dtype for tensors in experts.tensors for name in (UP, DOWN)}
        biases = {tensors[name].dtype for tensors in experts.tensors for name in _biases(tensors)}
        if any(name + PACKED not in tensors for tensors in experts.tensors for name in (UP, DOWN)):
            reasons.append("their weights are not packed")
        if len(shapes) > 1 or len(dtypes | biases) > 1 or not dtypes <= SUFFIX.keys():
            reasons.append("they differ in shape or dtype, or have one that there is no kernel for")
        dim, ffn = first[DOWN].shape
        if first[UP].shape != (2 * ffn, dim) or ffn % library.width:
            reasons.append(f"an inner width of {ffn} is not whole blocks of {library.width}")
        return reasons

    def forward(
        self, hidden_AD: torch.Tensor, slot_AK: torch.Tensor, weight_AK: torch.Tensor
    ) -> torch.Tensor:
        """See `GroupedExperts.forward`.

        Raises:
            InternalError: the rows are not of these experts' width and dtype.
        """
        num_rows, top_k = slot_AK.shape
        hidden_AD, slot_AK = hidden_AD.contiguous(), slot_AK.contiguous()
        weight_AK = weight_AK.contiguous()
        if (
            hidden_AD.shape != (num_rows, self._dim)
            or weight_AK.shape != slot_AK.shape
            or (hidden_AD.dtype, slot_AK.dtype, weight_AK.dtype)
            != (self._dtype, torch.int64, torch.float32)
        ):
            raise InternalError(
                f"Experts of width {self._dim} in {self._dtype} got rows {tuple(hidden_AD.shape)} "
                f"in {hidden_AD.dtype} for {slot_AK.dtype} slots {tuple(slot_AK.shape)} with "
                f"{weight_AK.dtype} weights {tuple(weight_AK.shape)}."
            )
        partial_AD = torch.empty((num_rows, self._dim), dtype=torch.float64)
        if not num_rows:
            return partial_AD
        threads, shape = torch.get_num_threads(), addressof(self.shape)
        self._call(
            hidden_AD.data_ptr(),
            slot_AK.data_ptr(),
            weight_AK.data_ptr(),
            num_rows,
            top_k,
            shape,
            partial_AD.data_ptr(),
            self._library.scratch.at_least(self._bytes(shape, num_rows * top_k, threads)),
            threads,
        )
        return partial_AD


def _biases(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    return [name for name in (UP_BIAS, DOWN_BIAS) if name in tensors]


def _addresses(tensors: Mapping[str, torch.Tensor], *, down_bias: bool) -> list[int]:
    """The C side's `Expert`; 0 for what there is not."""
    names = [UP + PACKED, UP_BIAS, DOWN + PACKED, DOWN_BIAS if down_bias else ""]
    return [tensors[name].data_ptr() if name in tensors else 0 for name in names]
