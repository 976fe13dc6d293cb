"""A layer's attention in one call of the compiled library: projections, heads, cache, output.

One parallel region instead of five, and no Python in between. The bits are those of the separate
calls: the same functions run, on the same rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from ctypes import addressof
from dataclasses import dataclass

import torch

from replicas.attention.backend import AttentionMetadata, AttentionSpec
from replicas.kernels.cpu_shapes import AttentionShape, BlockShape, StepShape
from replicas.kernels.loader import PACKED, CpuLibrary, scratch_bytes
from replicas.kernels.ops import HeadShape

_QKV, _OUT = "qkv.weight", "attention_out.weight"


class StepArguments:
    """A step's requests as the library takes them, and the tensors that it points into."""

    def __init__(
        self,
        metadata: AttentionMetadata,
        cos_sin: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        self.metadata = metadata
        self.cos_sin = cos_sin
        starts_R1, lens_R = map(_as_int64, (metadata.query_start_R1, metadata.seq_lens_R))
        self._held = starts_R1, lens_R
        cos, sin = cos_sin or (None, None)
        self.shape = StepShape(
            metadata.block_tables_RN.data_ptr(),
            starts_R1.data_ptr(),
            lens_R.data_ptr(),
            metadata.slot_mapping_T.data_ptr(),
            None if cos is None else cos.data_ptr(),
            None if sin is None else sin.data_ptr(),
            metadata.block_tables_RN.shape[0],
            metadata.slot_mapping_T.shape[0],
            metadata.block_tables_RN.stride(0),
        )


def attention_shape(
    spec: AttentionSpec,
    kv_2NBGP: torch.Tensor,
    sliding_window: int | None,
    query_stride: int,
) -> AttentionShape:
    """One call's shape; query rows lie `query_stride` elements apart."""
    return AttentionShape(
        spec.num_heads,
        spec.num_kv_heads,
        spec.head_dim,
        kv_2NBGP.shape[2],
        sliding_window or 0,
        query_stride,
        spec.num_kv_heads * spec.head_dim,
        kv_2NBGP.stride(0),
        spec.scale,
    )


class StepMemory:
    """The arguments of the newest step, which all layers of a model share."""

    def __init__(self) -> None:
        self._newest: StepArguments | None = None

    def arguments(
        self, metadata: AttentionMetadata, cos_sin: tuple[torch.Tensor, torch.Tensor] | None
    ) -> StepArguments:
        """Made once per step; `cos_sin` belongs to the metadata."""
        newest = self._newest
        if newest is None or newest.metadata is not metadata or newest.cos_sin is not cos_sin:
            newest = self._newest = StepArguments(metadata, cos_sin)
        return newest


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSetting:
    """What sets a layer's attention apart; `with_bias`: of the output projection."""

    heads: HeadShape
    sliding_window: int | None
    with_bias: bool


def block_shape(
    spec: AttentionSpec,
    setting: BlockSetting,
    tensors: Mapping[str, torch.Tensor],
    kv_2NBGP: torch.Tensor,
) -> BlockShape:
    """A layer's packed weights and cache, which must outlive the result, as the library takes them.

    Raises:
        KeyError: the projections are not packed.
    """
    fused_width = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    return BlockShape(
        attention_shape(spec, kv_2NBGP, setting.sliding_window, fused_width),
        *map(address, _weights(setting, tensors)),
        tensors[_QKV].shape[1],
        tensors[_OUT].shape[0],
        setting.heads.norm_eps,
    )


def block_widths(block: BlockShape) -> tuple[int, int]:
    """Of the rows that a block keeps in scratch memory: projections, attention."""
    shape = block.shape
    return shape.query_stride, shape.heads * shape.head_dim


class CpuAttentionBlock:
    """One layer's `AttentionBlock`; see there."""

    def __init__(
        self, spec: AttentionSpec, library: CpuLibrary, steps: StepMemory, setting: BlockSetting
    ) -> None:
        self._spec = spec
        self._setting = setting
        self._steps = steps
        self._library = library
        self._known: tuple[torch.Tensor | None, ...] = ()
        self._block = BlockShape()

    def forward(
        self,
        hidden_TD: torch.Tensor,
        cos_sin: tuple[torch.Tensor, torch.Tensor] | None,
        tensors: Mapping[str, torch.Tensor],
        kv_2NBGP: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> torch.Tensor | None:
        """See `AttentionBlock.forward`."""
        qkv, out = tensors.get(_QKV + PACKED), tensors.get(_OUT + PACKED)
        if qkv is None or out is None or not self._suits(hidden_TD, kv_2NBGP, qkv.dtype):
            return None
        known = (*_weights(self._setting, tensors), kv_2NBGP)
        # Resident weights stay where they are.
        if len(self._known) != len(known) or not all(map(_is_same, known, self._known)):
            self._block = block_shape(self._spec, self._setting, tensors, kv_2NBGP)
            self._known = known
        block, num_rows = self._block, hidden_TD.shape[0]
        step = self._steps.arguments(metadata, cos_sin)
        output_TD = torch.empty((num_rows, block.out_width), dtype=hidden_TD.dtype)
        widths = (block.width, *block_widths(block))
        self._library.calls(hidden_TD.dtype).attention_block(
            addressof(block),
            addressof(step.shape),
            hidden_TD.data_ptr(),
            kv_2NBGP.data_ptr(),
            output_TD.data_ptr(),
            self._library.scratch.at_least(scratch_bytes(num_rows, *widths)),
            torch.get_num_threads(),
        )
        return output_TD

    def _suits(self, hidden_TD: torch.Tensor, kv_2NBGP: torch.Tensor, dtype: torch.dtype) -> bool:
        """Whether the tensors are as the call takes them; the separate calls know others."""
        return (
            hidden_TD.is_contiguous()
            and kv_2NBGP.is_contiguous()
            and hidden_TD.dtype == kv_2NBGP.dtype == dtype
        )


def _as_int64(tensor: torch.Tensor) -> torch.Tensor:
    """Torch's own check that there is nothing to do is a call of its own."""
    return tensor if tensor.dtype is torch.int64 else tensor.to(torch.int64)


def address(tensor: torch.Tensor | None) -> int | None:
    """Where a tensor's values lie; None for none."""
    return None if tensor is None else tensor.data_ptr()


def _weights(
    setting: BlockSetting, tensors: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor | None, ...]:
    """In the order of the C side's `Block`."""
    return (
        tensors[_QKV + PACKED],
        tensors.get("qkv.bias"),
        tensors[_OUT + PACKED],
        tensors.get("attention_out.bias") if setting.with_bias else None,
        tensors.get("q_norm.weight"),
        tensors.get("k_norm.weight"),
    )


def _is_same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is other
