"""Paged causal attention in Triton: prompts in tiles of rows, decode rows split by context.

One arithmetic for both. The context is cut into segments of `SEGMENT` tokens that begin at fixed
positions; inside a segment an online softmax folds tile by tile (FlashAttention-2, arXiv
2307.08691), and segments are merged in ascending order. A prompt's program walks its segments one
after another; a decode row's segments are computed by programs of their own and merged by a
second kernel (Flash-Decoding). So a row's result depends on its request alone: not on the batch,
the grid, or how a prompt was cut into chunks. Tiles that a row cannot see leave its sums as they
are, bit for bit. Both fill tiles of one size, though a decode row leaves most of its own empty:
matrix instructions of different sizes need not add in the same order.

Runs in Triton's interpreter on CPU tensors (TRITON_INTERPRET=1), which is how its numbers are
tested without a GPU; that it compiles for one and fits it is tested ahead of time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from replicas.kernels.gpu import paged_attention_kernels as programs

SEGMENT = 256
_LOG2_E = 1.4426950408889634
_SMALLEST_SIDE = 16  # of a tile of a matrix multiplication


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedShape:
    """What a launch needs to know beside its tensors; `window` 0 sees all."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    scale: float
    window: int = 0
    shared_plane: bool = False
    """Values are the keys: the cache has one plane."""

    def tile(self, dtype: torch.dtype) -> tuple[int, int]:
        """(rows, positions) of the tiles; wide heads and numbers leave registers for few rows."""
        return (64, 64) if self.head_dim <= 128 and dtype.itemsize == 2 else (16, 32)

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedBatch:
    """Where each request's rows and blocks are; device tensors, int32 or int64."""

    query_start_R1: torch.Tensor
    seq_lens_R: torch.Tensor
    block_tables_RN: torch.Tensor
    max_query_len: int
    """Longest run of query rows; host integers only size the grid."""
    max_seq_len: int
    has_decodes: bool
    """Whether any request has exactly one row."""

    @property
    def num_requests(self) -> int:
        """R."""
        return self.seq_lens_R.shape[0]


def paged_attention(
    query_THP: torch.Tensor,
    kv_2NBGP: torch.Tensor,
    batch: PagedBatch,
    shape: PagedShape,
    output_THP: torch.Tensor,
    sinks_H: torch.Tensor | None = None,
) -> None:
    """softmax([scale * Q K^T + mask, sinks]) [V, 0] of every row over its request's context.

    Rows of requests with several rows and rows of requests with one are computed by two launches;
    each leaves the other's rows alone.

    Args:
        output_THP: rows of `query_THP`'s dtype with heads side by side; filled in place.
    """
    # Scores are in powers of two, and so are sinks.
    sinks = None if sinks_H is None else sinks_H.float() * _LOG2_E
    launch = _Launch(query_THP, kv_2NBGP, batch, shape, sinks)
    if batch.max_query_len > 1:
        launch.prompts(output_THP)
    if batch.has_decodes:
        launch.decodes(output_THP)


def write_slots(
    key_TGP: torch.Tensor,
    value_TGP: torch.Tensor,
    kv_2NBGP: torch.Tensor,
    slot_mapping_T: torch.Tensor,
    *,
    shared_plane: bool = False,
) -> None:
    """Store keys and values at their slots, in place; a slot of -1 (padding) stores nothing.

    Args:
        shared_plane: values are the keys, and are stored once.
    """
    num_rows, kv_heads, head_dim = key_TGP.shape
    width = kv_heads * head_dim
    programs.write_slots_kernel[(num_rows,)](
        key_TGP,
        value_TGP,
        kv_2NBGP[0],
        kv_2NBGP[1],
        slot_mapping_T,
        key_TGP.stride(0),
        value_TGP.stride(0),
        width,
        SHARED=shared_plane,
        WIDTH=triton.next_power_of_2(width),
    )


class _Launch:
    """One step's attention of one layer; `sinks` in powers of two."""

    def __init__(
        self,
        query_THP: torch.Tensor,
        kv_2NBGP: torch.Tensor,
        batch: PagedBatch,
        shape: PagedShape,
        sinks: torch.Tensor | None,
    ) -> None:
        self._query, self._kv = query_THP, kv_2NBGP
        self._batch, self._shape, self._sinks = batch, shape, sinks
        self._tile = shape.tile(query_THP.dtype)

    def prompts(self, output_THP: torch.Tensor) -> None:
        """Requests with several rows."""
        pairs = self._batch.max_query_len * self._shape.group
        self._attend(output_THP, output_THP.stride(0), triton.cdiv(pairs, self._tile[0]))

    def decodes(self, output_THP: torch.Tensor) -> None:
        """Requests with one row: pieces per segment, then their sum."""
        batch, shape = self._batch, self._shape
        segments = triton.cdiv(batch.max_seq_len, SEGMENT)
        partial = self._query.new_empty(
            (batch.num_requests, shape.num_heads, segments, shape.head_dim + 2),
            dtype=torch.float32,
        )
        tiles = triton.cdiv(shape.group, self._tile[0])
        self._attend(partial, 0, tiles * segments, segments=segments)
        programs.merge_kernel[(batch.num_requests, shape.num_heads)](
            partial,
            output_THP,
            batch.query_start_R1,
            batch.seq_lens_R,
            self._sinks_or_any(),
            output_THP.stride(0),
            segments,
            HEADS=shape.num_heads,
            DIM=shape.head_dim,
            PAD_DIM=triton.next_power_of_2(shape.head_dim),
            WINDOW=shape.window,
            SINKS=self._sinks is not None,
            SEGMENT=SEGMENT,
        )

    def _attend(
        self, output: torch.Tensor, output_stride: int, tiles: int, segments: int = 0
    ) -> None:
        batch, shape = self._batch, self._shape
        rows, positions = self._tile
        main = _largest_power(shape.head_dim)
        rest = max(_SMALLEST_SIDE, triton.next_power_of_2(shape.head_dim - main))
        programs.attend_kernel[(tiles, batch.num_requests, shape.num_kv_heads)](
            self._query,
            self._kv[0],
            self._kv[1],
            output,
            batch.query_start_R1,
            batch.seq_lens_R,
            batch.block_tables_RN,
            self._sinks_or_any(),
            (
                self._query.stride(0),
                output_stride,
                batch.block_tables_RN.stride(0),
                shape.num_kv_heads * shape.head_dim,
            ),
            segments,
            shape.scale * _LOG2_E,
            SPLIT=segments > 0,
            GROUP=shape.group,
            HEAD=(shape.head_dim, main, rest),
            CACHE=(shape.block_size, shape.window, shape.shared_plane),
            SINKS=self._sinks is not None,
            TILES=(rows, positions, SEGMENT),
        )

    def _sinks_or_any(self) -> torch.Tensor:
        """A launch needs a tensor even where the program does not read it."""
        return self._query if self._sinks is None else self._sinks


def _largest_power(value: int) -> int:
    """The largest power of two that is not above `value`."""
    return 1 << (value.bit_length() - 1)
