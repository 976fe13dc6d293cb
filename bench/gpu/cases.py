"""What is measured, in groups: each group runs in a process of its own, its cases one by one.

A case is a function from the group's `Lab` to rows of the report. What other groups need to know
(the device's ceilings, our rate at batch 64) is left in `Lab.facts`, plain numbers by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench.report import Row, Samples

Facts = dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What the command line says of the models and of how long to look at them."""

    size: str
    dtype: str
    device: str
    batches: tuple[int, ...]
    steps: int
    repeats: int
    prompt_tokens: int
    prefill_tokens: int
    offload_layers: int

    @property
    def peer_batch(self) -> int:
        """The batch size at which transformers is compared."""
        return 64 if 64 in self.batches else max(self.batches)

    @property
    def is_tiny(self) -> bool:
        """A trial run whose numbers mean nothing."""
        return self.size == "tiny"


@dataclass(slots=True)
class Lab:
    """What the cases of one group share."""

    setting: Setting
    device: torch.device
    facts: Facts
    scratch: Path
    """Shared by the cases; removed at the end of the run."""
    held: dict[str, object] = field(default_factory=dict)
    """Models and engines, by name: made by the first case that needs them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One or a few rows.

    Args:
        about_s: what it takes on an H100, its share of the group's preparation included; with less
            time left it is not begun.
        run: measures.
    """

    name: str
    about_s: float
    run: Callable[[Lab], Iterable[Row]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Cases that run in one process."""

    name: str
    cases: Callable[[Setting], list[Case]]


def one(value: float) -> Samples:
    """A number that was measured once."""
    return Samples(values=(value,))
