"""Prompts by FlashInfer, decode rows by the Triton kernels; only when it is asked for by name.

FlashInfer (arXiv 2501.01005) is faster at long prompts. It picks its tiles by the mean length of
the chunks in a step, so the last bits of a prompt's rows depend on how it was cut and on what ran
beside it, which no other backend here allows: `auto` never takes it. Decode rows go to the kernels
that need no plan: they stay independent of the batch and can be captured as graphs.

Plans are made from host integers, once per step and window; nothing here waits for the device.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import numpy as np
import torch

from replicas.attention.backend import AttentionBlock, AttentionMetadata, AttentionSpec
from replicas.attention.triton_paged import TritonPagedAttention, packed_heads
from replicas.kernels.ops import HeadShape
from replicas.kernels.uploads import on_device
from replicas.sampling.ragged import IntArray, ragged_ranges

_HEAD_DIMS = (64, 128, 256)
_DTYPES = ("float16", "bfloat16")
_WORKSPACE_BYTES = 128 * 2**20


class FlashInferAttention:
    """Paged attention of one rank."""

    name = "flashinfer"

    def __init__(self, spec: AttentionSpec) -> None:
        self._spec = spec
        self._decodes = TritonPagedAttention(spec)
        self._library: Any = importlib.import_module("flashinfer")
        self._workspace: torch.Tensor | None = None
        self._wrappers: dict[int, Any] = {}
        self._step: _PromptStep | None = None

    @staticmethod
    def why_not(spec: AttentionSpec) -> list[str]:
        """All reasons why this backend cannot run `spec`; empty when it can."""
        reasons = TritonPagedAttention.why_not(spec)
        if importlib.util.find_spec("flashinfer") is None:
            reasons.append("flashinfer is not installed (pip install flashinfer-python)")
        if spec.dtype not in _DTYPES:
            reasons.append(f"flashinfer computes in {' and '.join(_DTYPES)}, not in {spec.dtype}")
        if spec.head_dim not in _HEAD_DIMS:
            reasons.append(f"flashinfer has heads of {_HEAD_DIMS}, not of {spec.head_dim}")
        if spec.sinks or spec.shared_plane:
            reasons.append("it is used for plain keys and values without sinks only")
        return reasons

    def block(
        self, heads: HeadShape, sliding_window: int | None, *, with_bias: bool
    ) -> AttentionBlock | None:
        """See `AttentionBackend.block`: there is none."""
        return None

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
        self._decodes.write(key_TGP, value_TGP, kv_2NBGP, metadata)
        output_THP = torch.empty_like(query_THP)
        has_prompts = query_THP.shape[0] > len(metadata.seq_lens)
        if has_prompts:
            step = self._prompts(metadata)
            wrapper = self._planned(step, kv_2NBGP, sliding_window)
            query = packed_heads(query_THP.index_select(0, step.rows))
            attended = wrapper.run(query, (kv_2NBGP[0], kv_2NBGP[1]))
            output_THP.index_copy_(0, step.rows, attended)
        if not has_prompts or len(step.requests) < len(metadata.seq_lens):
            self._decodes.attend(query_THP, kv_2NBGP, metadata, sliding_window, output_THP)
        return output_THP

    def _prompts(self, metadata: AttentionMetadata) -> _PromptStep:
        """Made by the first layer of a step; the others find it."""
        if self._step is None or self._step.metadata is not metadata:
            self._step = _PromptStep(metadata, self._spec.block_size)
        return self._step

    def _planned(
        self, step: _PromptStep, kv_2NBGP: torch.Tensor, sliding_window: int | None
    ) -> Any:
        # Counted to the left of the query: a window of one token sees none there.
        window_left = -1 if sliding_window is None else sliding_window - 1
        wrapper = self._wrappers.get(window_left)
        if wrapper is None:
            if self._workspace is None:
                self._workspace = torch.zeros(
                    _WORKSPACE_BYTES, dtype=torch.uint8, device=kv_2NBGP.device
                )
            wrapper = self._library.BatchPrefillWithPagedKVCacheWrapper(
                self._workspace, "NHD", backend="fa2"
            )
            self._wrappers[window_left] = wrapper
        if window_left not in step.planned:
            spec = self._spec
            wrapper.plan(
                step.query_start,
                step.block_start,
                step.blocks,
                step.last_block_len,
                spec.num_heads,
                spec.num_kv_heads,
                spec.head_dim,
                spec.block_size,
                causal=True,
                sm_scale=spec.scale,
                window_left=window_left,
                q_data_type=kv_2NBGP.dtype,
                kv_data_type=kv_2NBGP.dtype,
                non_blocking=True,
                # Its cut would depend on how many requests there are.
                disable_split_kv=True,
            )
            # A shared workspace holds one plan's temporaries at a time, but not the plan itself.
            step.planned.add(window_left)
        return wrapper


class _PromptStep:
    """The requests of a step that have several rows, as FlashInfer is told of them."""

    def __init__(self, metadata: AttentionMetadata, block_size: int) -> None:
        self.metadata = metadata
        self.planned: set[int] = set()
        """Windows for which a wrapper holds this step's plan."""
        starts = np.array(metadata.query_start, np.int64)
        lengths = np.diff(starts)
        self.requests: IntArray = np.flatnonzero(lengths > 1)
        seq_lens = np.array(metadata.seq_lens, np.int64)[self.requests]
        num_rows = lengths[self.requests]
        device = metadata.block_tables_RN.device
        _, rows = ragged_ranges(starts[self.requests], num_rows)
        self.rows = on_device(rows, device)
        num_blocks = -(-seq_lens // block_size)
        columns = metadata.block_tables_RN.shape[1]
        _, places = ragged_ranges(self.requests * columns, num_blocks)
        table = metadata.block_tables_RN.reshape(-1)
        self.blocks = table.index_select(0, on_device(places, device)).int()
        self.query_start = _from_zero(num_rows)
        self.block_start = _from_zero(num_blocks)
        self.last_block_len = torch.from_numpy((seq_lens - 1) % block_size + 1).int()


def _from_zero(lengths: IntArray) -> torch.Tensor:
    """Where each part begins, and the end; on the host, where plans are made."""
    return torch.from_numpy(np.concatenate(([0], np.cumsum(lengths)))).int()
