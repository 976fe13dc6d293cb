"""An engine loop over rank processes, what it said, and what transformers says."""

from __future__ import annotations

import random
import time
from pathlib import Path

import torch
import transformers

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


def said_by_transformers(model: Path, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    """Greedy answers of that many tokens, in fp32."""
    oracle = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    answers = []
    for prompt in prompts:
        output = oracle.generate(
            torch.tensor([prompt]),
            do_sample=False,
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
        )
        answers.append(output[0, len(prompt) :].tolist())
    return answers


def check_alone_and_together(
    ranks: LockstepRanks, prompts: list[list[int]], oracle: list[list[int]]
) -> None:
    """One at a time all groups but one idle; together no group does."""
    engine = ranks.engine()
    for number, prompt in enumerate(prompts):
        (alone,) = engine.generate([greedy(f"alone{number}", prompt)])
        assert alone.token_ids == oracle[number]
    together = engine.generate([greedy(f"all{n}", p) for n, p in enumerate(prompts)])
    assert [completion.token_ids for completion in together] == oracle


def check_random_arrivals(
    ranks: LockstepRanks, prompts: list[list[int]], oracle: list[list[int]], count: int
) -> None:
    """Requests come at any time and a fifth is aborted: the others say what they would alone."""
    run, rng = LoopRun(ranks), random.Random(4)
    for number in range(count):
        index = rng.randrange(len(prompts))
        run.loop.add_request(greedy(f"{number} {index}", prompts[index]))
        if rng.random() < 0.2:
            run.loop.abort(f"{number} {index}")
        time.sleep(rng.choice((0.0, 0.0, 0.01, 0.05)))
    run.drain()
    assert run.fatal == []
    assert len(run.ends) == count
    for name, reason in run.ends.items():
        answer = oracle[int(name.split()[1])]
        said = run.tokens[name]
        assert said == answer[: len(said)]
        assert reason is FinishReason.ABORT or said == answer
