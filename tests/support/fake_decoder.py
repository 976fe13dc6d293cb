"""A one-layer stand-in for a model: its hidden states depend on the whole context through the
paged KV cache, so wrong slots, block tables or positions change its answers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from replicas.kernels.torch_ops import TORCH_KERNELS
from replicas.layers.weights import ResidentWeights, WeightProvider, WeightUnit
from replicas.models.arch import ArchConfig, LayerSpec, NormKind, PositionKind
from replicas.models.decoder import ForwardBatch

VOCAB_SIZE = 53
MODEL_DIM = 16
BLOCK_SIZE = 4
NO_WEIGHTS = ResidentWeights({})


class FakeDecoder:
    """hidden[t] = tanh(mean of embeddings of tokens 0..t, read from the cache) + embedding[t].

    A token in `poison` makes its own hidden state NaN.
    """

    units: tuple[WeightUnit, ...] = ()
    kernels = TORCH_KERNELS

    def __init__(
        self,
        seed: int = 0,
        poison: frozenset[int] = frozenset(),
        device: torch.device | None = None,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.arch = ArchConfig(
            family="fake",
            vocab_size=VOCAB_SIZE,
            model_dim=MODEL_DIM,
            num_heads=1,
            num_kv_heads=1,
            head_dim=MODEL_DIM,
            layers=(LayerSpec(ffn_dim=1),),
            max_position=512,
            norm=NormKind.RMS,
            norm_eps=1e-6,
            activation="silu",
            gated_mlp=False,
            position=PositionKind.LEARNED,
            rope=None,
        )
        self._embedding_VD = torch.randn(VOCAB_SIZE, MODEL_DIM, generator=generator).to(
            device, non_blocking=True
        )
        positions_ND = 0.3 * torch.randn(512, MODEL_DIM, generator=generator)
        head_DV = 2.0 * torch.randn(MODEL_DIM, VOCAB_SIZE, generator=generator)
        self._positions_ND = positions_ND.to(device, non_blocking=True)
        self._head_DV = head_DV.to(device, non_blocking=True)
        self._poison = poison
        self.num_logits_rows: list[int] = []

    def forward(
        self, batch: ForwardBatch, weights: WeightProvider, kv_caches: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        entry_TD = self._embedding_VD[batch.token_ids_T] + self._positions_ND[batch.positions_T]
        slots_TD = kv_caches[0].view(2, -1, MODEL_DIM)
        slots_TD[0, batch.attention.slot_mapping_T] = entry_TD
        hidden_TD = torch.empty_like(entry_TD)
        attention = batch.attention
        for request, seq_len in enumerate(attention.seq_lens):
            start, stop = attention.query_start[request : request + 2]
            blocks = attention.block_tables_RN[request].long()
            context = kv_caches[0][0, blocks].reshape(-1, MODEL_DIM)[:seq_len]
            counts = torch.arange(1, seq_len + 1, device=context.device).unsqueeze(1)
            means = (context.double().cumsum(0) / counts).float()
            hidden_TD[start:stop] = torch.tanh(means[seq_len - (stop - start) :])
        hidden_TD += entry_TD
        for token in self._poison:
            hidden_TD.masked_fill_((batch.token_ids_T == token).unsqueeze(1), torch.nan)
        return hidden_TD

    def forward_idle(self, weights: WeightProvider) -> None:
        """There are no experts."""

    def logits(self, hidden_RD: torch.Tensor, weights: WeightProvider) -> torch.Tensor:
        self.num_logits_rows.append(len(hidden_RD))
        return hidden_RD @ self._head_DV


def fake_kv_caches(num_blocks: int = 128, device: torch.device | None = None) -> list[torch.Tensor]:
    return [torch.zeros(2, num_blocks, BLOCK_SIZE, 1, MODEL_DIM, device=device)]
