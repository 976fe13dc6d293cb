"""Tokens of rows that want their largest logit: the head and the choice in one compiled call.

No logits are written or read again: each thread keeps the largest of the columns it computes. The
tokens are those that `DecoderModel.logits` and the sampler give. Where every row of a step wants
one and all layers are one call, head and choice are part of that call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from ctypes import addressof, cast
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from replicas.kernels.cpu_calls import SUFFIX
from replicas.kernels.cpu_ops import CpuKernels
from replicas.kernels.cpu_shapes import HeadShape
from replicas.kernels.loader import PACKED, CpuLibrary, scratch_bytes
from replicas.layers.weights import ResidentWeights, WeightProvider
from replicas.models.decoder import DecoderModel, ForwardBatch
from replicas.models.llama import LlamaModel

_P, _L, _I = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
_FIRST_ROWS = 64
_SIGN = ctypes.CFUNCTYPE(None)
_ARGUMENTS = [_P, _P, _L, _L, _L, _L, _P, _P, _I]


@dataclass(frozen=True, slots=True, kw_only=True)
class Forwarded:
    """What a forward pass gives."""

    hidden_TD: torch.Tensor
    tokens: list[int] | None = None
    """Each row's largest logit's token, where it came of the same call."""
    head_s: float = 0.0
    """Time of that call in which the layers had been computed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    """The head as the library takes it, for these weights and caches."""

    weights: WeightProvider
    kv_caches: Sequence[torch.Tensor]
    packed: torch.Tensor
    head: HeadShape


class GreedyHead:
    """The head of a model that computes on the CPU's compiled kernels."""

    def __init__(self, library: CpuLibrary, vocab_size: int) -> None:
        self._library = library
        self._vocab_size = vocab_size
        self._known: _Known | None = None
        self._places = (ctypes.c_int64 * _FIRST_ROWS)()
        self._sign = _Sign()
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
        num_rows, width = hidden_RD.shape
        found = self._packed(weights)
        if found is None or not num_rows:
            return None
        packed, shape = found
        if packed.dtype != hidden_RD.dtype or not hidden_RD.is_contiguous() or shape[1] != width:
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

    def forward(
        self,
        model: DecoderModel,
        batch: ForwardBatch,
        weights: WeightProvider,
        kv_caches: Sequence[torch.Tensor],
        on_computed: Callable[[], None] | None = None,
    ) -> Forwarded:
        """The model's forward pass, each row's token part of its call where that can be.

        Args:
            model: that this is the head of.
            on_computed: called once, when the layers are computed.
        """
        known = self._known
        if known is None or known.weights is not weights or known.kv_caches is not kv_caches:
            known = self._known = self._look_at(model, weights, kv_caches)
        if known is None or not isinstance(model, LlamaModel):
            hidden_TD = model.forward(batch, weights, kv_caches)
            if on_computed is not None:
                on_computed()
            return Forwarded(hidden_TD=hidden_TD)
        num_rows, head = batch.token_ids_T.shape[0], known.head
        if num_rows > len(self._places):
            self._places = (ctypes.c_int64 * (2 * num_rows))()
        head.places, head.are_finite, head.seconds = addressof(self._places), False, 0.0
        head.sign = self._sign.address_for(on_computed)
        hidden_TD = model.forward(batch, weights, kv_caches, head)
        self._sign.finish()
        tokens = self._places[:num_rows] if head.are_finite else None
        return Forwarded(hidden_TD=hidden_TD, tokens=tokens, head_s=head.seconds)

    def _look_at(
        self, model: DecoderModel, weights: WeightProvider, kv_caches: Sequence[torch.Tensor]
    ) -> _Known | None:
        """None where the head does not fit the call of the layers."""
        found = self._packed(weights)
        if found is None:
            return None
        packed, shape = found
        if packed.dtype != kv_caches[0].dtype or shape[1] != model.arch.model_dim:
            return None
        head = HeadShape(packed=packed.data_ptr(), n=shape[0], count=self._vocab_size)
        return _Known(weights=weights, kv_caches=kv_caches, packed=packed, head=head)

    def _packed(self, weights: WeightProvider) -> tuple[torch.Tensor, torch.Size] | None:
        """The head's weight and its shape; None where it does not lie here packed and whole."""
        if not isinstance(weights, ResidentWeights):
            return None
        tensors = weights.acquire("head")
        packed, shape = tensors.get("lm_head" + PACKED), tensors["lm_head"].shape
        return None if packed is None or shape[0] < self._vocab_size else (packed, shape)


class _Sign:
    """A function that the library calls, another one each time; what it raises waits for `finish`.

    One callback for all times: to make one is more than the rest of a call.
    """

    def __init__(self) -> None:
        self._function: Callable[[], None] | None = None
        self._error: BaseException | None = None
        self._callback = _SIGN(self._give)
        self._address = cast(self._callback, _P).value

    def address_for(self, function: Callable[[], None] | None) -> int | None:
        """What the library calls for `function`."""
        self._function = function
        return None if function is None else self._address

    def finish(self) -> None:
        """Call the function unless the library has; raise what it raised."""
        if self._function is not None:
            self._give()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _give(self) -> None:
        function, self._function = self._function, None
        try:
            if function is not None:
                function()
        except BaseException as error:  # no exception passes through the library
            self._error = error
