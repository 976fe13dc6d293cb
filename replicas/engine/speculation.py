"""Which requests get drafts: tokens that a step checks beside the one it would compute anyway.

A drafted token is a query token like one of a prompt; the step samples after each, and what it
samples is kept up to the first that differs from the draft. As a random number is a function of
seed and position, those are the tokens that one step after another would have given, greedy or
not. Drafts only use what a step has left: budget, blocks and rows of logits.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.base.errors import ConfigError
from replicas.engine.prompt_lookup import PromptLookup
from replicas.engine.request import EngineRequest

MAX_SAMPLED_ROWS = 256
"""Rows of logits in a step that drafts may bring it to: what a rank's workspace is planned for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationConfig:
    """How drafts are made.

    Raises:
        ConfigError: a number is below 1, or no n-gram is long enough.
    """

    num_tokens: int
    """Most drafted tokens of a request in a step."""
    min_ngram: int = 2
    """Tokens that have to match."""
    max_ngram: int = 4
    """Tokens that are compared to choose between matches."""

    def __post_init__(self) -> None:
        for name in ("num_tokens", "min_ngram"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be >= 1.", param=name)
        if self.max_ngram < self.min_ngram:
            raise ConfigError(
                f"max_ngram {self.max_ngram} is less than min_ngram {self.min_ngram}.",
                param="max_ngram",
            )


class Speculator:
    """Drafts of all requests of one scheduler; makes none without a config."""

    def __init__(self, config: SpeculationConfig | None) -> None:
        self._config = config
        self._lookups: dict[int, PromptLookup] = {}

    def learn(self, request: EngineRequest) -> None:
        """The request has new tokens."""
        config = self._config
        if config is None or not request.num_output_tokens:
            return
        lookup = self._lookups.get(request.key)
        if lookup is None:
            lookup = self._lookups[request.key] = PromptLookup(
                request.token_ids,
                request.num_prompt_tokens,
                request.max_num_tokens,
                min_ngram=config.min_ngram,
                max_ngram=config.max_ngram,
            )
        lookup.learn()

    def waits(self, request: EngineRequest) -> bool:
        """Whether a draft could be made for a running request, were its next token known."""
        if self._config is None or not request.num_pending_tokens:
            return False
        lookup = self._lookups.get(request.key)
        return lookup is not None and lookup.is_promising and _room(request) > 0

    def draft(self, request: EngineRequest, limit: int) -> tuple[int, ...]:
        """Drafts for a request whose last token is known and alone is left to compute."""
        lookup = self._lookups.get(request.key)
        if self._config is None or lookup is None:
            return ()
        return lookup.draft(min(self._config.num_tokens, limit, _room(request)))

    def forget(self, request: EngineRequest) -> None:
        """The request has ended."""
        self._lookups.pop(request.key, None)


def _room(request: EngineRequest) -> int:
    """Drafts that may all be accepted, with the token after them, before the request ends."""
    return request.max_num_tokens - request.num_tokens - request.num_pending_tokens - 1
