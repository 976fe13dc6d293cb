"""What a layer takes beside its matrices: norms, heads, attention, activations, row by row.

The calls are those of a layer that streams, with the attention backend that a replica would choose.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from offload.model_shape import layer_values
from replicas.attention.backend import AttentionBackend, AttentionMetadata, AttentionSpec
from replicas.attention.select import select_backend
from replicas.kernels.ops import HeadShape, HeadTensors, Kernels

MODEL_DIM, FFN_DIM = 1024, 3072
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 8, 4, 128
BLOCK_SIZE = 16
ROWS = 64
SHORT, LONG = 16, 1024
"""Tokens of context, this one included."""
LONG_ROWS = 8

BestS = Callable[[Callable[[], object], int], float]
"""Work and number of tries -> shortest seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowRates:
    """Measured of rows that decode."""

    layer_s: float
    """For a layer with one row."""
    value_s: float
    """For each further row and value that passes through a layer's own work (`layer_values`)."""
    attention_bytes_per_s: float
    """Of keys and values, where contexts are long."""


def measure_rows(
    kernels: Kernels, device: torch.device, dtype: torch.dtype, best: BestS
) -> RowRates:
    """Times one layer with `ROWS` rows and with one, and with long contexts."""
    layer = _Layer(kernels, device, dtype)
    many, one = (best(layer.work(rows, SHORT), 10) for rows in (ROWS, 1))
    values = layer_values(
        MODEL_DIM, FFN_DIM, query_width=NUM_HEADS * HEAD_DIM, kv_width=NUM_KV_HEADS * HEAD_DIM
    )
    value_s = max(0.0, many - one) / (ROWS - 1) / values
    long, short = (best(layer.work(LONG_ROWS, context), 5) for context in (LONG, SHORT))
    item = torch.finfo(dtype).bits // 8
    kv_bytes = LONG_ROWS * (LONG - SHORT) * 2 * NUM_KV_HEADS * HEAD_DIM * item
    return RowRates(
        layer_s=one,
        value_s=value_s,
        attention_bytes_per_s=kv_bytes / max(1e-9, long - short),
    )


def one_row_of(kernels: Kernels, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    """The same layer's work with one row and a short context."""
    return _Layer(kernels, device, dtype).work(1, SHORT)


class _Layer:
    """A layer without matrices."""

    def __init__(self, kernels: Kernels, device: torch.device, dtype: torch.dtype) -> None:
        self._kernels, self._device, self._dtype = kernels, device, dtype
        self._shape = HeadShape(num_heads=NUM_HEADS, num_kv_heads=NUM_KV_HEADS, head_dim=HEAD_DIM)
        self._norm_D = self._ones(MODEL_DIM)
        self._backend: AttentionBackend = select_backend(
            AttentionSpec(
                num_heads=NUM_HEADS,
                num_kv_heads=NUM_KV_HEADS,
                head_dim=HEAD_DIM,
                scale=HEAD_DIM**-0.5,
                block_size=BLOCK_SIZE,
                dtype=str(dtype).removeprefix("torch."),
                device=device.type,
            ),
            kernels=kernels,
        )

    def work(self, rows: int, context: int) -> Callable[[], object]:
        """What is timed: `rows` tokens, each of a request with `context` tokens."""
        width = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
        hidden_TD, fused_TX = self._ones(rows, MODEL_DIM), self._ones(rows, width)
        gate_up_TF = self._ones(rows, 2 * FFN_DIM)
        angles = self._ones(rows, 1, HEAD_DIM), self._ones(rows, 1, HEAD_DIM)
        metadata = self._metadata(rows, context)
        blocks = rows * math.ceil(context / BLOCK_SIZE)
        cache = self._ones(2, blocks, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)

        def run() -> object:
            kernels = self._kernels
            kernels.add_rms_norm(hidden_TD, hidden_TD, self._norm_D, 1e-6)
            tensors = HeadTensors(cos_sin=angles)
            query, key, value = kernels.prepare_heads(fused_TX.clone(), self._shape, tensors)
            self._backend.forward(query, key, value, cache, metadata, None)
            kernels.add_rms_norm(hidden_TD, hidden_TD, self._norm_D, 1e-6)
            kernels.silu_mul(gate_up_TF)
            return hidden_TD + hidden_TD

        return run

    def _metadata(self, rows: int, context: int) -> AttentionMetadata:
        """Requests of equal length in blocks of their own, one token each in this step."""
        count = math.ceil(context / BLOCK_SIZE)
        tables_RN = torch.arange(rows * count, dtype=torch.int32).view(rows, count)
        last_R = tables_RN[:, -1].long() * BLOCK_SIZE + (context - 1) % BLOCK_SIZE
        starts = torch.arange(rows + 1, dtype=torch.int32)
        lengths = torch.full((rows,), context, dtype=torch.int32)
        return AttentionMetadata(
            query_start=tuple(range(rows + 1)),
            seq_lens=(context,) * rows,
            query_start_R1=starts.to(self._device),
            seq_lens_R=lengths.to(self._device),
            block_tables_RN=tables_RN.to(self._device),
            slot_mapping_T=last_R.to(self._device),
        )

    def _ones(self, *shape: int) -> torch.Tensor:
        return torch.ones(shape, dtype=self._dtype, device=self._device)
