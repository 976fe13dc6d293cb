"""Experts on devices behind an exchange of host memory.

The exchanges move rows of host memory: over gloo, over streams, through memory that ranks of a
node share. A rank whose rows and experts are on a device stands in front of them with copies, two
each way:

    device   rows, ids, weights        arrived rows -> experts -> sums        summed rows
                  | to_host                ^ to_device           | to_host        ^ to_device
    host          '- dispatch ~~~~ wait ---'                     '--- combine ----'

The host waits for the device twice in a layer, for the routed rows and for the sums: it has to know
the counts before it can send. Rows travel while the device computes the shared experts. Sums come
over in fp64, as the exact rule has them (`moe/exact_sums.py`), so the bits are those of host ranks
with the same kernels. A rank without rows copies nothing, but enters every exchange as others do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from moe.exchange.base import Arrivals, Exchange, Pending
from moe.layout import ExpertLayout


class Stage(Protocol):
    """Copies between a device and the host's memory, in the order of the device's work."""

    def to_host(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The values as of all work given so far; waits for it. Valid until the next call."""
        ...

    def to_device(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The same values on the device, for work that is given from now on; does not wait for it.

        The tensors may be changed as soon as this returns.
        """
        ...


class StagedExperts:
    """Implements `ExpertLayout` for a rank on a device, over its layout in host memory.

    Args:
        host: where the experts are; its exchanges take and give host tensors.
        stage: of the device.
    """

    def __init__(self, host: ExpertLayout, stage: Stage) -> None:
        self._host = host
        self._stage = stage

    def held(self, layer: int) -> tuple[int, ...]:
        """See `ExpertLayout.held`."""
        return self._host.held(layer)

    def exchange(self, layer: int) -> Exchange:
        """What moves this layer's rows; asked anew on every pass, as experts move."""
        return StagedExchange(self._host, layer, self._stage)

    def physical(self, layer: int, expert_TK: torch.Tensor) -> torch.Tensor:
        """Logical ones still: which copy is chosen on the host, where ids arrive with rows."""
        return expert_TK


class StagedExchange:
    """Implements `Exchange` for device tensors; takes logical experts.

    Args:
        host: as for `StagedExperts`.
        layer: the decoder layer's index.
    """

    def __init__(self, host: ExpertLayout, layer: int, stage: Stage) -> None:
        self._host = host
        self._layer = layer
        self._stage = stage
        self._exchange = host.exchange(layer)

    @property
    def name(self) -> str:
        """The scheme underneath."""
        return self._exchange.name

    def dispatch(
        self, hidden_TD: torch.Tensor, expert_TK: torch.Tensor, weight_TK: torch.Tensor
    ) -> StagedPending:
        """See `Exchange.dispatch`; waits until the device has routed the rows."""
        hidden, expert, weight = self._stage.to_host([hidden_TD, expert_TK, weight_TK])
        physical = self._host.physical(self._layer, expert)
        return StagedPending(self._exchange.dispatch(hidden, physical, weight), self._stage)

    def combine(self, partial_AD: torch.Tensor, arrivals: Arrivals) -> torch.Tensor:
        """See `Exchange.combine`; waits until the device has computed the experts."""
        on_host: Arrivals = arrivals.ticket
        (partial,) = self._stage.to_host([partial_AD])
        (home_TD,) = self._stage.to_device([self._exchange.combine(partial, on_host)])
        return home_TD


@dataclass(frozen=True, slots=True)
class StagedPending:
    """Implements `Pending`."""

    inner: Pending
    stage: Stage

    def wait(self) -> Arrivals:
        """The arrived rows on the device; their ticket is what arrived on the host."""
        on_host = self.inner.wait()
        hidden, slot, weight = self.stage.to_device(
            [on_host.hidden_AD, on_host.slot_AK, on_host.weight_AK]
        )
        return replace(on_host, hidden_AD=hidden, slot_AK=slot, weight_AK=weight, ticket=on_host)
