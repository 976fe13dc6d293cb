"""The CPU backend on compiled kernels: attends straight from the blocks, no gathered copies.

Scores, softmax and sums in fp32. Context is taken in pieces that begin at fixed positions, so a
row's bits depend on its own request alone: not on its neighbours, the number of threads, or how a
prompt was cut into chunks.
"""

from __future__ import annotations

from ctypes import addressof

import torch

from cluster.base.errors import InternalError
from replicas.attention.backend import AttentionBlock, AttentionMetadata, AttentionSpec
from replicas.attention.cpu_block import (
    BlockSetting,
    CpuAttentionBlock,
    StepArguments,
    StepMemory,
    attention_shape,
)
from replicas.kernels.loader import CpuLibrary
from replicas.kernels.ops import HeadShape

_MAX_GROUP = 48
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class CpuPagedAttention:
    """Paged attention of one rank on a loaded library."""

    name = "cpu_paged"

    def __init__(self, spec: AttentionSpec, library: CpuLibrary) -> None:
        self._spec = spec
        self._dtype = _DTYPES[spec.dtype]
        self._library = library
        self._calls = library.calls(self._dtype)
        self._steps = StepMemory()

    @staticmethod
    def why_not(spec: AttentionSpec) -> list[str]:
        """All reasons why this backend cannot run `spec`; empty when it can."""
        reasons = []
        if spec.device.split(":")[0] != "cpu":
            reasons.append(f"it runs on cpu tensors, not on {spec.device}")
        if spec.dtype not in _DTYPES:
            reasons.append(f"it knows {' and '.join(_DTYPES)}, not {spec.dtype}")
        if spec.sinks:
            reasons.append("it knows no attention sinks")
        if spec.num_heads % spec.num_kv_heads:
            reasons.append(
                f"{spec.num_heads} heads do not share {spec.num_kv_heads} kv heads evenly"
            )
        if spec.num_heads // spec.num_kv_heads > _MAX_GROUP:
            reasons.append(f"more than {_MAX_GROUP} heads share a kv head")
        if spec.dtype == "bfloat16" and spec.head_dim % 2:
            reasons.append(f"bfloat16 heads of {spec.head_dim} do not come in pairs")
        return reasons

    def block(
        self, heads: HeadShape, sliding_window: int | None, *, with_bias: bool
    ) -> AttentionBlock | None:
        """See `AttentionBackend.block`."""
        return CpuAttentionBlock(
            self._spec,
            self._library,
            self._steps,
            BlockSetting(heads=heads, sliding_window=sliding_window, with_bias=with_bias),
        )

    def forward(  # noqa: PLR0913 - sinks are one family's own
        self,
        query_THP: torch.Tensor,
        key_TGP: torch.Tensor,
        value_TGP: torch.Tensor,
        kv_2NBGP: torch.Tensor,
        metadata: AttentionMetadata,
        sliding_window: int | None,
        sinks_H: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write keys and values to their slots, then attend; see `AttentionBackend.forward`."""
        self._check(query_THP, key_TGP, value_TGP, kv_2NBGP)
        query_THP = _rows(query_THP)
        self._write(_rows(key_TGP), _rows(value_TGP), kv_2NBGP, metadata)
        shape = attention_shape(self._spec, kv_2NBGP, sliding_window, query_THP.stride(0))
        step = StepArguments(metadata)
        output_THP = torch.empty(query_THP.shape, dtype=self._dtype)
        self._calls.attention(
            addressof(shape),
            addressof(step.shape),
            query_THP.data_ptr(),
            kv_2NBGP.data_ptr(),
            output_THP.data_ptr(),
            torch.get_num_threads(),
        )
        return output_THP

    def _write(
        self,
        key_TGP: torch.Tensor,
        value_TGP: torch.Tensor,
        kv_2NBGP: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> None:
        if key_TGP.stride(0) != value_TGP.stride(0):
            key_TGP, value_TGP = key_TGP.contiguous(), value_TGP.contiguous()
        self._calls.write_slots(
            key_TGP.data_ptr(),
            value_TGP.data_ptr(),
            key_TGP.stride(0),
            kv_2NBGP.data_ptr(),
            kv_2NBGP.stride(0),
            metadata.slot_mapping_T.data_ptr(),
            key_TGP.shape[0],
            self._spec.num_kv_heads * self._spec.head_dim,
            torch.get_num_threads(),
        )

    def _check(
        self,
        query_THP: torch.Tensor,
        key_TGP: torch.Tensor,
        value_TGP: torch.Tensor,
        kv_2NBGP: torch.Tensor,
    ) -> None:
        """What the kernel would otherwise read or write beyond."""
        spec = self._spec
        tokens = query_THP.shape[0]
        kv_shape = (tokens, spec.num_kv_heads, spec.head_dim)
        fits = (
            query_THP.shape == (tokens, spec.num_heads, spec.head_dim)
            and key_TGP.shape == kv_shape
            and value_TGP.shape == kv_shape
            and kv_2NBGP.shape[3:] == kv_shape[1:]
            and kv_2NBGP[0].is_contiguous()
        )
        tensors = (query_THP, key_TGP, value_TGP, kv_2NBGP)
        if not fits or any(tensor.dtype is not self._dtype for tensor in tensors):
            raise InternalError(
                "Paged attention got tensors that do not belong to it: "
                f"{[(tuple(tensor.shape), tensor.dtype) for tensor in tensors]}."
            )


def _rows(heads_THP: torch.Tensor) -> torch.Tensor:
    """Heads side by side within a row; rows may lie apart."""
    whole = heads_THP.stride(2) == 1 and heads_THP.stride(1) == heads_THP.shape[2]
    return heads_THP if whole else heads_THP.contiguous()
