"""All layers of a dense model in one call of the compiled library, for weights that stay in memory.

One parallel region for a whole step: no Python, no waking of threads and no calls of their own for
the norms in between. The bits are those of the layers one by one, whose functions run.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from ctypes import addressof
from dataclasses import dataclass

import torch

from replicas.attention.backend import AttentionSpec
from replicas.attention.cpu_block import (
    BlockSetting,
    StepArguments,
    address,
    block_shape,
    block_widths,
)
from replicas.kernels.loader import (
    LAYER_PARTS,
    PACKED,
    CpuLibrary,
    LayerShape,
    StackShape,
    scratch_bytes,
)
from replicas.layers.attention import StepContext
from replicas.layers.weights import ResidentWeights, WeightProvider

_PACKED = tuple(f"{name}.weight{PACKED}" for name in ("qkv", "attention_out", "up", "down"))


@dataclass(frozen=True, slots=True, kw_only=True)
class StackSetting:
    """What all layers share, and each layer's attention; MLPs are gated with silu."""

    spec: AttentionSpec
    blocks: Sequence[BlockSetting]
    dtype: torch.dtype
    eps: float
    """Of the norms before attention and MLP, and of the last one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    """Weights and caches as the library takes them, kept alive with what points to them."""

    weights: WeightProvider
    kv_caches: Sequence[torch.Tensor]
    layers: ctypes.Array[LayerShape]
    shape: StackShape


class CpuLayerStack:
    """From embeddings to the last norm; `seconds` adds up the time by `LAYER_PARTS`."""

    def __init__(self, library: CpuLibrary, setting: StackSetting) -> None:
        self._library = library
        self._setting = setting
        self._known: _Known | None = None
        self._seconds = (ctypes.c_double * len(LAYER_PARTS))()

    @property
    def seconds(self) -> dict[str, float]:
        """What each part of the layers took since the start."""
        return dict(zip(LAYER_PARTS, self._seconds, strict=True))

    def forward(
        self,
        hidden_TD: torch.Tensor,
        context: StepContext,
        weights: WeightProvider,
        kv_caches: Sequence[torch.Tensor],
    ) -> torch.Tensor | None:
        """Hidden states after the last norm, (T, D); writes this step's keys and values.

        Works in place: `hidden_TD` is not to be used afterwards, unless nothing was done.

        Returns:
            None when weights, caches or rows do not lie as this needs them: nothing was done.
        """
        num_rows, dtype = hidden_TD.shape[0], self._setting.dtype
        if hidden_TD.dtype != dtype or not hidden_TD.is_contiguous() or not num_rows:
            return None
        known = self._known
        if known is None or known.weights is not weights or known.kv_caches is not kv_caches:
            known = self._known = self._look_at(weights, kv_caches)
        if known is None:
            return None
        step = StepArguments(context.attention, context.cos_sin)
        output_TD = torch.empty_like(hidden_TD)
        width, ffn = known.shape.width, known.shape.ffn
        widths = (width, width, *block_widths(known.layers[0].block), 2 * ffn, ffn)
        self._library.calls(dtype).layers(
            addressof(known.shape),
            addressof(step.shape),
            hidden_TD.data_ptr(),
            output_TD.data_ptr(),
            self._library.scratch.at_least(scratch_bytes(num_rows, *widths)),
            torch.get_num_threads(),
        )
        return output_TD

    def _look_at(self, weights: WeightProvider, kv_caches: Sequence[torch.Tensor]) -> _Known | None:
        if not isinstance(weights, ResidentWeights):
            return None
        blocks = self._setting.blocks
        units = [weights.acquire(f"layer.{index}") for index in range(len(blocks))]
        if not all(map(self._suits, units, kv_caches)):
            return None
        layers = (LayerShape * len(units))(
            *(
                self._layer(setting, tensors, cache)
                for setting, tensors, cache in zip(blocks, units, kv_caches, strict=True)
            )
        )
        width, ffn = units[0]["down.weight"].shape
        shape = StackShape(
            addressof(layers),
            address(weights.acquire("norm")["norm.weight"]),
            addressof(self._seconds),
            len(units),
            width,
            ffn,
            self._setting.eps,
        )
        return _Known(weights=weights, kv_caches=kv_caches, layers=layers, shape=shape)

    def _suits(self, tensors: Mapping[str, torch.Tensor], kv_2NBGP: torch.Tensor) -> bool:
        dtype = self._setting.dtype
        packed = [tensors.get(name) for name in _PACKED]
        return (
            all(weight is not None and weight.dtype == dtype for weight in packed)
            and kv_2NBGP.dtype == dtype
            and kv_2NBGP.is_contiguous()
        )

    def _layer(
        self,
        setting: BlockSetting,
        tensors: Mapping[str, torch.Tensor],
        kv_2NBGP: torch.Tensor,
    ) -> LayerShape:
        names = ("up.weight" + PACKED, "up.bias", "down.weight" + PACKED, "down.bias")
        return LayerShape(
            block_shape(self._setting.spec, setting, tensors, kv_2NBGP),
            address(tensors["attention_norm.weight"]),
            address(tensors["mlp_norm.weight"]),
            *(address(tensors.get(name)) for name in names),
            kv_2NBGP.data_ptr(),
        )
