"""The engine's state of one choice of a request: what it has, what is computed, what was said.

Only the scheduler and its output processor change it. A step counts from the moment it is planned,
so a request may have tokens that nobody knows yet. Invariants while alive:

    0 .. num_prompt_tokens   .. num_tokens                        the rest is output
    0 .. num_answered_tokens .. num_computed_tokens               KV exists | will, in plan order
    0 .. num_computed_tokens .. num_tokens + num_pending_tokens   pending ones are being sampled

While a draft is being checked, `num_computed_tokens` is `num_tokens + num_draft_tokens`, and falls
back to what was right when the step answers. Nothing is planned for the request meanwhile.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from replicas.api import GenerationRequest, Pooling, SamplingParams, TokenLogprob


class RequestStatus(enum.Enum):
    """Where a choice stands."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


@dataclass(slots=True, kw_only=True, eq=False)
class EngineRequest:
    """One choice. `key` grows with arrival, so (priority, key) is the order of importance."""

    key: int
    request_id: str
    index: int
    params: SamplingParams
    pooling: Pooling | None
    priority: int
    cache_salt: str
    num_prompt_tokens: int
    max_num_tokens: int
    """Prompt and output tokens at which it ends."""
    token_ids: list[int]
    arrival_s: float = 0.0
    status: RequestStatus = RequestStatus.WAITING
    has_row: bool = False
    """Whether the workers have a row for it once all plans are executed."""
    num_computed_tokens: int = 0
    """Tokens whose KV exists once all planned steps are executed."""
    num_answered_tokens: int = 0
    """Tokens whose KV exists for sure: their steps have answered."""
    num_pending_tokens: int = 0
    """Tokens that steps in flight will give."""
    num_steps_in_flight: int = 0
    num_draft_tokens: int = 0
    """Drafted tokens in the step in flight; counted as computed until it has answered."""
    num_cached_tokens: int | None = None
    """Prompt tokens found in the prefix cache; None before the first admission."""
    num_scored_tokens: int = 0
    """Prompt tokens whose logprob entry went out (the first one's entry is None)."""
    kept_scores: list[TokenLogprob | None] = field(default_factory=list)
    """What went out so far, kept while other choices wait to fork from this one."""
    has_spoken: bool = False
    """Whether a delta of this choice went out."""

    @property
    def order(self) -> tuple[int, int]:
        """Sort key of importance: smaller runs first and is preempted last."""
        return self.priority, self.key

    @property
    def num_tokens(self) -> int:
        """Prompt and output."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens left to plan for, pending ones included; 0 when steps in flight will end it."""
        num_tokens = len(self.token_ids) + self.num_pending_tokens
        # The last token of all is sampled and never computed.
        last = max(self.max_num_tokens - 1, self.num_prompt_tokens)
        return min(num_tokens, last) - self.num_computed_tokens

    @property
    def generates(self) -> bool:
        """False for requests that end with their prompt: pooling, or `max_tokens == 0`."""
        return self.pooling is None and self.params.max_tokens > 0

    @property
    def wants_scores(self) -> bool:
        """Whether logprobs of prompt tokens are still owed."""
        return (
            self.params.prompt_logprobs is not None
            and self.num_scored_tokens < self.num_prompt_tokens
        )

    @property
    def must_see_prompt(self) -> bool:
        """Whether the forward pass has to visit every prompt token, cached or not."""
        return self.wants_scores or self.pooling is Pooling.MEAN


class KeyCounter:
    """Gives each choice a key that no other has, ascending with arrival."""

    def __init__(self) -> None:
        self._next = 0

    def take(self, count: int) -> int:
        """The first of `count` consecutive keys."""
        first = self._next
        self._next += count
        return first


def make_choices(
    request: GenerationRequest, first_key: int, arrival_s: float, max_context: int
) -> list[EngineRequest]:
    """The choices of a request, keyed `first_key, first_key + 1, ...` by choice index."""
    num_prompt_tokens = len(request.prompt_token_ids)
    max_num_tokens = min(num_prompt_tokens + request.params.max_tokens, max_context)
    return [
        EngineRequest(
            key=first_key + index,
            request_id=request.request_id,
            index=index,
            params=request.params,
            pooling=request.pooling,
            priority=request.priority,
            cache_salt=request.cache_salt,
            num_prompt_tokens=num_prompt_tokens,
            max_num_tokens=max_num_tokens,
            token_ids=list(request.prompt_token_ids),
            arrival_s=arrival_s,
        )
        for index in range(request.params.n)
    ]
