"""A worker without a model: a paged KV store of hashes that notices every block-table mistake.

The "KV" of position p is a hash chained over the tokens up to p, and it is built from what is read
back through the row's block table, so a wrong, stale, shared or unwritten block changes the
answer or raises. `expected_*` compute the same answers from the tokens alone.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from replicas.api import FinishReason, GenerationRequest, Pooling, SamplingParams, TokenLogprob
from replicas.engine.scheduler_config import SchedulerConfig
from replicas.engine.scheduler_output import (
    NewRequest,
    RequestResult,
    SchedulerOutput,
    StepOutput,
)

VOCAB = 50
EOS = (7,)
COPYING = 100
"""Requests with this seed or a larger one repeat themselves, but for a token now and then."""
_MASK = (1 << 64) - 1


def mix(state: int, value: int) -> int:
    state = (state ^ (value + 0x9E3779B97F4A7C15)) * 0xBF58476D1CE4E5B9 & _MASK
    return state ^ (state >> 29)


def next_token(kv: int, params: SamplingParams, index: int, position: int, num_output: int) -> int:
    token = mix(mix(mix(kv, params.seed), index), position) % VOCAB
    if params.seed >= COPYING and kv % 7:
        token = 10 + position % 6
    banned = set(params.stop_token_ids) | (set() if params.ignore_eos else set(EOS))
    while num_output < params.min_tokens and token in banned:
        token = (token + 1) % VOCAB
    return token


def score(kv: int, token_id: int) -> TokenLogprob:
    return TokenLogprob(token_id=token_id, logprob=-(mix(kv, token_id) % 997) / 100, rank=1)


@dataclass
class Expected:
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    embedding: tuple[float, ...] = ()
    finish_reason: FinishReason = FinishReason.LENGTH
    stop_token_id: int | None = None


def expected(request: GenerationRequest, index: int, max_context: int) -> Expected:
    """What choice `index` must say, from the definition and without an engine."""
    params, answer, kv, total = request.params, Expected(), 0, 0
    for position, token_id in enumerate(request.prompt_token_ids):
        if params.prompt_logprobs is not None:
            answer.prompt_logprobs.append(score(kv, token_id) if position else None)
        kv = mix(kv, token_id)
        total += kv % 1000
    if request.pooling is not None:
        last = float(kv % 1000)
        answer.embedding = (float(total) if request.pooling is Pooling.MEAN else last,)
        answer.finish_reason = FinishReason.STOP
        return answer
    position = len(request.prompt_token_ids)
    while len(answer.token_ids) < params.max_tokens and position < max_context:
        token_id = next_token(kv, params, index, position, len(answer.token_ids))
        answer.token_ids.append(token_id)
        if params.logprobs is not None:
            answer.logprobs.append(score(kv, token_id))
        ends = token_id in params.stop_token_ids or (token_id in EOS and not params.ignore_eos)
        if ends and len(answer.token_ids) > params.min_tokens:
            answer.finish_reason, answer.stop_token_id = FinishReason.STOP, token_id
            break
        kv = mix(kv, token_id)
        position += 1
    return answer


@dataclass
class Row:
    new: NewRequest
    token_ids: list[int]
    blocks: list[int]
    first_computed: int | None = None
    total: int = 0
    failed_step: int | None = None


class SimulatedExecutor:
    """Implements `Executor`; raises `AssertionError` when a plan breaks the contract."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.rows: dict[int, Row] = {}
        self.kv: dict[int, tuple[int, int]] = {}
        self.plans: deque[SchedulerOutput] = deque()
        self.submitted: list[SchedulerOutput] = []
        self.history: list[SchedulerOutput] = []
        self.is_ready: Callable[[], bool] = lambda: True
        self.errors: dict[str, str] = {}
        """Choice index or key as text -> error to report for it."""
        self.errors_from: dict[int, int] = {}
        """Key -> step from which on it fails."""
        self.fail_with: Exception | None = None
        self.before_collect: Callable[[], None] = lambda: None
        self.num_copies = self.num_replaced = self.num_drafted = 0

    def submit(self, plan: SchedulerOutput) -> None:
        # One of several groups in lock-step idles in some steps.
        assert plan.step > (self.submitted[-1].step if self.submitted else 0)
        self.submitted.append(plan)
        self.plans.append(plan)

    def poll(self, timeout_s: float) -> bool:
        assert self.plans
        return self.is_ready()

    def collect(self, timeout_s: float) -> StepOutput:
        self.before_collect()
        if self.fail_with is not None:
            raise self.fail_with
        plan = self.plans.popleft()
        self.history.append(plan)
        self.check_plan(plan)
        self.apply(plan)
        results = []
        for i, key in enumerate(plan.keys):
            start, count = plan.num_computed_tokens[i], plan.num_scheduled_tokens[i]
            row = self.rows[key]
            result = self.compute(row, start, count, sample=plan.samples[i], draft=plan.draft(i))
            if self.errors_from.get(key, plan.step + 1) <= plan.step:
                self.errors[str(key)] = "NaN logits"
            if str(key) in self.errors:
                # A failed request may be in the one step that was planned on top.
                row.failed_step = row.failed_step or plan.step
                assert plan.step <= row.failed_step + 1
                result_tokens = result.token_ids
                result = RequestResult(key=key, error=self.errors[str(key)])
                if plan.samples[i]:
                    # A draft is not checked further than the failure.
                    del row.token_ids[len(row.token_ids) - len(result_tokens) + 1 :]
                    row.token_ids[-1] = 0
            if result != RequestResult(key=key):
                results.append(result)
        return StepOutput(step=plan.step, results=tuple(results))

    def close(self) -> None:
        pass

    def check_plan(self, plan: SchedulerOutput) -> None:
        num_rows = len(plan.keys)
        for column in (
            plan.num_scheduled_tokens,
            plan.num_computed_tokens,
            plan.new_block_ids,
            plan.samples,
        ):
            assert len(column) == num_rows
        assert len(plan.draft_token_ids) in (0, num_rows)
        assert sum(plan.samples) + sum(map(len, plan.draft_token_ids)) <= 256
        assert len(set(plan.keys)) == num_rows
        assert 0 < plan.num_tokens <= self.config.max_step_tokens
        assert num_rows <= self.config.max_running_requests
        assert all(count >= 1 for count in plan.num_scheduled_tokens)
        assert {new.key for new in plan.new_requests} <= set(plan.keys)

    def apply(self, plan: SchedulerOutput) -> None:
        for key in plan.finished_keys:
            del self.rows[key]
        for new in plan.new_requests:
            assert new.key not in self.rows
            self.rows[new.key] = Row(new, list(new.token_ids), [])
        for key, blocks in zip(plan.keys, plan.new_block_ids, strict=True):
            self.rows[key].blocks.extend(blocks)
            assert all(0 <= block < self.config.num_blocks for block in blocks)
        for key, index, block in plan.replaced_blocks:
            self.rows[key].blocks[index] = block
            self.num_replaced += 1
        size = self.config.block_size
        for source, target in plan.block_copies:
            self.num_copies += 1
            for offset in range(size):
                self.kv.pop(target * size + offset, None)
                if source * size + offset in self.kv:
                    self.kv[target * size + offset] = self.kv[source * size + offset]

    def compute(
        self, row: Row, start: int, count: int, *, sample: bool, draft: tuple[int, ...] = ()
    ) -> RequestResult:
        key, params = row.new.key, row.new.params
        num_prompt, size = row.new.num_prompt_tokens, self.config.block_size
        assert start + count <= len(row.token_ids) + len(draft) <= self.config.max_context
        # If all of a draft is right, there is still a token to come.
        assert not draft or len(row.token_ids) + len(draft) < num_prompt + params.max_tokens
        spare = self.config.speculation.num_tokens if self.config.speculation else 0
        assert 0 <= len(row.blocks) - -(-(start + count) // size) <= -(-spare // size)
        if draft:
            assert sample
            assert start == len(row.token_ids) - 1
        if row.first_computed is None:
            row.first_computed = start
        kv = self.read_context(row, start)
        count -= len(draft)
        scores = []
        for position in range(start, start + count):
            kv = self.write(row, position, kv)
            row.total += kv % 1000
            if params.prompt_logprobs is not None and position + 1 < num_prompt:
                scores.append(score(kv, row.token_ids[position + 1]))
        end = start + count
        embedding: tuple[float, ...] = ()
        if row.new.pooling is Pooling.LAST and end == num_prompt:
            embedding = (float(kv % 1000),)
        elif row.new.pooling is Pooling.MEAN and end == num_prompt:
            assert row.first_computed == 0, "mean pooling did not see the whole prompt"
            embedding = (float(row.total),)
        token_ids, logprobs = [], []
        if sample:
            assert end == len(row.token_ids)
            token_ids, logprobs = self.sample(row, kv, draft)
            row.token_ids += token_ids
        return RequestResult(
            key=key,
            token_ids=tuple(token_ids),
            logprobs=tuple(logprobs),
            prompt_logprobs=tuple(scores),
            embedding=embedding,
        )

    def sample(
        self, row: Row, kv: int, draft: tuple[int, ...]
    ) -> tuple[list[int], list[TokenLogprob]]:
        """The tokens after the row's last one, as far as the draft was right and one more.

        The KV of the whole draft is written, right or wrong.
        """
        params, num_prompt = row.new.params, row.new.num_prompt_tokens
        known, is_right = len(row.token_ids), True
        token_ids: list[int] = []
        logprobs = []
        for count, position in enumerate(range(known, known + len(draft) + 1)):
            if is_right:
                token_id = next_token(
                    kv, params, row.new.choice_index, position, position - num_prompt
                )
                token_ids.append(token_id)
                if params.logprobs is not None:
                    logprobs.append(score(kv, token_id))
                is_right = count < len(draft) and draft[count] == token_id
            if count < len(draft):
                kv = self.write(row, position, kv, draft[count])
                self.num_drafted += 1
        return token_ids, logprobs

    def slot(self, row: Row, position: int) -> int:
        size = self.config.block_size
        return row.blocks[position // size] * size + position % size

    def read_context(self, row: Row, length: int) -> int:
        """Every position before the query, through the block table, checked against the tokens."""
        kv = 0
        for position in range(length):
            kv = mix(kv, row.token_ids[position])
            slot = self.slot(row, position)
            assert slot in self.kv, f"key {row.new.key} reads unwritten slot {slot}"
            assert self.kv[slot] == (position, kv), f"key {row.new.key} reads foreign KV at {slot}"
        return kv

    def write(self, row: Row, position: int, kv: int, token_id: int | None = None) -> int:
        block = row.blocks[position // self.config.block_size]
        for other in self.rows.values():
            assert other is row or block not in other.blocks, f"write to shared block {block}"
        kv = mix(kv, row.token_ids[position] if token_id is None else token_id)
        self.kv[self.slot(row, position)] = (position, kv)
        return kv


def request(
    request_id: str,
    prompt: tuple[int, ...] | list[int],
    *,
    pooling: Pooling | None = None,
    priority: int = 0,
    cache_salt: str = "",
    **params: object,
) -> GenerationRequest:
    """A request with short-hand sampling parameters."""
    return GenerationRequest(
        request_id=request_id,
        prompt_token_ids=tuple(prompt),
        params=dataclasses.replace(SamplingParams(), **params),
        pooling=pooling,
        priority=priority,
        cache_salt=cache_salt,
    )


def config(**overrides: Any) -> SchedulerConfig:
    """A roomy scheduler, but for what the test overrides."""
    limits: dict[str, Any] = {
        "max_running_requests": 16,
        "max_step_tokens": 64,
        "max_context": 128,
        "block_size": 4,
        "num_blocks": 256,
    }
    return SchedulerConfig(**{**limits, **overrides})
