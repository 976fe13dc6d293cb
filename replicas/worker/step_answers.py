"""Collects what a step has to say about each request, from the parts that compute it.

One draft per request that has something to say, in the order of first mention. The first error of
a request wins and replaces everything else about it: a failed request gets no token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from replicas.api import TokenLogprob
from replicas.engine.scheduler_output import RequestResult
from replicas.sampling.sampler import SampledRow
from replicas.worker.pooling import Pooled


@dataclass(slots=True, kw_only=True)
class _Draft:
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    embedding: tuple[float, ...] = ()
    error: str = ""


class StepAnswers:
    """The drafts of one step."""

    def __init__(self) -> None:
        self._drafts: dict[int, _Draft] = {}

    def fail(self, key: int, error: str) -> None:
        """This request alone failed."""
        draft = self._draft(key)
        draft.error = draft.error or error

    def add_prompt_logprob(self, key: int, logprob: TokenLogprob) -> None:
        """The next scored prompt token of a request, in order of position."""
        self._draft(key).prompt_logprobs.append(logprob)

    def add_sampled(self, key: int, rows: Sequence[SampledRow]) -> None:
        """The sampler's verdict on a request: its tokens, of which the last one may be an error."""
        if rows[-1].error:
            self.fail(key, rows[-1].error)
            return
        draft = self._draft(key)
        draft.token_ids = tuple(row.token_id for row in rows)
        draft.logprobs = tuple(row.logprob for row in rows if row.logprob is not None)

    def add_pooled(self, key: int, pooled: Pooled) -> None:
        """A finished embedding."""
        if pooled.error:
            self.fail(key, pooled.error)
            return
        self._draft(key).embedding = pooled.embedding

    def results(self) -> tuple[RequestResult, ...]:
        """One result per request mentioned."""
        return tuple(_result(key, draft) for key, draft in self._drafts.items())

    def _draft(self, key: int) -> _Draft:
        draft = self._drafts.get(key)
        if draft is None:
            draft = self._drafts[key] = _Draft()
        return draft


def _result(key: int, draft: _Draft) -> RequestResult:
    if draft.error:
        return RequestResult(key=key, error=draft.error)
    return RequestResult(
        key=key,
        token_ids=draft.token_ids,
        logprobs=draft.logprobs,
        prompt_logprobs=tuple(draft.prompt_logprobs),
        embedding=draft.embedding,
    )
