"""The weights of a rank that holds some units and streams the others.

What the engine sees is a `WeightProvider` like any other; how a unit came is nobody's business.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.base.errors import InternalError
from offload.expert_cache import ExpertCache
from offload.link import LinkStats
from offload.lockstep_ring import LockstepRing
from offload.ring import Ring
from replicas.engine.weight_traffic import WeightTraffic

if TYPE_CHECKING:
    import torch

    from replicas.layers.weights import Tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamStats:
    """What streaming has cost since the start."""

    reader: str
    ring: LinkStats
    experts: LinkStats
    num_jumps: int
    num_expert_hits: int = 0
    """Visits of streamed experts that found them in a slot; the others are misses."""
    num_expert_misses: int = 0
    num_experts_on_host: int = 0
    """Visits that the host computed, where that was sooner than to fetch the expert."""
    num_early_useful: int = 0
    """Experts that were read because a gate's guess named them, and used."""
    num_early_wasted: int = 0
    """The same, and evicted unused."""


class StreamedWeights:
    """Implements `WeightProvider`.

    Args:
        resident: tensors of the units that stay.
        ring: the units that stream in the model's order, for this rank alone or together with
            others; None: there are none.
        experts: the units that are read when a token asks for them; None: there are none.
        reader: name of what reads.
        on_close: gives memory and files back; also called when the process ends in order.
    """

    def __init__(
        self,
        resident: Mapping[str, Mapping[str, torch.Tensor]],
        ring: Ring | LockstepRing | None,
        experts: ExpertCache | None,
        *,
        reader: str,
        on_close: Callable[[], None],
    ) -> None:
        self._resident = resident
        self._ring = ring
        self._experts = experts
        self._reader = reader
        self._finalizer = weakref.finalize(self, on_close)

    def acquire(self, unit: str) -> Mapping[str, torch.Tensor]:
        """The unit's tensors, valid until `release`; waits for a streamed one.

        Raises:
            WeightStreamError: it could not be read, or not in time.
            CorruptWeightsError: what was read is not what was packed.
        """
        if (tensors := self._resident.get(unit)) is not None:
            return tensors
        return self._home(unit).acquire(unit)

    def announce(self, units: Sequence[str], rows: Sequence[int]) -> Sequence[int]:
        """See `AnnouncedWeights`; these are experts, and others' places are not for them."""
        return range(len(units)) if self._experts is None else self._experts.announce(units, rows)

    def foresee(self, layer: str, guess: Callable[[Tensors], Sequence[int]]) -> None:
        """See `ForeseeingWeights`; only for a layer whose own tensors stay, others come later."""
        if self._experts is None or not self._experts.wants_guess(layer):
            return
        tensors = self._resident.get(layer)
        if tensors is not None:
            self._experts.foresee([f"{layer}.expert.{expert}" for expert in guess(tensors)])

    def release(self, unit: str) -> None:
        """The unit's memory may be reused; what comes next starts to load."""
        if unit not in self._resident:
            self._home(unit).release(unit)

    @property
    def stats(self) -> StreamStats:
        """Bytes read and time lost so far."""
        return StreamStats(
            reader=self._reader,
            ring=LinkStats() if self._ring is None else self._ring.stats,
            experts=LinkStats() if self._experts is None else self._experts.stats,
            num_jumps=0 if self._ring is None else self._ring.num_jumps,
            num_expert_hits=0 if self._experts is None else self._experts.num_hits,
            num_expert_misses=0 if self._experts is None else self._experts.num_misses,
            num_experts_on_host=0 if self._experts is None else self._experts.num_on_host,
            num_early_useful=0 if self._experts is None else self._experts.num_early_useful,
            num_early_wasted=0 if self._experts is None else self._experts.num_early_wasted,
        )

    @property
    def traffic(self) -> WeightTraffic:
        """The same for the engine's metrics."""
        stats = self.stats
        return WeightTraffic(
            read_bytes=stats.ring.num_bytes + stats.experts.num_bytes,
            wait_s=stats.ring.wait_s + stats.experts.wait_s,
            expert_hits=stats.num_expert_hits,
            expert_misses=stats.num_expert_misses,
            early_useful=stats.num_early_useful,
            early_wasted=stats.num_early_wasted,
        )

    def close(self) -> None:
        """End the reads under way and give everything back; safe to call twice."""
        self._finalizer()

    def end_step(self) -> None:
        """See `StepwiseWeights`; raises as `acquire`, for a rank that is lost as well."""
        if isinstance(self._ring, LockstepRing):
            self._ring.end_pass()

    def _home(self, unit: str) -> Ring | LockstepRing | ExpertCache:
        for home in (self._ring, self._experts):
            if home is not None and unit in home:
                return home
        raise InternalError(f"There is no weight unit {unit!r}.")
