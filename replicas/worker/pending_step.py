"""Steps that a device has been given and the host has not seen the end of.

The tokens of such a step stay on the device, where the next step reads them (`DeviceTokens`), and
travel to the host behind it, into pinned memory. Until they are there, a row's newest token is
`UNKNOWN` on the host; nothing between the launch of a step and its end makes the host wait.

    host     launch N      launch N+1        finish N   launch N+2      finish N+1
    device        [ step N .............][ step N+1 ............][ step N+2 ....
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from replicas.engine.scheduler_output import SchedulerOutput, StepOutput
from replicas.kernels.uploads import on_device
from replicas.sampling.ragged import IntArray
from replicas.sampling.sampler import SampledRow

UNKNOWN = -1
"""Stands for a token that the device knows and the host does not."""
_FIRST_ROWS = 16


class Mark(Protocol):
    """A point in the order of what a device was given."""

    @property
    def is_done(self) -> bool:
        """Whether the device has come past it."""
        ...

    def wait(self) -> None:
        """Return when it has."""
        ...

    def seconds_since(self, earlier: Mark) -> float:
        """Device time between two points that it has passed."""
        ...


class AsyncDevice(Protocol):
    """What a runner needs of a device that computes while the host goes on."""

    def mark(self) -> Mark:
        """The point that everything given so far comes before."""
        ...

    def read_back(self, tensor: torch.Tensor) -> torch.Tensor:
        """A host tensor that holds the values once a later mark is done."""
        ...


class DeviceTokens:
    """The newest sampled token of every row slot, on the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._token_S = torch.zeros(_FIRST_ROWS, dtype=torch.int64, device=device)

    def filled_in(self, token_ids_T: IntArray, slot_T: IntArray) -> torch.Tensor:
        """The tokens on the device, those that are `UNKNOWN` here from what was kept there."""
        ids_T = on_device(token_ids_T, self._device)
        if not (token_ids_T < 0).any():
            return ids_T
        kept_T = self._token_S.index_select(0, on_device(slot_T, self._device))
        return torch.where(ids_T < 0, kept_T, ids_T)

    def keep(self, slots_R: IntArray, tokens_R: torch.Tensor) -> None:
        """Note each row's newest token; those below 0 (there is none) count as 0."""
        highest = int(slots_R.max(initial=-1))
        if highest >= len(self._token_S):
            grown_S = self._token_S.new_zeros(2 * (highest + 1))
            grown_S.narrow(0, 0, len(self._token_S)).copy_(self._token_S)
            self._token_S = grown_S
        slots = on_device(slots_R, self._device)
        self._token_S.index_copy_(0, slots, tokens_R.clamp(min=0))


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingTokens:
    """One more token of each row that samples in a step."""

    sampling: IntArray
    """Requests (indices into the plan)."""
    slots: IntArray
    """Row slots of those."""
    positions: IntArray
    """Where the tokens stand."""
    token_ids: torch.Tensor
    """On the host, in pinned memory; as `Sampler.launch` says. Valid when the step has ended."""
    told: list[SampledRow] | None = None
    """What came of each row, where it is known already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingStep:
    """What is needed to answer a step when the device is done with it."""

    plan: SchedulerOutput
    tokens: PendingTokens
    began: Mark
    ended: Mark
    host_s: dict[str, float]
    """What the host spent on the launch, by part."""


@dataclass(slots=True)
class LaunchedStep:
    """A step between `launch` and `finish`."""

    pending: PendingStep | None = None
    """None: its output is there."""
    output: StepOutput | None = None

    @property
    def is_done(self) -> bool:
        """Whether `finish` would not wait."""
        return self.pending is None or self.pending.ended.is_done
