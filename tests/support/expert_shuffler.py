"""Moves the experts of real ranks about at random, as often as they can."""

from __future__ import annotations

import random
import threading
from dataclasses import asdict

from moe.expert_table import ExpertTable
from moe.node_packing import ExpertRanks
from moe.placement import place_layer
from tests.support.lockstep_ranks import LockstepRanks


class Shuffler:
    """Asks the ranks and forces another random placement of all layers, again and again."""

    def __init__(self, ranks: LockstepRanks) -> None:
        self._ranks = ranks
        self._rng = random.Random(1)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> int:
        """The number of placements that were used."""
        self._over.set()
        self._thread.join()
        return self._ranks.balancer.version

    def _run(self) -> None:
        balancer = self._ranks.balancer
        while not self._over.wait(0.02):
            balancer.hear([asdict(state) for state in self._ranks.expert_states()])
            if balancer.is_resting:
                balancer.force([self._shuffled(table) for table in balancer.tables.values()])

    def _shuffled(self, table: ExpertTable) -> ExpertTable:
        slots = tuple(len(held) for held in table.logical_by_rank)
        load = [self._rng.random() ** 4 for _ in range(table.slots.num_experts)]
        placement = place_layer(load, ExpertRanks(slots=slots, nodes=(0,) * len(slots)))
        return ExpertTable.of(table.layer, placement, len(slots))
