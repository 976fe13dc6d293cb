"""Tokens of rows that want their largest logit: the head and the choice in one compiled call.

No logits are written or read again: each thread keeps the largest of the columns it computes. The
tokens are those that `DecoderModel.logits` and the sampler give.
"""

from __future__ import annotations

import ctypes
from typing import Self

import numpy as np
import torch

from replicas.kernels.cpu_ops import CpuKernels
from replicas.kernels.loader import PACKED, SUFFIX, CpuLibrary, scratch_bytes
from replicas.layers.weights import ResidentWeights, WeightProvider
from replicas.models.decoder import DecoderModel
from replicas.models.llama import LlamaModel

_P, _L, _I = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
_ARGUMENTS = [_P, _P, _L, _L, _L, _L, _P, _P, _I]


class GreedyHead:
    """The head of a model that computes on the CPU's compiled kernels."""

    def __init__(self, library: CpuLibrary, vocab_size: int) -> None:
        self._library = library
        self._vocab_size = vocab_size
        self._calls = {
            dtype: library.function(f"pk_largest_{suffix}", _ARGUMENTS, ctypes.c_bool)
            for dtype, suffix in SUFFIX.items()
        }

    @classmethod
    def of(cls, model: DecoderModel) -> Self | None:
        """None for a model whose logits are more than its head's product, or on other kernels."""
        if not isinstance(model, LlamaModel) or not isinstance(model.kernels, CpuKernels):
            return None
        return cls(model.kernels.library, model.arch.vocab_size)

    def tokens(self, hidden_RD: torch.Tensor, weights: WeightProvider) -> list[int] | None:
        """Each row's largest logit's token, the lowest id among equals.

        Returns:
            None where the logits have to say: some are not finite, the weight is streamed or not
            packed, or this rank has a part of the vocabulary.
        """
        if not isinstance(weights, ResidentWeights):
            return None
        tensors = weights.acquire("head")
        packed, shape = tensors.get("lm_head" + PACKED), tensors["lm_head"].shape
        num_rows, width = hidden_RD.shape
        fits = (
            packed is not None
            and packed.dtype == hidden_RD.dtype
            and hidden_RD.is_contiguous()
            and shape[1] == width
            and shape[0] >= self._vocab_size
            and num_rows > 0
        )
        if not fits or packed is None:
            return None
        places_R = np.empty(num_rows, np.int64)
        are_finite = self._calls[packed.dtype](
            hidden_RD.data_ptr(),
            packed.data_ptr(),
            num_rows,
            shape[0],
            width,
            self._vocab_size,
            places_R.ctypes.data,
            self._library.scratch.at_least(scratch_bytes(num_rows, width)),
            torch.get_num_threads(),
        )
        return places_R.tolist() if are_finite else None
