"""Embeddings and all layers of a model in one call of the compiled library, for resident weights.

One parallel region for a whole step: no Python, no waking of threads and no calls of their own for
the norms in between. The bits are those of the layers one by one, whose functions run.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from ctypes import addressof
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from cluster.base.errors import InternalError
from moe.spec import MoeSpec
from replicas.attention.backend import AttentionSpec
from replicas.attention.cpu_block import (
    BlockSetting,
    StepArguments,
    address,
    block_shape,
)
from replicas.kernels.cpu_shapes import (
    LAYER_PARTS,
    HeadShape,
    InputsShape,
    LayerShape,
    StackShape,
)
from replicas.kernels.loader import PACKED, CpuLibrary
from replicas.layers.cpu_mixture import CpuMixture
from replicas.layers.rotary import Rotary
from replicas.layers.weights import ResidentWeights, WeightProvider

if TYPE_CHECKING:
    from replicas.models.decoder import ForwardBatch

_ATTENTION = tuple(f"{name}.weight{PACKED}" for name in ("qkv", "attention_out"))
_MLP = tuple(f"{name}.weight{PACKED}" for name in ("up", "down"))


@dataclass(frozen=True, slots=True, kw_only=True)
class StackSetting:
    """What all layers share, and each layer's attention; MLPs and experts are gated with silu."""

    spec: AttentionSpec
    blocks: Sequence[BlockSetting]
    mixtures: Sequence[MoeSpec | None]
    """By layer, all the same; None: the layer has an MLP, as wide as the others'."""
    dtype: torch.dtype
    eps: float
    """Of the norms before attention and MLP, and of the last one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    """Weights and caches as the library takes them, kept alive with what points to them."""

    weights: WeightProvider
    kv_caches: Sequence[torch.Tensor]
    layers: ctypes.Array[LayerShape]
    mixtures: Sequence[CpuMixture | None]
    embeddings: torch.Tensor
    """(V, D), or packed."""
    num_tokens: int
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
        parts = LAYER_PARTS if any(self._setting.mixtures) else LAYER_PARTS[:-1]
        return dict(zip(parts, self._seconds, strict=False))

    def forward(
        self,
        batch: ForwardBatch,
        rotary: Rotary,
        weights: WeightProvider,
        kv_caches: Sequence[torch.Tensor],
        head: HeadShape | None = None,
    ) -> torch.Tensor | None:
        """Hidden states after the last norm, (T, D); writes this step's keys and values.

        Args:
            head: as wide as the layers and of their dtype; filled in, one place for each row.

        Returns:
            None when weights or caches do not lie as this needs them: nothing was done.

        Raises:
            InternalError: a token id is not one of the table's.
        """
        num_rows = batch.token_ids_T.shape[0]
        known = self._known
        if known is None or known.weights is not weights or known.kv_caches is not kv_caches:
            known = self._known = self._look_at(weights, kv_caches)
        if known is None or not num_rows:
            return None
        table_2N1P = rotary.table(max(batch.attention.seq_lens))
        step, inputs = StepArguments(batch.attention), self._inputs(batch, known, table_2N1P)
        output_TD = torch.empty((num_rows, known.shape.width), dtype=self._setting.dtype)
        calls, threads = self._library.calls(self._setting.dtype), torch.get_num_threads()
        stack = addressof(known.shape)
        scratch = self._library.scratch.at_least(calls.layers_bytes(stack, num_rows, threads))
        all_known = calls.layers(
            stack,
            addressof(step.shape),
            addressof(inputs),
            output_TD.data_ptr(),
            None if head is None else addressof(head),
            scratch,
            threads,
        )
        if not all_known:
            raise InternalError(
                f"A token id is not one of the {inputs.tokens} rows of the table of embeddings."
            )
        return output_TD

    @staticmethod
    def _inputs(batch: ForwardBatch, known: _Known, table_2N1P: torch.Tensor) -> InputsShape:
        cos = table_2N1P.data_ptr()
        return InputsShape(
            batch.token_ids_T.data_ptr(),
            batch.positions_T.data_ptr(),
            known.embeddings.data_ptr(),
            cos,
            cos + table_2N1P.stride(0) * table_2N1P.itemsize,
            known.embeddings.dim() > 2,
            known.num_tokens,
            table_2N1P.shape[3],
        )

    def _look_at(self, weights: WeightProvider, kv_caches: Sequence[torch.Tensor]) -> _Known | None:
        if not isinstance(weights, ResidentWeights):
            return None
        setting = self._setting
        units = [weights.acquire(f"layer.{index}") for index in range(len(setting.blocks))]
        table = weights.acquire("embed")
        embeddings = table.get("tokens" + PACKED, table["tokens"])
        if embeddings.dtype != setting.dtype or not embeddings.is_contiguous():
            return None
        if not all(map(self._suits, units, kv_caches, setting.mixtures)):
            return None
        mixtures = [self._mixture(weights, index) for index in range(len(units))]
        if any(
            (mixture is None) != (spec is None)
            for mixture, spec in zip(mixtures, setting.mixtures, strict=True)
        ):
            return None
        layers = (LayerShape * len(units))(
            *map(self._layer, setting.blocks, units, mixtures, kv_caches)
        )
        return _Known(
            weights=weights,
            kv_caches=kv_caches,
            layers=layers,
            mixtures=mixtures,
            embeddings=embeddings,
            num_tokens=table["tokens"].shape[0],
            shape=self._shape(layers, units, mixtures, weights.acquire("norm")),
        )

    def _mixture(self, weights: WeightProvider, index: int) -> CpuMixture | None:
        """None also where the experts do not lie as the library needs them."""
        spec = self._setting.mixtures[index]
        if spec is None:
            return None
        name = f"layer.{index}"
        experts = [
            weights.acquire(f"{name}.expert.{expert}") for expert in range(spec.gate.num_experts)
        ]
        return CpuMixture.of(self._library, spec, weights.acquire(name), experts)

    def _shape(
        self,
        layers: ctypes.Array[LayerShape],
        units: Sequence[Mapping[str, torch.Tensor]],
        mixtures: Sequence[CpuMixture | None],
        norm: Mapping[str, torch.Tensor],
    ) -> StackShape:
        dense = next((unit for unit, spec in zip(units, mixtures, strict=True) if not spec), None)
        mixture = next((mixture for mixture in mixtures if mixture), None)
        return StackShape(
            addressof(layers),
            address(norm["norm.weight"]),
            None if mixture is None else addressof(mixture.shape),
            addressof(self._seconds),
            len(units),
            layers[0].block.width,
            0 if dense is None else dense["down.weight"].shape[1],
            self._setting.eps,
        )

    def _suits(
        self,
        tensors: Mapping[str, torch.Tensor],
        kv_2NBGP: torch.Tensor,
        mixture: MoeSpec | None,
    ) -> bool:
        dtype = self._setting.dtype
        packed = [tensors.get(name) for name in _ATTENTION + (() if mixture else _MLP)]
        return (
            all(weight is not None and weight.dtype == dtype for weight in packed)
            and kv_2NBGP.dtype == dtype
            and kv_2NBGP.is_contiguous()
        )

    def _layer(
        self,
        setting: BlockSetting,
        tensors: Mapping[str, torch.Tensor],
        mixture: CpuMixture | None,
        kv_2NBGP: torch.Tensor,
    ) -> LayerShape:
        names = ("up.weight" + PACKED, "up.bias", "down.weight" + PACKED, "down.bias")
        return LayerShape(
            block_shape(self._setting.spec, setting, tensors, kv_2NBGP),
            address(tensors["attention_norm.weight"]),
            address(tensors["mlp_norm.weight"]),
            *(address(None if mixture else tensors.get(name)) for name in names),
            None if mixture is None else addressof(mixture.shape),
            kv_2NBGP.data_ptr(),
        )
