"""Replays decode steps from captured graphs: one launch instead of a few hundred.

A step in which every request has exactly one token looks the same for every batch of one size, so
its forward pass is captured once per bucket of batch sizes and replayed with the step's inputs
copied into fixed buffers. Rows that fill up a bucket have no context (length 0) and no slot (-1):
the kernels compute nothing for them and store nothing. All other steps run as they are.

Capturing takes a while, so it is never done while somebody waits for a step: a bucket that was
missed is noted, and captured by `settle`, which the worker calls after it has answered.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from cluster.base.errors import DeviceOutOfMemoryError
from replicas.attention.backend import AttentionMetadata
from replicas.kernels.ops import Kernels
from replicas.kernels.triton_ops import TritonKernels
from replicas.layers.weights import ResidentWeights, WeightProvider, WeightUnit
from replicas.models.arch import ArchConfig
from replicas.models.decoder import DecoderModel, ForwardBatch

log = logging.getLogger(__name__)

Replay = Callable[[], torch.Tensor]
Capture = Callable[[Callable[[], torch.Tensor]], Replay]
"""Records what a function launches; the result launches it again and returns the same tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphLimits:
    """Sizes that a captured step is made for."""

    max_rows: int
    max_context: int
    block_size: int

    @property
    def max_blocks(self) -> int:
        """Columns of a block table."""
        return -(-self.max_context // self.block_size)

    def bucket(self, num_rows: int) -> int | None:
        """Smallest captured size that holds `num_rows`: powers of two to 8, then multiples of 8."""
        if num_rows > self.max_rows:
            return None
        size = 1 << (num_rows - 1).bit_length() if num_rows <= 8 else -(-num_rows // 8) * 8
        return min(size, self.max_rows)


class _Buffers:
    """The fixed inputs of one bucket."""

    def __init__(self, rows: int, limits: GraphLimits, device: torch.device) -> None:
        self.rows = rows
        self.token_ids = torch.zeros(rows, dtype=torch.int64, device=device)
        self.positions = torch.zeros(rows, dtype=torch.int64, device=device)
        self.seq_lens = torch.zeros(rows, dtype=torch.int64, device=device)
        self.slots = torch.full((rows,), -1, dtype=torch.int64, device=device)
        self.tables = torch.zeros((rows, limits.max_blocks), dtype=torch.int32, device=device)
        self.query_start = torch.arange(rows + 1, dtype=torch.int64, device=device)
        # Host integers size the launches, so they are those of the largest step.
        self.batch = ForwardBatch(
            token_ids_T=self.token_ids,
            positions_T=self.positions,
            attention=AttentionMetadata(
                query_start=tuple(range(rows + 1)),
                seq_lens=(limits.max_context,) * rows,
                query_start_R1=self.query_start,
                seq_lens_R=self.seq_lens,
                block_tables_RN=self.tables,
                slot_mapping_T=self.slots,
            ),
        )

    def fill(self, batch: ForwardBatch) -> None:
        """Copy a step's inputs in; rows past its end become padding."""
        used = batch.token_ids_T.shape[0]
        tables = batch.attention.block_tables_RN
        self.token_ids[:used].copy_(batch.token_ids_T)
        self.positions[:used].copy_(batch.positions_T)
        self.seq_lens[:used].copy_(batch.attention.seq_lens_R)
        self.slots[:used].copy_(batch.attention.slot_mapping_T)
        self.tables[:used, : tables.shape[1]].copy_(tables)
        self.seq_lens[used:].zero_()
        self.slots[used:].fill_(-1)


class GraphedModel:
    """A `DecoderModel` that replays decode steps where it can.

    Args:
        model: the model itself; its weights and caches must stay where they are.
        limits: what the captured steps must hold.
        capture: how launches are recorded (`device.GraphRecorder` on CUDA).
    """

    def __init__(
        self,
        model: DecoderModel,
        limits: GraphLimits,
        device: torch.device,
        capture: Capture,
    ) -> None:
        self.arch: ArchConfig = model.arch
        self.units: tuple[WeightUnit, ...] = model.units
        self.kernels: Kernels = model.kernels
        self._model = model
        self._limits = limits
        self._device = device
        self._capture = capture
        self._captured: dict[int, tuple[_Buffers, Replay]] = {}
        self._wanted: dict[int, tuple[WeightProvider, Sequence[torch.Tensor]]] = {}
        self._refused: set[int] = set()

    @staticmethod
    def why_not(model: DecoderModel, weights: WeightProvider, device: str) -> list[str]:
        """All reasons why a model's decode steps cannot be captured; empty when they can."""
        reasons = []
        if device.split(":")[0] != "cuda":
            reasons.append(f"there are no graphs on {device}")
        if not isinstance(model.kernels, TritonKernels):
            reasons.append(f"{model.kernels.name} kernels launch by the contents of a step")
        if not isinstance(weights, ResidentWeights):
            reasons.append("the weights move")
        if model.arch.rope is not None and model.arch.rope.kind == "dynamic":
            reasons.append("dynamic RoPE computes frequencies on the host")
        if any(getattr(layer, "moe", None) is not None for layer in model.arch.layers):
            reasons.append("which experts a step visits decides what is launched")
        return reasons

    @property
    def num_captured(self) -> int:
        """Buckets that can be replayed."""
        return len(self._captured)

    @property
    def wants_to_settle(self) -> bool:
        """Whether a step has missed a bucket that `settle` will capture."""
        return bool(self._wanted)

    def forward(
        self,
        batch: ForwardBatch,
        weights: WeightProvider,
        kv_caches: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """See `DecoderModel.forward`; after a replay the result lives until the next one."""
        rows = batch.token_ids_T.shape[0]
        bucket = self._limits.bucket(rows) if len(batch.attention.seq_lens) == rows else None
        if bucket is None:
            return self._model.forward(batch, weights, kv_caches)
        if bucket not in self._captured:
            if bucket not in self._refused:
                self._wanted[bucket] = (weights, kv_caches)
            return self._model.forward(batch, weights, kv_caches)
        buffers, replay = self._captured[bucket]
        buffers.fill(batch)
        return replay()[:rows]

    def forward_idle(self, weights: WeightProvider) -> None:
        """See `DecoderModel.forward_idle`; not captured."""
        self._model.forward_idle(weights)

    def logits(self, hidden_RD: torch.Tensor, weights: WeightProvider) -> torch.Tensor:
        """See `DecoderModel.logits`; not captured, its rows differ from step to step."""
        return self._model.logits(hidden_RD, weights)

    def settle(self) -> None:
        """Capture one bucket that a step has missed; call it when nobody waits.

        Every rank of a replica misses the same buckets in the same order, so collectives match.
        """
        if not self._wanted:
            return
        bucket = next(iter(self._wanted))
        weights, kv_caches = self._wanted.pop(bucket)
        buffers = _Buffers(bucket, self._limits, self._device)
        try:
            replay = self._capture(lambda: self._model.forward(buffers.batch, weights, kv_caches))
        except DeviceOutOfMemoryError as error:
            # The step has been answered; later ones of this size go on as they were.
            self._refused.add(bucket)
            log.warning("decode steps of up to %d requests stay uncaptured: %s", bucket, error)
            return
        self._captured[bucket] = (buffers, replay)
        log.info("captured decode steps of up to %d requests", bucket)
