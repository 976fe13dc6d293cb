"""Public protobuf messages <-> the values of `router.api`. No checks, no behaviour."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from google.protobuf import json_format

from router.api import (
    ChatTurn,
    EmbedInput,
    EmbedOutput,
    GenerationInput,
    ModelInfo,
    Piece,
    ScoreInput,
    ScoreOutput,
    TextOrIds,
    TokenScore,
    Usage,
)
from router.proto import penstock_pb2 as pb


def generation_input(message: pb.GenerateRequest, request_id: str, peer: str) -> GenerationInput:
    """A completion as the handler takes it."""
    prompt = text_or_ids(message, "prompt")
    return GenerationInput(
        model=message.model,
        text=prompt.text,
        token_ids=prompt.token_ids,
        sampling=sampling_fields(message.sampling),
        request_id=request_id,
        priority=message.priority,
        echo=message.echo,
        timeout_s=message.timeout_s,
        peer=peer,
    )


def chat_input(message: pb.ChatRequest, request_id: str, peer: str) -> GenerationInput:
    """A chat completion as the handler takes it."""
    return GenerationInput(
        model=message.model,
        messages=chat_turns(message.messages),
        sampling=sampling_fields(message.sampling),
        request_id=request_id,
        priority=message.priority,
        timeout_s=message.timeout_s,
        peer=peer,
    )


def embed_input(message: pb.EmbedRequest, request_id: str) -> EmbedInput:
    """An embedding request as the handler takes it."""
    return EmbedInput(
        model=message.model,
        inputs=[text_or_ids(entry, "input") for entry in message.inputs],
        pooling=message.pooling,
        normalize=message.normalize if message.HasField("normalize") else True,
        dimensions=message.dimensions,
        request_id=request_id,
    )


def score_input(message: pb.ScoreRequest, request_id: str) -> ScoreInput:
    """A scoring request as the handler takes it."""
    return ScoreInput(
        model=message.model,
        prompt=text_or_ids(message, "prompt"),
        continuations=[text_or_ids(entry, "input") for entry in message.continuations],
        request_id=request_id,
    )


def sampling_fields(message: pb.SamplingOptions) -> dict[str, Any]:
    """The fields that were set, by name."""
    fields: dict[str, Any] = {}
    for descriptor, value in message.ListFields():
        if descriptor.name == "logit_bias":
            fields[descriptor.name] = dict(value)
        elif descriptor.name in ("stop", "stop_token_ids"):
            fields[descriptor.name] = list(value)
        elif descriptor.name == "structured_output":
            fields[descriptor.name] = _structured_output(value)
        else:
            fields[descriptor.name] = value
    return fields


def _structured_output(message: pb.StructuredOutput) -> dict[str, Any]:
    """The one form that was set."""
    kind = message.WhichOneof("format")
    if kind is None:
        return {}
    return {kind: list(message.choices.texts) if kind == "choices" else getattr(message, kind)}


def text_or_ids(
    message: pb.GenerateRequest | pb.ScoreRequest | pb.EmbedInput, oneof: str
) -> TextOrIds:
    """Whichever of the two forms was set; neither when none was."""
    kind = message.WhichOneof(oneof)
    if kind == "text":
        return TextOrIds(text=message.text)
    if kind == "token_ids":
        return TextOrIds(token_ids=list(message.token_ids.ids))
    return TextOrIds()


def chat_turns(messages: Iterable[pb.ChatMessage]) -> list[ChatTurn]:
    """The conversation."""
    return [ChatTurn(role=m.role, content=m.content, name=m.name) for m in messages]


def piece_to_proto(request_id: str, piece: Piece) -> pb.GenerateResponse:
    """One streamed answer; the hot path, so absent parts are not built."""
    message = pb.GenerateResponse(
        request_id=request_id, index=piece.index, text=piece.text, token_ids=piece.token_ids
    )
    if piece.logprobs:
        message.logprobs.extend(scores_to_proto(piece.logprobs))
    if piece.prompt_logprobs:
        message.prompt_logprobs.extend(scores_to_proto(piece.prompt_logprobs))
    if piece.finish_reason is not None:
        message.finish_reason = piece.finish_reason.value
        message.stop_reason = piece.stop_reason
    if piece.usage is not None:
        message.usage.CopyFrom(usage_to_proto(piece.usage))
    return message


def scores_to_proto(scores: Sequence[TokenScore]) -> list[pb.TokenLogprob]:
    """Scored tokens; the first prompt token has no logprob, which the wire shows as rank 0."""
    return [
        pb.TokenLogprob(
            token_id=score.token_id,
            logprob=score.logprob,
            rank=score.rank,
            token=score.text,
            top=[
                pb.TopLogprob(token_id=top.token_id, logprob=top.logprob, token=top.text)
                for top in score.top
            ],
        )
        for score in scores
    ]


def usage_to_proto(usage: Usage) -> pb.Usage:
    """Token counts."""
    return pb.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
    )


def embed_to_proto(output: EmbedOutput) -> pb.EmbedResponse:
    """Vectors."""
    return pb.EmbedResponse(
        embeddings=[pb.Embedding(values=vector) for vector in output.vectors],
        usage=usage_to_proto(output.usage),
        request_id=output.request_id,
    )


def score_to_proto(output: ScoreOutput) -> pb.ScoreResponse:
    """Scores with their totals."""
    return pb.ScoreResponse(
        scores=[
            pb.Score(
                total_logprob=sum(entry.logprob or 0.0 for entry in scores),
                logprobs=scores_to_proto(scores),
            )
            for scores in output.scores
        ],
        usage=usage_to_proto(output.usage),
        request_id=output.request_id,
    )


def model_to_proto(info: ModelInfo) -> pb.Model:
    """A served model."""
    return pb.Model(
        name=info.name,
        family=info.family,
        engine=info.engine,
        max_context=info.max_context,
        vocab_size=info.vocab_size,
        ready_replicas=info.ready_replicas,
        replicas=info.replicas,
        chat=info.chat,
        created=info.created,
        shared_weight_bytes=info.shared_weight_bytes,
    )


def status_to_proto(status: Mapping[str, Any]) -> pb.StatusResponse:
    """The handler's status; its keys are the proto's names."""
    return json_format.ParseDict(dict(status), pb.StatusResponse())
