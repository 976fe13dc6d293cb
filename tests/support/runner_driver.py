"""Drives a `ModelRunner` as a very simple scheduler would: one plan after another, by hand."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from replicas.api import Pooling, SamplingParams
from replicas.engine.scheduler_output import NewRequest, RequestResult, SchedulerOutput
from replicas.worker.model_runner import ModelRunner
from tests.support.fake_decoder import BLOCK_SIZE, NO_WEIGHTS, FakeDecoder, fake_kv_caches


class RunnerDriver:
    """Keeps the tokens, the computed counts and the blocks of each request.

    A request whose sampling failed has the stand-in token 0, as in the runner's own row.
    """

    def __init__(self, model: FakeDecoder | None = None, *, is_output_rank: bool = True) -> None:
        self.model = model or FakeDecoder()
        ticks = itertools.count()
        self.kv_caches = fake_kv_caches()
        self.runner = ModelRunner(
            self.model,
            NO_WEIGHTS,
            self.kv_caches,
            block_size=BLOCK_SIZE,
            max_context=256,
            is_output_rank=is_output_rank,
            clock=lambda: float(next(ticks)),
        )
        self.tokens: dict[int, list[int]] = {}
        self.blocks: dict[int, list[int]] = {}
        self._pooling: dict[int, Pooling | None] = {}
        self._computed: dict[int, int] = {}
        self._news: list[NewRequest] = []
        self._finished: list[int] = []
        self._block_ids = itertools.count(1)
        self._steps = itertools.count()

    def add(
        self,
        key: int,
        tokens: Sequence[int],
        params: SamplingParams | None = None,
        *,
        pooling: Pooling | None = None,
        num_prompt: int | None = None,
    ) -> None:
        self._pooling[key] = pooling
        self.tokens[key], self.blocks[key] = list(tokens), []
        self._computed[key] = 0
        self._news.append(
            NewRequest(
                key=key,
                token_ids=tuple(tokens),
                num_prompt_tokens=len(tokens) if num_prompt is None else num_prompt,
                params=params or SamplingParams(temperature=0.0),
                pooling=pooling,
            )
        )

    def finish(self, key: int) -> None:
        self._finished.append(key)

    def step(self, scheduled: Mapping[int, int]) -> dict[int, RequestResult]:
        """Run `scheduled[key]` tokens of each key, sampling where all tokens are computed."""
        rows = [self._row(key, count) for key, count in scheduled.items()]
        plan = SchedulerOutput(
            step=next(self._steps),
            new_requests=tuple(self._news),
            keys=tuple(scheduled),
            num_scheduled_tokens=tuple(scheduled.values()),
            num_computed_tokens=tuple(computed for computed, _, _ in rows),
            new_block_ids=tuple(blocks for _, blocks, _ in rows),
            samples=tuple(samples for _, _, samples in rows),
            finished_keys=tuple(self._finished),
        )
        self._news, self._finished = [], []
        self.output = self.runner.execute(plan)
        results = {result.key: result for result in self.output.results}
        for key, samples in zip(plan.keys, plan.samples, strict=True):
            sampled = results[key].token_ids if key in results else ()
            if samples:
                self.tokens[key] += sampled or (0,)
        return results

    def _row(self, key: int, count: int) -> tuple[int, tuple[int, ...], bool]:
        computed, end = self._computed[key], self._computed[key] + count
        missing = -(-end // BLOCK_SIZE) - len(self.blocks[key])
        blocks = tuple(itertools.islice(self._block_ids, max(0, missing)))
        self.blocks[key] += blocks
        self._computed[key] = end
        samples = end == len(self.tokens[key]) and self._pooling[key] is None
        return computed, blocks, samples

    def generate(self, key: int, count: int) -> list[int]:
        """Finish the prompt in one step, then decode; the new tokens."""
        start = len(self.tokens[key])
        for _ in range(count):
            self.step({key: len(self.tokens[key]) - self._computed[key]})
        return self.tokens[key][start:]
