"""A transformers model under ZeRO-3 as a `DecoderModel`: padded passes over the engine's KV blocks.

The model's own forward pass runs whole, head included, so what the runner takes for hidden states
are logits already, and one pass moves all weights once whatever is in the batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch

from cluster.base.errors import InternalError
from cluster.base.zero3_plan import Zero3Plan
from offload.zero3.cache_layers import PagedLayer, cache_of
from offload.zero3.engine import Zero3Engine
from offload.zero3.foreign_model import foreign_arch
from offload.zero3.padding import PaddedBatch, PaddingBounds, group_requests, pad_requests
from replicas.kernels.ops import Kernels
from replicas.kernels.torch_ops import TorchKernels
from replicas.layers.weights import WeightProvider, WeightUnit
from replicas.models.decoder import ForwardBatch


class HookedWeights:
    """The `WeightProvider` of such a model: DeepSpeed's hooks fetch what a module needs.

    Args:
        engine: closed with this object.
    """

    def __init__(self, engine: Zero3Engine) -> None:
        self._engine = engine

    def acquire(self, unit: str) -> Mapping[str, torch.Tensor]:
        """Nothing asks for units.

        Raises:
            InternalError: always.
        """
        raise InternalError(f"ZeRO-3 has no weight unit {unit!r}.")

    def announce(self, units: Sequence[str], rows: Sequence[int]) -> Sequence[int]:
        """Of no use here."""
        return range(len(units))

    def release(self, unit: str) -> None:
        """Of no use here."""

    def close(self) -> None:
        """Let memory and files go; safe to call twice."""
        self._engine.close()


class Zero3Model:
    """Implements `DecoderModel`.

    Args:
        block_size: tokens per KV block.
    """

    units: tuple[WeightUnit, ...] = ()

    def __init__(self, engine: Zero3Engine, plan: Zero3Plan, block_size: int) -> None:
        self.arch = foreign_arch(plan.model)
        self.kernels: Kernels = TorchKernels()
        self._module = engine.module
        self.name = type(engine.module).__name__
        """Of transformers' class."""
        self._kv = plan.model.kv
        self._block_size = block_size
        self._bounds = PaddingBounds(
            max_query_columns=plan.max_query_columns,
            max_context_columns=plan.max_context_columns,
        )
        named = inspect.signature(self._module.forward).parameters
        self._takes_positions = "position_ids" in named

    def forward(
        self, batch: ForwardBatch, weights: WeightProvider, kv_caches: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Logits (T, V) in the model's dtype, in as few passes as the padding's bounds allow.

        `kv_caches[i]` is layer i's (2, N, B, G, P) cache; written for every token of the batch.
        """
        metadata = batch.attention
        starts = metadata.query_start
        lens = [stop - start for start, stop in pairwise(starts)]
        logits_TV: torch.Tensor | None = None
        for members in group_requests(lens, metadata.seq_lens, self._bounds):
            padded = pad_requests(
                members, batch.token_ids_T, batch.positions_T, metadata, self._block_size
            )
            logits_QV = self._run(padded, kv_caches)
            if logits_TV is None:
                logits_TV = logits_QV.new_empty((len(batch.token_ids_T), logits_QV.shape[-1]))
            logits_TV[padded.packed_Q] = logits_QV
        if logits_TV is None:
            raise InternalError("A step without tokens reached the model.")
        return logits_TV

    def forward_idle(self, weights: WeightProvider) -> None:
        """Nothing to do: there are no peers."""

    def logits(self, hidden_RD: torch.Tensor, weights: WeightProvider) -> torch.Tensor:
        """Rows of what `forward` gave, (R, V) in fp32 over the vocabulary."""
        return hidden_RD[:, : self.arch.vocab_size].float()

    def _run(self, batch: PaddedBatch, kv_caches: Sequence[torch.Tensor]) -> torch.Tensor:
        """Logits (Q, V) of a padded batch's queries."""
        layers = [
            PagedLayer(cache, layer, batch)
            for cache, layer in zip(kv_caches, self._kv, strict=True)
        ]
        positions = {"position_ids": batch.positions_RS} if self._takes_positions else {}
        output = self._module(
            input_ids=batch.token_ids_RS,
            attention_mask=batch.mask_RL,
            past_key_values=cache_of(layers),
            use_cache=True,
            **positions,
        )
        for index, layer in enumerate(layers):
            if layer.is_updated != bool(self._kv[index].num_heads):
                raise InternalError(f"Layer {index} left the cache that it was inspected with.")
        logits_QV: torch.Tensor = output.logits[batch.row_Q, batch.column_Q]
        return logits_QV
