"""Conversions between `replicas.api` values and the messages of the replica stream.

Used by both ends of the hop (the gateway's `ReplicaStream` and the leader's servicer), so the
two cannot disagree. Nothing here checks ranges (the gateway's validator did), keeps state, or
touches a socket. Floats that the wire carries as 32 bit come back rounded to 32 bit.
"""

from __future__ import annotations

from cluster.base.errors import InvalidRequestError, PenstockError, error_from_dict
from replicas.api import (
    FinishReason,
    GenerationDelta,
    GenerationRequest,
    Pooling,
    ReplicaStats,
    SamplingParams,
    TokenLogprob,
)
from replicas.proto import replica_stream_pb2 as pb

MAX_HOP_MESSAGE_BYTES = 64 * 1024 * 1024
"""Cap of one hop message, both ways; the largest honest one is a long prompt's logprobs."""

_FINISH = {reason.value: reason for reason in FinishReason}


def submit_to_proto(stream_key: int, request: GenerationRequest) -> pb.Submit:
    """The message that starts `request` under `stream_key`."""
    return pb.Submit(
        stream_key=stream_key,
        request_id=request.request_id,
        prompt_token_ids=request.prompt_token_ids,
        sampling=_sampling_to_proto(request.params),
        pooling=request.pooling.value if request.pooling is not None else "",
        priority=request.priority,
        cache_salt=request.cache_salt,
    )


def submit_from_proto(message: pb.Submit, request_id: str) -> GenerationRequest:
    """The request that a Submit asks for, under the id the leader gives it.

    Raises:
        InvalidRequestError: a pooling name is unknown (a gateway of another version).
    """
    pooling: Pooling | None = None
    if message.pooling:
        try:
            pooling = Pooling(message.pooling)
        except ValueError:
            raise InvalidRequestError(
                f"Unknown pooling {message.pooling!r}.",
                "Use 'last' or 'mean'.",
                param="pooling",
            ) from None
    return GenerationRequest(
        request_id=request_id,
        prompt_token_ids=tuple(message.prompt_token_ids),
        params=_sampling_from_proto(message.sampling),
        pooling=pooling,
        priority=message.priority,
        cache_salt=message.cache_salt,
    )


def _sampling_to_proto(params: SamplingParams) -> pb.Sampling:
    return pb.Sampling(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        no_repeat_ngram_size=params.no_repeat_ngram_size,
        logit_bias=[pb.LogitBias(token_id=t, bias=b) for t, b in params.logit_bias],
        min_tokens=params.min_tokens,
        max_tokens=params.max_tokens,
        stop_token_ids=params.stop_token_ids,
        ignore_eos=params.ignore_eos,
        seed=params.seed,
        n=params.n,
        logprobs=params.logprobs,
        prompt_logprobs=params.prompt_logprobs,
    )


def _sampling_from_proto(message: pb.Sampling) -> SamplingParams:
    return SamplingParams(
        temperature=message.temperature,
        top_k=message.top_k,
        top_p=message.top_p,
        min_p=message.min_p,
        repetition_penalty=message.repetition_penalty,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        no_repeat_ngram_size=message.no_repeat_ngram_size,
        logit_bias=tuple((entry.token_id, entry.bias) for entry in message.logit_bias),
        min_tokens=message.min_tokens,
        max_tokens=message.max_tokens,
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        seed=message.seed,
        n=message.n,
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        prompt_logprobs=message.prompt_logprobs if message.HasField("prompt_logprobs") else None,
    )


def delta_to_proto(stream_key: int, delta: GenerationDelta) -> pb.Delta:
    """One choice's increment for the gateway that knows it as `stream_key`."""
    message = pb.Delta(
        stream_key=stream_key,
        index=delta.index,
        token_ids=delta.token_ids,
        num_cached_tokens=delta.num_cached_tokens,
    )
    if delta.logprobs:
        message.logprobs.extend(_logprob_to_proto(entry) for entry in delta.logprobs)
    if delta.prompt_logprobs:
        scored = [entry for entry in delta.prompt_logprobs if entry is not None]
        message.prompt_start = len(scored) < len(delta.prompt_logprobs)
        message.prompt_logprobs.extend(_logprob_to_proto(entry) for entry in scored)
    if delta.embedding:
        message.embedding.extend(delta.embedding)
    if delta.finish_reason is not None:
        message.finish_reason = delta.finish_reason.value
    if delta.stop_token_id is not None:
        message.stop_token_id = delta.stop_token_id
    if delta.error is not None:
        message.error.CopyFrom(error_fields_to_proto(delta.error))
    return message


