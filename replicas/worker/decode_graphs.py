"""Replays decode steps from captured graphs: one launch instead of a few hundred.

A step in which every request has exactly one token looks the same for every batch of one size, so
its forward pass is captured once per bucket of batch sizes and replayed with the step's inputs
copied into fixed buffers. Rows that fill up a bucket have no context (length 0) and no slot (-1):
the kernels compute nothing for them and store nothing.

Steps that check drafts have a few tokens per request. They are captured too, by buckets of all
their rows: how these are shared out among requests lies on the device, in tables with room for as
many requests as rows, of which those too many have none. All other steps run as they are.

Capturing takes a while, so it is never done while somebody waits for a step: a bucket that was
missed is noted, and captured by `settle`, which the worker calls after it has answered.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

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
    max_query: int = 1
    """Most tokens of a request in a captured step: 1, and those of a draft."""

    @property
    def max_blocks(self) -> int:
        """Columns of a block table."""
        return -(-self.max_context // self.block_size)

    def bucket(self, num_rows: int, longest: int = 1) -> Bucket | None:
        """The smallest captured size that holds a step; None: it is not for a graph.

        Args:
            longest: most rows of one request.
        """
        if num_rows > self.max_rows or longest > self.max_query:
            return None
        # Powers of two to 8, then multiples of 8.
        size = 1 << (num_rows - 1).bit_length() if num_rows <= 8 else -(-num_rows // 8) * 8
        return Bucket(rows=min(size, self.max_rows), drafts=longest > 1)


class Bucket(NamedTuple):
    """A size of captured steps."""

    rows: int
    drafts: bool
    """Whether requests may have several rows."""


class _Buffers:
    """The fixed inputs of one bucket."""

    def __init__(self, bucket: Bucket, limits: GraphLimits, device: torch.device) -> None:
        rows = bucket.rows
        self._drafts = bucket.drafts
        # Host integers size the launches, so they are those of the largest step.
        lengths = (limits.max_query, 1) if bucket.drafts else (1,) * rows
        self.token_ids = torch.zeros(rows, dtype=torch.int64, device=device)
        self.positions = torch.zeros(rows, dtype=torch.int64, device=device)
        self.seq_lens = torch.zeros(rows, dtype=torch.int64, device=device)
        self.slots = torch.full((rows,), -1, dtype=torch.int64, device=device)
        self.tables = torch.zeros((rows, limits.max_blocks), dtype=torch.int32, device=device)
        self.query_start = torch.arange(rows + 1, dtype=torch.int64, device=device)
        self.batch = ForwardBatch(
            token_ids_T=self.token_ids,
            positions_T=self.positions,
            attention=AttentionMetadata(
                query_start=tuple(accumulate(lengths, initial=0)),
                seq_lens=(limits.max_context,) * len(lengths),
                query_start_R1=self.query_start,
                seq_lens_R=self.seq_lens,
                block_tables_RN=self.tables,
                slot_mapping_T=self.slots,
            ),
        )

    def fill(self, batch: ForwardBatch) -> None:
        """Copy a step's inputs in; rows past its end become padding."""
        used, attention = batch.token_ids_T.shape[0], batch.attention
        requests, columns = attention.block_tables_RN.shape
        self.token_ids[:used].copy_(batch.token_ids_T)
        self.positions[:used].copy_(batch.positions_T)
        self.seq_lens[:requests].copy_(attention.seq_lens_R)
        self.slots[:used].copy_(attention.slot_mapping_T)
        self.tables[:requests, :columns].copy_(attention.block_tables_RN)
        self.seq_lens[requests:].zero_()
        self.slots[used:].fill_(-1)
        if self._drafts:
            self.query_start[: requests + 1].copy_(attention.query_start_R1)
            self.query_start[requests + 1 :].fill_(used)


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
        self._captured: dict[Bucket, tuple[_Buffers, Replay]] = {}
        self._wanted: dict[Bucket, tuple[WeightProvider, Sequence[torch.Tensor]]] = {}
        self._refused: set[Bucket] = set()

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
        starts = batch.attention.query_start
        longest = max(map(operator.sub, starts[1:], starts))
        bucket = self._limits.bucket(rows, longest)
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
            log.warning("decode steps of up to %d rows stay uncaptured: %s", bucket.rows, error)
            return
        self._captured[bucket] = (buffers, replay)
        what = "steps with drafts" if bucket.drafts else "decode steps"
        log.info("captured %s of up to %d rows", what, bucket.rows)
