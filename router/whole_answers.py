"""Requests that are answered whole: embeddings, and scores of given continuations.

Each input becomes one engine request; all of them share one reservation, one deadline and one
public id, and end together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from cluster.base.errors import CancelledError, InternalError, error_from_dict
from replicas.api import FinishReason, GenerationDelta, GenerationRequest, SamplingParams
from router.api import EmbedOutput, ScoreOutput, TokenScore, Usage
from router.checked_requests import CheckedEmbed, CheckedScore, Prompt
from router.choice_stream import token_score
from router.dispatcher import Dispatcher
from router.field_checks import bad_field
from router.prompt_encoder import encode_prompt
from router.request_channel import RequestChannel
from router.running_requests import RunningRequest
from router.validate import Validator


class WholeAnswers:
    """Runs embedding and scoring requests to their end."""

    def __init__(self, validator: Validator, dispatcher: Dispatcher) -> None:
        self._validator = validator
        self._dispatcher = dispatcher

    async def embed(self, checked: CheckedEmbed, running: RunningRequest) -> EmbedOutput:
        """One vector per input.

        Raises:
            InvalidRequestError: more dimensions are asked for than the model has.
        """
        requests = []
        for at, prompt in enumerate(checked.inputs):
            ids = await encode_prompt(checked.model, prompt)
            self._validator.room(checked.model, ids, f"inputs[{at}]")
            requests.append(
                GenerationRequest(
                    request_id=f"{checked.request_id}-{at}",
                    prompt_token_ids=tuple(ids),
                    params=SamplingParams(max_tokens=0),
                    pooling=checked.pooling,
                )
            )
        answers = await self._run(checked.model.plan.name, requests, running)
        vectors = tuple(
            _shaped(_embedding_of(deltas), checked.dimensions, checked.normalize)
            for deltas in answers
        )
        return EmbedOutput(
            request_id=checked.request_id, vectors=vectors, usage=_usage(requests, answers)
        )

    async def score(self, checked: CheckedScore, running: RunningRequest) -> ScoreOutput:
        """Log-probabilities of each continuation's tokens after the prompt."""
        requests = []
        prompt_ids = await encode_prompt(checked.model, checked.prompt)
        lengths = []
        for at, continuation in enumerate(checked.continuations):
            ids = await self._continuation_ids(checked, prompt_ids, continuation)
            if not ids:
                raise bad_field(f"continuations[{at}]", "must hold at least one token")
            whole = (*prompt_ids, *ids)
            self._validator.room(checked.model, whole, f"continuations[{at}]")
            lengths.append(len(ids))
            requests.append(
                GenerationRequest(
                    request_id=f"{checked.request_id}-{at}",
                    prompt_token_ids=whole,
                    params=SamplingParams(max_tokens=0, prompt_logprobs=0),
                )
            )
        answers = await self._run(checked.model.plan.name, requests, running)
        scores = tuple(
            self._scores(checked, deltas, request, length)
            for deltas, request, length in zip(answers, requests, lengths, strict=True)
        )
        return ScoreOutput(
            request_id=checked.request_id, scores=scores, usage=_usage(requests, answers)
        )

    async def _continuation_ids(
        self, checked: CheckedScore, prompt_ids: Sequence[int], continuation: Prompt
    ) -> Sequence[int]:
        """Ids of a continuation as they follow the prompt.

        Text after text is tokenised together, as evaluation harnesses do, where that leaves the
        prompt's own tokens as they are; otherwise, and next to ids, by itself.
        """
        if continuation.text is not None and checked.prompt.text is not None:
            joint = Prompt(text=checked.prompt.text + continuation.text)
            ids = await encode_prompt(checked.model, joint)
            if ids[: len(prompt_ids)] == list(prompt_ids):
                return ids[len(prompt_ids) :]
        return await encode_prompt(checked.model, continuation, special=False)

    def _scores(
        self,
        checked: CheckedScore,
        deltas: Sequence[GenerationDelta],
        request: GenerationRequest,
        length: int,
    ) -> tuple[TokenScore, ...]:
        entries = [entry for delta in deltas for entry in delta.prompt_logprobs]
        if len(entries) != len(request.prompt_token_ids):
            raise InternalError(
                f"The replica scored {len(entries)} of {len(request.prompt_token_ids)} tokens."
            )
        tail = [entry for entry in entries[-length:] if entry is not None]
        return tuple(token_score(checked.model.tokenizer, entry) for entry in tail)

    async def _run(
        self, model: str, requests: Sequence[GenerationRequest], running: RunningRequest
    ) -> list[list[GenerationDelta]]:
        running.set_waiting_tokens(sum(len(request.prompt_token_ids) for request in requests))
        channels = []
        for request in requests:
            channel = self._dispatcher.submit(model, request)
            running.attach(channel)
            channels.append(channel)
        return [await _collect(channel) for channel in channels]


async def _collect(channel: RequestChannel) -> list[GenerationDelta]:
    deltas: list[GenerationDelta] = []
    while batch := await channel.receive():
        deltas += batch
    last = deltas[-1]
    if last.finish_reason is FinishReason.ERROR:
        raise error_from_dict(last.error or {})
    if last.finish_reason is FinishReason.ABORT:
        raise CancelledError("The request was cancelled.")
    return deltas


def _embedding_of(deltas: Sequence[GenerationDelta]) -> tuple[float, ...]:
    for delta in deltas:
        if delta.embedding:
            return delta.embedding
    raise InternalError("The replica answered without an embedding.")


def _shaped(vector: tuple[float, ...], dimensions: int, normalize: bool) -> tuple[float, ...]:
    """The first `dimensions` values (0: all), then scaled to length 1."""
    if dimensions > len(vector):
        raise bad_field("dimensions", f"must be at most the model's {len(vector)}")
    kept = vector[:dimensions] if dimensions else vector
    length = math.sqrt(math.fsum(value * value for value in kept))
    if not normalize or length == 0.0:
        return kept
    return tuple(value / length for value in kept)


def _usage(
    requests: Sequence[GenerationRequest], answers: Sequence[Sequence[GenerationDelta]]
) -> Usage:
    return Usage(
        prompt_tokens=sum(len(request.prompt_token_ids) for request in requests),
        cached_tokens=sum(
            max((delta.num_cached_tokens for delta in deltas), default=0) for deltas in answers
        ),
    )