def delta_from_proto(message: pb.Delta, request_id: str) -> GenerationDelta:
    """Inverse of `delta_to_proto`; `request_id` is what the gateway calls the request."""
    prompt: tuple[TokenLogprob | None, ...] = ()
    if message.prompt_start or message.prompt_logprobs:
        first: tuple[TokenLogprob | None, ...] = (None,) if message.prompt_start else ()
        prompt = first + tuple(_logprob_from_proto(entry) for entry in message.prompt_logprobs)
    return GenerationDelta(
        request_id=request_id,
        index=message.index,
        token_ids=tuple(message.token_ids),
        logprobs=tuple(_logprob_from_proto(entry) for entry in message.logprobs)
        if message.logprobs
        else (),
        prompt_logprobs=prompt,
        embedding=tuple(message.embedding),
        finish_reason=_FINISH[message.finish_reason] if message.finish_reason else None,
        stop_token_id=message.stop_token_id if message.HasField("stop_token_id") else None,
        error=error_fields_from_proto(message.error) if message.HasField("error") else None,
        num_cached_tokens=message.num_cached_tokens,
    )


def _logprob_to_proto(entry: TokenLogprob) -> pb.Logprob:
    return pb.Logprob(
        token_id=entry.token_id,
        logprob=entry.logprob,
        rank=entry.rank,
        top_ids=[token_id for token_id, _ in entry.top],
        top_logprobs=[logprob for _, logprob in entry.top],
    )


def _logprob_from_proto(message: pb.Logprob) -> TokenLogprob:
    return TokenLogprob(
        token_id=message.token_id,
        logprob=message.logprob,
        rank=message.rank,
        top=tuple(zip(message.top_ids, message.top_logprobs, strict=True)),
    )


def error_fields_to_proto(fields: dict[str, str | None]) -> pb.Error:
    """`PenstockError.to_dict()` as a message (None and "" are one on the wire)."""
    return pb.Error(**{key: value for key, value in fields.items() if value})


def error_fields_from_proto(message: pb.Error) -> dict[str, str | None]:
    """Inverse of `error_fields_to_proto`."""
    return {
        "code": message.code,
        "cause": message.cause,
        "remedy": message.remedy,
        "param": message.param or None,
    }


def error_to_proto(error: PenstockError) -> pb.Error:
    """An error of ours as a message."""
    return error_fields_to_proto(error.to_dict())


def error_from_proto(message: pb.Error) -> PenstockError:
    """Inverse of `error_to_proto`."""
    return error_from_dict(error_fields_from_proto(message))


def stats_to_proto(stats: ReplicaStats, *, draining: bool) -> pb.Load:
    """A load report."""
    return pb.Load(
        step=stats.step,
        num_running=stats.num_running,
        num_waiting=stats.num_waiting,
        num_waiting_tokens=stats.num_waiting_tokens,
        kv_blocks_total=stats.kv_blocks_total,
        kv_blocks_free=stats.kv_blocks_free,
        prefix_hit_tokens=stats.prefix_hit_tokens,
        prefix_query_tokens=stats.prefix_query_tokens,
        num_preemptions=stats.num_preemptions,
        generated_tokens=stats.generated_tokens,
        draft_tokens=stats.draft_tokens,
        accepted_draft_tokens=stats.accepted_draft_tokens,
        draining=draining,
    )


def stats_from_proto(message: pb.Load) -> ReplicaStats:
    """Inverse of `stats_to_proto` (whether the replica drains is not a statistic)."""
    return ReplicaStats(
        step=message.step,
        num_running=message.num_running,
        num_waiting=message.num_waiting,
        num_waiting_tokens=message.num_waiting_tokens,
        kv_blocks_total=message.kv_blocks_total,
        kv_blocks_free=message.kv_blocks_free,
        prefix_hit_tokens=message.prefix_hit_tokens,
        prefix_query_tokens=message.prefix_query_tokens,
        num_preemptions=message.num_preemptions,
        generated_tokens=message.generated_tokens,
        draft_tokens=message.draft_tokens,
        accepted_draft_tokens=message.accepted_draft_tokens,
    )
