"""Turns what a step computed for one request into what the caller hears about it.

Advances the request's tokens and scores and decides whether it has ended. It never touches
blocks or queues, and never says a thing twice: after a preemption, scores that are computed again
are dropped by position.
"""

from __future__ import annotations

from cluster.base.errors import InternalError, PenstockError
from replicas.api import FinishReason, GenerationDelta, TokenLogprob
from replicas.engine.request import EngineRequest
from replicas.engine.scheduler_output import RequestResult

_Ending = tuple[FinishReason | None, int | None]
_GOES_ON: _Ending = (None, None)


class OutputProcessor:
    """Output rules of one engine.

    Args:
        eos_token_ids: the model's end-of-sequence tokens.
    """

    def __init__(self, eos_token_ids: tuple[int, ...]) -> None:
        self._eos_token_ids = frozenset(eos_token_ids)

    def process(
        self,
        request: EngineRequest,
        result: RequestResult | None,
        query: range,
        *,
        sampled: bool,
    ) -> GenerationDelta | None:
        """Take in one request's share of a step.

        Args:
            result: what the workers said; None when they had nothing to say.
            query: positions that the step computed; the request itself may be further, by steps
                in flight, or have been preempted.
            sampled: whether the step was to give a token.

        Returns:
            The delta, or None when there is nothing to tell.

        Raises:
            PenstockError: this request alone failed; the caller ends it.
        """
        if result is not None and result.error:
            raise InternalError(result.error)
        completes_prompt = request.num_prompt_tokens - 1 in query
        scores = self._score(request, result, query.start, completes_prompt)
        if sampled:
            return self._sampled(request, result, scores)
        if completes_prompt and not request.generates:
            return self._prompt_only(request, result, scores)
        if not scores:
            return None
        return GenerationDelta(
            request_id=request.request_id,
            index=request.index,
            prompt_logprobs=scores,
            num_cached_tokens=first_word(request),
        )

    def _sampled(
        self,
        request: EngineRequest,
        result: RequestResult | None,
        scores: tuple[TokenLogprob | None, ...],
    ) -> GenerationDelta:
        if result is None or not result.token_ids:
            raise InternalError(f"The step gave no token for request {request.request_id}.")
        token_ids, (reason, stop_token_id) = self._append(request, result.token_ids)
        return GenerationDelta(
            request_id=request.request_id,
            index=request.index,
            token_ids=token_ids,
            logprobs=result.logprobs[: len(token_ids)],
            prompt_logprobs=scores,
            finish_reason=reason,
            stop_token_id=stop_token_id,
            num_cached_tokens=first_word(request),
        )

    def _prompt_only(
        self,
        request: EngineRequest,
        result: RequestResult | None,
        scores: tuple[TokenLogprob | None, ...],
    ) -> GenerationDelta:
        embedding: tuple[float, ...] = ()
        if request.pooling is not None:
            embedding = result.embedding if result is not None else ()
            if not embedding:
                raise InternalError(f"The step gave no embedding for {request.request_id}.")
        return GenerationDelta(
            request_id=request.request_id,
            index=request.index,
            prompt_logprobs=scores,
            embedding=embedding,
            finish_reason=FinishReason.STOP if embedding else FinishReason.LENGTH,
            num_cached_tokens=first_word(request),
        )

    def _append(
        self, request: EngineRequest, token_ids: tuple[int, ...]
    ) -> tuple[tuple[int, ...], _Ending]:
        """Add tokens up to one that ends the choice; those added, and the end."""
        ending = _GOES_ON
        for count, token_id in enumerate(token_ids, start=1):
            request.token_ids.append(token_id)
            ending = self._ending(request, token_id)
            if ending != _GOES_ON:
                return token_ids[:count], ending
        return token_ids, ending

    def _ending(self, request: EngineRequest, token_id: int) -> _Ending:
        """Whether the newest token ends the choice. A stop token wins over a length."""
        params = request.params
        if request.num_output_tokens > params.min_tokens:
            is_eos = token_id in self._eos_token_ids and not params.ignore_eos
            if is_eos or token_id in params.stop_token_ids:
                return FinishReason.STOP, token_id
        if request.num_tokens >= request.max_num_tokens:
            return FinishReason.LENGTH, None
        return _GOES_ON

    def _score(
        self,
        request: EngineRequest,
        result: RequestResult | None,
        start: int,
        completes_prompt: bool,
    ) -> tuple[TokenLogprob | None, ...]:
        """Scores of prompt tokens that did not go out yet, in order of position."""
        if not request.wants_scores:
            return ()
        scored = request.num_scored_tokens
        first: tuple[TokenLogprob | None, ...] = () if scored else (None,)
        # The result's entry i stands for position start + 1 + i.
        fresh = result.prompt_logprobs[max(scored, 1) - start - 1 :] if result is not None else ()
        scores = first + fresh
        if completes_prompt and scored + len(scores) != request.num_prompt_tokens:
            raise InternalError(
                f"Request {request.request_id} has {request.num_prompt_tokens} prompt tokens, "
                f"but {scored + len(scores)} were scored."
            )
        request.num_scored_tokens += len(scores)
        return scores


def first_word(request: EngineRequest) -> int:
    """`num_cached_tokens` of the next delta: told once, on a choice's first."""
    if request.has_spoken:
        return 0
    request.has_spoken = True
    return request.num_cached_tokens or 0


def error_delta(
    request_id: str, index: int, error: PenstockError, *, replica_lost: bool = False
) -> GenerationDelta:
    """The last delta of a choice that failed, was refused, or whose replica is lost."""
    return GenerationDelta(
        request_id=request_id,
        index=index,
        finish_reason=FinishReason.ERROR,
        error=error.to_dict(),
        replica_lost=replica_lost,
    )
