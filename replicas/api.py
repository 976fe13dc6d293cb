"""What an engine is asked and what it answers: plain frozen values, no torch, no Ray, no protobuf.

Both fronts build a `GenerationRequest` through the one validator in `router/validate.py`; the
engine accepts nothing else. Every number here was range-checked before it got here.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field


class FinishReason(enum.StrEnum):
    """Why a choice ended; `STOP` and `LENGTH` carry the OpenAI names on the wire."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class Pooling(enum.StrEnum):
    """How an embedding request turns hidden states into one vector."""

    LAST = "last"
    MEAN = "mean"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to pick tokens. Defaults are neutral: each field at its default changes nothing.

    `temperature == 0` is greedy. `top_k == 0` is off. `seed` is always set by the time a request
    reaches the engine (the gateway draws one when the user gave none): the random number of the
    token at absolute position p of choice i is f(seed, i, p) and of nothing else, so batch
    order, preemption and replay cannot change a stream. Stop *strings* are matched where text
    exists, in the gateway; the engine only knows stop token ids.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    max_tokens: int = 16
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int = 0
    n: int = 1
    logprobs: int | None = None
    """None: no logprobs. k >= 0: the chosen token's logprob and the k most likely ones."""
    prompt_logprobs: int | None = None
    grammar: str = ""
    """What the output has to match, in llguidance's form; empty: anything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceProgress:
    """How far a choice had come when its replica was lost; by default not at all."""

    index: int
    token_ids: tuple[int, ...] = ()
    """Its output so far."""
    num_scored_tokens: int = 0
    """Prompt tokens whose log-probability (None for the first) has been told."""

    @property
    def has_spoken(self) -> bool:
        """Whether anything of it has been told."""
        return bool(self.token_ids or self.num_scored_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One request to one engine replica.

    `max_tokens == 0` computes the prompt only (scores through `prompt_logprobs`). With `pooling`
    set the request answers one embedding and generates nothing. `cache_salt` isolates prefix
    cache entries: only requests with an equal salt share blocks.

    A request that comes from a replica that was lost has `resumed`: its choices that have not
    ended. They go on behind what was told of them, as after a preemption, with the tokens that
    an undisturbed run gives; nothing is told twice.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    pooling: Pooling | None = None
    priority: int = 0
    """Lower runs first; equal priorities run in order of arrival, resumed requests first."""
    cache_salt: str = ""
    resumed: tuple[ChoiceProgress, ...] = ()

    @property
    def choices(self) -> tuple[ChoiceProgress, ...]:
        """What is to run: the resumed choices, or all of them from their beginning."""
        return self.resumed or tuple(ChoiceProgress(index=i) for i in range(self.params.n))

    @property
    def num_known_tokens(self) -> int:
        """Tokens to compute before anything new can be said: the prompt, and resumed output."""
        return len(self.prompt_token_ids) + sum(len(each.token_ids) for each in self.resumed)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """Log-probability of one token, with the most likely alternatives at its position.

    Values are natural logarithms of the softmax over raw logits in fp32, before temperature,
    penalties or filters.
    """

    token_id: int
    logprob: float
    rank: int
    """1 + number of tokens that were strictly more likely."""
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDelta:
    """What one step added to one choice of a request.

    Exactly one delta per choice has `finish_reason` set, and it is the last one. Token ids
    include the stop token when one ended the choice (the gateway does not print it).
    """

    request_id: str
    index: int = 0
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    """For prompt tokens scored since the last delta; None stands for the first prompt token."""
    embedding: tuple[float, ...] = ()
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    """The stop or EOS token that ended the choice, if one did."""
    error: dict[str, str | None] | None = None
    """`PenstockError.to_dict()` when `finish_reason` is ERROR."""
    replica_lost: bool = False
    """With `error`: its replica failed and not the request, which can go on elsewhere."""
    num_cached_tokens: int = 0
    """Prompt tokens answered from the prefix cache; set on a choice's first delta."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaStats:
    """A replica's load after a step; rides on every message of the replica stream."""

    step: int = 0
    num_running: int = 0
    num_waiting: int = 0
    num_waiting_tokens: int = 0
    kv_blocks_total: int = 0
    kv_blocks_free: int = 0
    """Blocks no live request holds (cached ones count as free: they can be evicted)."""
    prefix_hit_tokens: int = 0
    prefix_query_tokens: int = 0
    num_preemptions: int = 0
    generated_tokens: int = 0
    draft_tokens: int = 0
    """Tokens that steps were given to check, see `replicas/engine/speculation.py`."""
    accepted_draft_tokens: int = 0
    """Those of them that were right."""
