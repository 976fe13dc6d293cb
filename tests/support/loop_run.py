"""An engine loop over rank processes, and what it said."""

from __future__ import annotations

import time

from cluster.base.errors import PenstockError
from replicas.api import (
    FinishReason,
    GenerationDelta,
    GenerationRequest,
    ReplicaStats,
    SamplingParams,
)
from replicas.engine.engine_loop import EngineLoop, Recover
from tests.support.lockstep_ranks import LockstepRanks


def greedy(name: str, prompt: list[int], num_tokens: int = 12) -> GenerationRequest:
    return GenerationRequest(
        request_id=name,
        prompt_token_ids=tuple(prompt),
        params=SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True),
    )


class LoopRun:
    """An engine loop over the ranks in a thread of its own, and what it said."""

    def __init__(self, ranks: LockstepRanks, recover: Recover = lambda error: None) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.ends: dict[str, FinishReason] = {}
        self.causes: set[str] = set()
        self.fatal: list[PenstockError] = []
        self.stats = ReplicaStats()
        self.loop = EngineLoop(
            ranks.scheduler,
            ranks.executor,
            on_deltas=self._hear,
            on_fatal=self.fatal.append,
            step_timeout_s=15.0,
            recover=recover,
        )
        self.loop.start()

    def _hear(self, deltas: list[GenerationDelta], stats: ReplicaStats) -> None:
        self.stats = stats
        for delta in deltas:
            self.tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
            if delta.finish_reason is not None:
                self.ends[delta.request_id] = delta.finish_reason
            if delta.error is not None:
                self.causes.add(str(delta.error["cause"]))

    def drain(self) -> None:
        self.loop.drain()
        assert self.loop.wait_drained(60.0), self.stats
        assert self.loop.stop()

    def wait_for_tokens(self, name: str, count: int) -> None:
        deadline_s = time.monotonic() + 30.0
        while len(self.tokens.get(name, ())) < count:
            assert time.monotonic() < deadline_s
            time.sleep(0.005)
