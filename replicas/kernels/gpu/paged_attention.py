"""Paged causal attention in Triton: prompts in blocks of queries, decode rows split by context.

One arithmetic for both. The context is cut into segments of `SEGMENT` tokens that begin at fixed
positions; inside a segment an online softmax folds tile by tile (FlashAttention-2, arXiv
2307.08691), and segments are merged in ascending order. A prompt's program walks its segments one
after another; a decode row's segments are computed by programs of their own and merged by a
second kernel (Flash-Decoding). So a row's result depends on its request alone: not on the batch,
the grid, or how a prompt was cut into chunks. Tiles that a row cannot see leave its sums as they
are, bit for bit.

Runs in Triton's interpreter on CPU tensors (TRITON_INTERPRET=1), which is how it is tested
without a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from replicas.kernels.gpu import paged_attention_kernels as programs

SEGMENT = 256
TILE = 64
_LOG2_E = 1.4426950408889634


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedShape:
    """What a launch needs to know beside its tensors; `window` 0 sees all."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    scale: float
    window: int = 0

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
    query_THP: torch.Tensor, kv_2NBGP: torch.Tensor, batch: PagedBatch, shape: PagedShape
) -> torch.Tensor:
    """softmax(scale * Q K^T + mask) V of every row over its request's context, (T, H, P).

    Rows of requests with several rows and rows of requests with one are computed by two launches;
    each leaves the other's rows alone.
    """
    output_THP = torch.empty_like(query_THP)
    if batch.max_query_len > 1:
        _attend_prompts(query_THP, kv_2NBGP, output_THP, batch, shape)
    if batch.has_decodes:
        _attend_decodes(query_THP, kv_2NBGP, output_THP, batch, shape)
    return output_THP


def write_slots(
    key_TGP: torch.Tensor,
    value_TGP: torch.Tensor,
    kv_2NBGP: torch.Tensor,
    slot_mapping_T: torch.Tensor,
) -> None:
    """Store keys and values at their slots, in place; a slot of -1 (padding) stores nothing."""
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
        WIDTH=triton.next_power_of_2(width),
    )


def _attend_prompts(
    query_THP: torch.Tensor,
    kv_2NBGP: torch.Tensor,
    output_THP: torch.Tensor,
    batch: PagedBatch,
    shape: PagedShape,
) -> None:
    group = triton.next_power_of_2(shape.group)
    rows = max(16, 64 // group)
    grid = (triton.cdiv(batch.max_query_len, rows), batch.num_requests, shape.num_kv_heads)
    programs.prompt_kernel[grid](
        query_THP,
        kv_2NBGP[0],
        kv_2NBGP[1],
        output_THP,
        batch.query_start_R1,
        batch.seq_lens_R,
        batch.block_tables_RN,
        batch.block_tables_RN.stride(0),
        query_THP.stride(0),
        output_THP.stride(0),
        shape.num_kv_heads * shape.head_dim,
        shape.scale * _LOG2_E,
        QUERIES=rows,
        **_constants(shape, group),
    )


def _attend_decodes(
    query_THP: torch.Tensor,
    kv_2NBGP: torch.Tensor,
    output_THP: torch.Tensor,
    batch: PagedBatch,
    shape: PagedShape,
) -> None:
    segments = triton.cdiv(batch.max_seq_len, SEGMENT)
    group = max(16, triton.next_power_of_2(shape.group))
    pad = triton.next_power_of_2(shape.head_dim)
    partial = query_THP.new_empty(
        (batch.num_requests, shape.num_heads, segments, pad + 2), dtype=torch.float32
    )
    programs.decode_kernel[(segments, batch.num_requests, shape.num_kv_heads)](
        query_THP,
        kv_2NBGP[0],
        kv_2NBGP[1],
        partial,
        batch.query_start_R1,
        batch.seq_lens_R,
        batch.block_tables_RN,
        batch.block_tables_RN.stride(0),
        query_THP.stride(0),
        shape.num_kv_heads * shape.head_dim,
        segments,
        shape.scale * _LOG2_E,
        **_constants(shape, group),
    )
    programs.merge_kernel[(batch.num_requests, shape.num_heads)](
        partial,
        output_THP,
        batch.query_start_R1,
        batch.seq_lens_R,
        output_THP.stride(0),
        segments,
        HEADS=shape.num_heads,
        DIM=shape.head_dim,
        PAD_DIM=pad,
        WINDOW=shape.window,
        SEGMENT=SEGMENT,
    )


def _constants(shape: PagedShape, group: int) -> dict[str, int]:
    return {
        "GROUP": shape.group,
        "PAD_GROUP": group,
        "DIM": shape.head_dim,
        "PAD_DIM": triton.next_power_of_2(shape.head_dim),
        "BLOCK": shape.block_size,
        "WINDOW": shape.window,
        "SEGMENT": SEGMENT,
        "TILE": TILE,
    }
