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
    """One choice. `key` grows with arrival, so that it orders choices of equal priority."""

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
    is_resumed: bool = False
    """Whether it began on another replica; its client has waited for it already."""

    @property
    def order(self) -> tuple[int, bool, int]:
        """Sort key of importance: smaller runs first and is preempted last."""
        return self.priority, not self.is_resumed, self.key

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
    """The choices of a request, keyed `first_key, first_key + 1, ...` in order."""
    num_prompt_tokens = len(request.prompt_token_ids)
    max_num_tokens = min(num_prompt_tokens + request.params.max_tokens, max_context)
    # Choices share the prompt, so what one said of cached tokens was said for all.
    has_spoken = any(choice.has_spoken for choice in request.resumed)
    return [
        EngineRequest(
            key=first_key + offset,
            request_id=request.request_id,
            index=choice.index,
            params=request.params,
            pooling=request.pooling,
            priority=request.priority,
            cache_salt=request.cache_salt,
            num_prompt_tokens=num_prompt_tokens,
            max_num_tokens=max_num_tokens,
            token_ids=[*request.prompt_token_ids, *choice.token_ids],
            arrival_s=arrival_s,
            num_scored_tokens=choice.num_scored_tokens,
            has_spoken=has_spoken,
            is_resumed=bool(request.resumed),
        )
        for offset, choice in enumerate(request.choices)
    ]


def make_families(choices: list[EngineRequest]) -> list[list[EngineRequest]]:
    """A request's choices, those together that can share a prompt which the first one computes.

    With scores owed to some and told to others each computes the prompt itself: what the first one
    is told would not be what the others lack.
    """
    is_owed = any(choice.wants_scores for choice in choices)
    if is_owed and any(choice.num_scored_tokens for choice in choices):
        return [[choice] for choice in choices]
    return [choices]
