"""Runs a pass over micro-batches: each layer's weights are taken once, whatever the step's size.

What a layer holds beside its input and output (projections, MLP) is that of one micro-batch, so a
step may have as many tokens as the transfer of the weights hides, in the memory of a small one.
Where the KV cache is in host memory, the blocks of a micro-batch pass through a window on the
device. The bits are those of the step as a whole: a row depends on its own request alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from offload.micro_batches import Cut, cut_rows, part_of
from offload.pass_caches import CachesInPlace, PassCaches, WindowedCaches
from offload.pass_schedule import PassOpKind, build_pass
from replicas.layers.attention import StepContext
from replicas.layers.weights import AnnouncedWeights, WeightProvider, WeightUnit

if TYPE_CHECKING:
    import torch

    from offload.kv_windows import KvWindows
    from replicas.kernels.ops import Kernels
    from replicas.models.arch import ArchConfig
    from replicas.models.decoder import ForwardBatch, LayeredModel


class ZigzagModel:
    """Implements `DecoderModel`.

    Args:
        model: computes the layers.
        max_tokens: most rows of a micro-batch; 0: all of a step's.
        windows: what the KV cache passes through; None: layers compute on the cache itself.
    """

    def __init__(
        self, model: LayeredModel, max_tokens: int, windows: KvWindows | None = None
    ) -> None:
        self.arch: ArchConfig = model.arch
        self.units: tuple[WeightUnit, ...] = model.units
        self.kernels: Kernels = model.kernels
        self._model = model
        self._max_tokens = max_tokens
        self._windows = windows

    def forward(
        self,
        batch: ForwardBatch,
        weights: WeightProvider,
        kv_caches: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """See `DecoderModel.forward`."""
        if self._windows is None:
            cuts = cut_rows(batch.attention, self._max_tokens)
            if len(cuts) == 1:
                return self._model.forward(batch, weights, kv_caches)
            return self._run(batch, weights, cuts, CachesInPlace(kv_caches))
        windows = self._windows
        cuts = cut_rows(
            batch.attention,
            self._max_tokens,
            block_size=windows.block_size,
            max_blocks=windows.num_blocks,
        )
        with WindowedCaches(windows) as caches:
            return self._run(batch, weights, cuts, caches)

    def forward_idle(self, weights: WeightProvider) -> None:
        """See `DecoderModel.forward_idle`."""
        self._model.forward_idle(weights)

    def logits(self, hidden_RD: torch.Tensor, weights: WeightProvider) -> torch.Tensor:
        """See `DecoderModel.logits`."""
        return self._model.logits(hidden_RD, weights)

    def _run(
        self,
        batch: ForwardBatch,
        weights: WeightProvider,
        cuts: Sequence[Cut],
        caches: PassCaches,
    ) -> torch.Tensor:
        hidden_TD, context = self._model.begin(batch, weights)
        parts = [_context_of(context, cut, caches) for cut in cuts]
        joins = tuple(cut.joins for cut in cuts)
        with held_layers(weights) as held:
            for op in build_pass(self.arch.num_layers, joins, caches.num_windows):
                match op.kind:
                    case PassOpKind.TAKE:
                        held.take(f"layer.{op.layer}")
                    case PassOpKind.LOAD_KV:
                        caches.load(op)
                    case PassOpKind.COMPUTE:
                        rows_TD = hidden_TD[cuts[op.part].start : cuts[op.part].stop]
                        cache = caches.cache(op)
                        output_TD = self._model.layer(
                            op.layer, rows_TD, parts[op.part], held, cache
                        )
                        rows_TD.copy_(output_TD)
                    case PassOpKind.STORE_KV:
                        caches.store(op)
                    case PassOpKind.GIVE:
                        held.give()
        return self._model.end(hidden_TD, weights)


def _context_of(context: StepContext, cut: Cut, caches: PassCaches) -> StepContext:
    cos_sin = context.cos_sin
    if cos_sin is not None:
        cos_sin = cos_sin[0][cut.start : cut.stop], cos_sin[1][cut.start : cut.stop]
    attention = caches.place(part_of(context.attention, cut))
    return replace(context, attention=attention, cos_sin=cos_sin)


class HeldLayers:
    """A `WeightProvider` that keeps one layer acquired while several micro-batches use it.

    Guesses of the next layer's experts do not pass: this layer's further micro-batches come first.
    """

    def __init__(self, weights: WeightProvider) -> None:
        self._weights = weights
        self._unit: str | None = None
        self._tensors: Mapping[str, torch.Tensor] = {}

    def take(self, unit: str) -> None:
        """Acquire the unit until `give`; raises as the provider."""
        self._tensors = self._weights.acquire(unit)
        self._unit = unit

    def give(self) -> None:
        """Release what was taken, if anything was."""
        unit, self._unit = self._unit, None
        if unit is not None:
            self._weights.release(unit)

    def acquire(self, unit: str) -> Mapping[str, torch.Tensor]:
        """What is held, or as the provider."""
        return self._tensors if unit == self._unit else self._weights.acquire(unit)

    def announce(self, units: Sequence[str], rows: Sequence[int]) -> Sequence[int]:
        """See `AnnouncedWeights.announce`."""
        if isinstance(self._weights, AnnouncedWeights):
            return self._weights.announce(units, rows)
        return range(len(units))

    def release(self, unit: str) -> None:
        """As the provider, but for what is held."""
        if unit != self._unit:
            self._weights.release(unit)


@contextmanager
def held_layers(weights: WeightProvider) -> Iterator[HeldLayers]:
    """Layers of the provider, of which none stays taken when the block ends, by an error too."""
    held = HeldLayers(weights)
    try:
        yield held
    finally:
        held.give()
