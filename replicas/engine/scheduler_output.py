"""The contract between scheduler and workers: one plan down and one result up per step.

Diffs only: a worker keeps one row per live request and a plan says what changed. A preempted
request is *finished* for the worker and comes back later as a new one with all its tokens. The
columns of `SchedulerOutput` that are "parallel to `keys`" have one entry per scheduled request,
in batch order. `key` is the engine's own integer name of one choice of a request, never reused
within an engine's life.

A plan may be made before the step ahead of it has answered. So it carries no sampled tokens: every
rank samples the same token from the same logits and appends it to its own row at the end of the
step. A request with a draft (see `replicas/engine/speculation.py`) is planned only when all its
tokens are known, and again only when the step has answered. A request whose sampling failed may be
in one more plan, whose answer about it nobody reads.

Plain values of ints, floats, strings and tuples, so that any codec can carry them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from replicas.api import Pooling, SamplingParams, TokenLogprob
from replicas.engine.weight_traffic import WeightTraffic


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRequest:
    """A request the workers have no row for (fresh, or back from preemption).

    `token_ids` holds prompt and, after a preemption, all output so far (a request comes back only
    when all of it is known); the first `num_prompt_tokens` of them are the prompt. Its blocks come
    with the same step's `new_block_ids`.
    """

    key: int
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    params: SamplingParams
    choice_index: int = 0
    pooling: Pooling | None = None
    eos_token_ids: tuple[int, ...] = ()
    """Masked until `min_tokens` are out; empty when the request ignores EOS."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerOutput:
    """What every rank does in one step."""

    step: int
    new_requests: tuple[NewRequest, ...] = ()
    keys: tuple[int, ...] = ()
    num_scheduled_tokens: tuple[int, ...] = ()
    """Parallel to `keys`: query tokens of this step, >= 1 each."""
    num_computed_tokens: tuple[int, ...] = ()
    """Parallel to `keys`: position of the first query token (KV before it exists)."""
    new_block_ids: tuple[tuple[int, ...], ...] = ()
    """Parallel to `keys`: blocks to append to the row's block table before the step."""
    replaced_blocks: tuple[tuple[int, int, int], ...] = ()
    """(key, index in block table, new block id): copy-on-write changed an entry in place."""
    block_copies: tuple[tuple[int, int], ...] = ()
    """(source block, target block), all layers, done before the forward pass, in order."""
    samples: tuple[bool, ...] = ()
    """Parallel to `keys`: whether the last query token's logits give a new token.

    Then the last query token, but for drafts, is the last one of the row, which is one token longer
    after the step, or more where drafts were right.
    """
    draft_token_ids: tuple[tuple[int, ...], ...] = ()
    """Parallel to `keys`, or empty when no request has one: guesses at the tokens after the row's
    last one. They are the last query tokens of the step, and each query token from the row's last
    one on gives a token; those up to the first that differs from the draft are kept."""
    finished_keys: tuple[int, ...] = ()
    """Rows to free before the step: finished, aborted or preempted requests."""

    @property
    def num_tokens(self) -> int:
        """Query tokens of the whole step."""
        return sum(self.num_scheduled_tokens)

    def draft(self, index: int) -> tuple[int, ...]:
        """The draft of the request at `index` of `keys`."""
        return self.draft_token_ids[index] if self.draft_token_ids else ()

    @property
    def heaviest(self) -> tuple[int, int]:
        """Query tokens and requests: what decides how long the step takes."""
        return self.num_tokens, len(self.keys)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestResult:
    """What a step computed for one request; only for requests that have something to say."""

    key: int
    token_ids: tuple[int, ...] = ()
    """One where the request samples; with a draft, its tokens that were right and one more."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """Parallel to `token_ids`, when they are wanted."""
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """For prompt positions p in [computed+1, computed+scheduled] that lie in the prompt."""
    embedding: tuple[float, ...] = ()
    """The pooled, not yet normalised vector; set on the step that completes the prompt."""
    error: str = ""
    """This request alone failed (NaN logits, a sampling fault): the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutput:
    """Rank 0's answer to a `SchedulerOutput`."""

    step: int
    results: tuple[RequestResult, ...] = ()
    duration_s: float = 0.0
    sign_s: float = 0.0
    """From the sign that the step was nearly done to its end; 0 when none was given."""
    idle_s: float = 0.0
    """How long the rank, or its device, stood idle for want of the plan; next to nothing where it
    was there already."""
    timings_s: dict[str, float] = field(default_factory=dict)
    """Where the step's time went: input_build, forward, sample."""
    traffic: WeightTraffic | None = None
    """What the rank's weights have moved since its start; None: they stay."""
