"""The seam between model code and the home of its weights.

A model is a list of `WeightUnit`s (embedding, each layer, head). A layer declares, once, which
local tensors it needs and from which slices of which checkpoint tensors they are made
(`TensorSpec`): loader, memory planner and offload layout all read that declaration. The forward
pass brackets each unit with `acquire`/`release`; where the bytes are in between (resident, or
streamed through a ring) is the provider's affair.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar, cast, runtime_checkable

if TYPE_CHECKING:
    import torch

    Tensors = Mapping[str, torch.Tensor]

Made = TypeVar("Made")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A rectangular piece of one checkpoint tensor.

    `index` picks one entry of a stack (GPT-OSS stores all experts of a layer in one tensor);
    `dim`/`start`/`stop`/`step` slice what is stored, or the entry picked (None: all of it);
    `transpose` then swaps its two axes (GPT-2 stores linear weights as (in, out)).
    """

    name: str
    dim: int = 0
    start: int | None = None
    stop: int | None = None
    step: int = 1
    index: int | None = None
    transpose: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One local tensor of one rank: its pieces are concatenated along dim 0.

    `shape` is the local shape. When the pieces are shorter than `shape[0]` the rest is zero
    (padding of a vocabulary that the ranks do not divide).
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[Source, ...]
    full_shapes: tuple[tuple[int, ...], ...] = ()
    """Stored global shape of each source's checkpoint tensor, checked at load."""
    duplicates: tuple[str, ...] = ()
    """Checkpoint names that may hold a second copy of the (single) source, equal if present; one
    of them stands in when the source itself is absent (tied embeddings)."""
    dtype: str | None = None
    """What it is kept in; None: the model's own dtype."""

    @property
    def is_linear(self) -> bool:
        """Whether layers compute with it through `Kernels.linear` (the head of a model too)."""
        return len(self.shape) == 2 and (self.name.endswith(".weight") or self.name == "lm_head")


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightUnit:
    """What is acquired and released together: `embed`, `layer.0` ... `layer.N-1`, `head`.

    A routed expert is a unit of its own, `layer.2.expert.7` by its logical id, acquired while its
    layer is, and only when a token of the step visits it.
    """

    name: str
    tensors: tuple[TensorSpec, ...]
    unused: tuple[str, ...] = ()
    """Checkpoint names that may stand beside this unit's and that this rank does not read: experts
    of other ranks. One that ends in a dot is a prefix."""


class WeightProvider(Protocol):
    """Hands out the tensors of a unit; calls come in the model's order, one step after another."""

    def acquire(self, unit: str) -> Mapping[str, torch.Tensor]:
        """Tensors of `unit` by `TensorSpec.name`, valid until `release(unit)`."""
        ...

    def release(self, unit: str) -> None:
        """The step is done with `unit`; its memory may be reused."""
        ...


@runtime_checkable
class AnnouncedWeights(Protocol):
    """A provider that can use to know what comes."""

    def announce(self, units: Sequence[str], rows: Sequence[int]) -> Sequence[int]:
        """These units are asked for next, each for so many rows.

        Returns:
            The order that waits least, as indices into `units`.
        """
        ...


@runtime_checkable
class ForeseeingWeights(Protocol):
    """A provider that reads early what a later layer will probably ask for."""

    def foresee(self, layer: str, guess: Callable[[Tensors], Sequence[int]]) -> None:
        """`guess` of that layer's own tensors gives experts, the likeliest first.

        It is called at once or not at all: only where to know would help.
        """
        ...


@runtime_checkable
class StepwiseWeights(Protocol):
    """A provider that several ranks fill together, in step."""

    def end_step(self) -> None:
        """The step has asked for all that it wants; the others may have asked for more."""
        ...


@contextmanager
def acquired(weights: WeightProvider, unit: str) -> Iterator[Mapping[str, torch.Tensor]]:
    """The unit's tensors for the length of a `with` block; released on errors too."""
    tensors = weights.acquire(unit)
    try:
        yield tensors
    finally:
        weights.release(unit)


class ResidentWeights:
    """Every unit stays in memory for good."""

    def __init__(self, units: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        self._units = dict(units)
        self._derived: dict[Hashable, tuple[Hashable, object]] = {}

    def acquire(self, unit: str) -> Mapping[str, torch.Tensor]:
        """The unit's tensors; no cost."""
        return self._units[unit]

    def release(self, unit: str) -> None:
        """Nothing to give back."""

    def holds(self, unit: str) -> bool:
        """Whether a unit is here."""
        return unit in self._units

    def derived(self, key: Hashable, version: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` made of some units' tensors under this key, anew when the version changes."""
        known = self._derived.get(key)
        if known is None or known[0] != version:
            known = self._derived[key] = (version, make())
        return cast("Made", known[1])

    def exchange(
        self, added: Mapping[str, Mapping[str, torch.Tensor]], dropped: Iterable[str]
    ) -> None:
        """Take in units and give up others; between steps."""
        self._derived.clear()
        self._units.update(added)
        for unit in dropped:
            del self._units[unit]
