"""Vocabulary-parallel embedding and head: each rank owns a contiguous range of token ids.

The table is padded so that all ranks have equally many rows; padding rows are zero and their
logits are cut off before anybody sees them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from cluster.dist.communicator import Communicator
from replicas.kernels.ops import Kernels
from replicas.kernels.torch_ops import TORCH_KERNELS


class VocabEmbedding:
    """Token ids -> rows of the tensor `tokens`."""

    def __init__(self, communicator: Communicator, kernels: Kernels = TORCH_KERNELS) -> None:
        self._communicator = communicator
        self._kernels = kernels

    def forward(
        self, token_ids_T: torch.Tensor, tensors: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """Embeddings, (T, embedding width), the same bits on every rank."""
        table = tensors["tokens"]
        if self._communicator.size == 1:
            return self._kernels.embedding(token_ids_T, tensors, "tokens")
        rows = table.shape[0]
        local_T = token_ids_T - self._communicator.rank * rows
        absent_T = (local_T < 0) | (local_T >= rows)
        present_T = local_T.masked_fill(absent_T, 0)
        hidden_TD = self._kernels.embedding(present_T, tensors, "tokens")
        # One rank has the row and the others add zeros: the sum is exact in any dtype.
        return self._communicator.all_reduce(hidden_TD.masked_fill(absent_T[:, None], 0))


class VocabHead:
    """Hidden states -> logits with the tensor `lm_head`."""

    def __init__(
        self, vocab_size: int, communicator: Communicator, kernels: Kernels = TORCH_KERNELS
    ) -> None:
        self._kernels = kernels
        self._vocab_size = vocab_size
        self._communicator = communicator

    def forward(self, hidden_RD: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Logits over the true vocabulary, (R, V) fp32, the same bits on every rank."""
        # Between ranks the model's dtype travels: half the bytes.
        wide = self._communicator.size == 1
        local = self._kernels.linear(hidden_RD, tensors, "lm_head", wide=wide)
        padded = self._communicator.all_gather(local, dim=-1)
        return padded[:, : self._vocab_size].float()
