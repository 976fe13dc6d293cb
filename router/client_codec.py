"""What both clients share: building public requests and reading public answers.

The inverse of `router/grpc/codec.py`; nothing here talks to the network.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

from google.protobuf.message import Message

from cluster.base.errors import InvalidRequestError
from replicas.api import FinishReason
from router.api import (
    ChatTurn,
    EmbedOutput,
    ModelInfo,
    Piece,
    ScoreOutput,
    TokenScore,
    TopToken,
    Usage,
)
from router.proto import penstock_pb2 as pb

PromptLike: TypeAlias = str | Sequence[int]
MessageLike: TypeAlias = ChatTurn | Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOptions:
    """What a generation may carry besides its prompt and sampling fields."""

    request_id: str = ""
    """Chosen by the caller, for `cancel` and logs; empty lets the server choose."""
    priority: int = 0
    echo: bool = False
    timeout_s: float = 0.0
    """The server's own deadline; 0 means the cluster's default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One finished choice."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenScore, ...]
    prompt_logprobs: tuple[TokenScore, ...]
    finish_reason: FinishReason
    stop_reason: str


def sampling_message(fields: Mapping[str, Any]) -> pb.SamplingOptions:
    """Sampling keyword arguments as a message; None means unset.

    Raises:
        InvalidRequestError: a name is unknown or a value does not fit its type.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    if isinstance(given.get("stop"), str):
        given["stop"] = [given["stop"]]
    if isinstance(output := given.get("structured_output"), Mapping):
        given["structured_output"] = _structured_output(output)
    message = pb.SamplingOptions()
    for name, value in given.items():
        with _refusals(name):
            message.MergeFrom(pb.SamplingOptions(**{name: value}))
    return message


def _structured_output(fields: Mapping[str, Any]) -> pb.StructuredOutput:
    """From `json_schema` (a dict or its JSON), `regex`, `choices` (a list) or `lark`."""
    forms = dict(fields)
    if isinstance(forms.get("json_schema"), Mapping):
        forms["json_schema"] = json.dumps(forms["json_schema"])
    if "choices" in forms:
        forms["choices"] = pb.Choices(texts=forms["choices"])
    with _refusals("structured_output"):
        return pb.StructuredOutput(**forms)


@contextmanager
def _refusals(param: str) -> Iterator[None]:
    """Raise what the message type refuses as the error that the gateway would give.

    Raises:
        InvalidRequestError: naming `param`.
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(
            f"{param} cannot be sent: {error}.", "See the API reference.", param=param
        ) from None


def generate_message(
    model: str, prompt: PromptLike, options: RequestOptions, sampling: Mapping[str, Any]
) -> pb.GenerateRequest:
    """A completion request."""
    return pb.GenerateRequest(
        model=model,
        sampling=sampling_message(sampling),
        request_id=options.request_id,
        priority=options.priority,
        echo=options.echo,
        timeout_s=options.timeout_s,
        **prompt_fields(prompt),
    )


def chat_message(
    model: str,
    messages: Iterable[MessageLike],
    options: RequestOptions,
    sampling: Mapping[str, Any],
) -> pb.ChatRequest:
    """A chat request."""
    return pb.ChatRequest(
        model=model,
        messages=turns(messages),
        sampling=sampling_message(sampling),
        request_id=options.request_id,
        priority=options.priority,
        timeout_s=options.timeout_s,
    )


def turns(messages: Iterable[MessageLike]) -> list[pb.ChatMessage]:
    """Messages given as `ChatTurn`s or as OpenAI-like dicts."""
    return [
        pb.ChatMessage(role=m.role, content=m.content, name=m.name)
        if isinstance(m, ChatTurn)
        else pb.ChatMessage(**m)
        for m in messages
    ]


def prompt_fields(prompt: PromptLike) -> dict[str, Any]:
    """The oneof member for text or ids."""
    with _refusals("prompt"):
        if isinstance(prompt, str):
            prompt.encode()  # a lone surrogate is no text
            return {"text": prompt}
        return {"token_ids": pb.TokenIds(ids=prompt)}


def inputs(prompts: Iterable[PromptLike]) -> list[pb.EmbedInput]:
    """Several texts or id lists."""
    return [pb.EmbedInput(**prompt_fields(prompt)) for prompt in prompts]


def piece_from_proto(message: pb.GenerateResponse) -> Piece:
    """One streamed answer."""
    return Piece(
        index=message.index,
        text=message.text,
        token_ids=tuple(message.token_ids),
        logprobs=_scores(message.logprobs),
        prompt_logprobs=_scores(message.prompt_logprobs),
        finish_reason=FinishReason(message.finish_reason) if message.finish_reason else None,
        stop_reason=message.stop_reason,
        usage=_usage(message.usage) if message.HasField("usage") else None,
    )


def completions(pieces: Iterable[Piece]) -> list[Completion]:
    """All pieces of a stream joined per choice, ordered by index."""
    by_index: dict[int, list[Piece]] = {}
    for piece in pieces:
        by_index.setdefault(piece.index, []).append(piece)
    return [_completion(index, by_index[index]) for index in sorted(by_index)]


def _completion(index: int, pieces: Sequence[Piece]) -> Completion:
    last = pieces[-1]
    return Completion(
        index=index,
        text="".join(piece.text for piece in pieces),
        token_ids=tuple(token for piece in pieces for token in piece.token_ids),
        logprobs=tuple(entry for piece in pieces for entry in piece.logprobs),
        prompt_logprobs=tuple(entry for piece in pieces for entry in piece.prompt_logprobs),
        finish_reason=last.finish_reason or FinishReason.ABORT,
        stop_reason=last.stop_reason,
    )


def embed_from_proto(message: pb.EmbedResponse) -> EmbedOutput:
    """Vectors."""
    return EmbedOutput(
        request_id=message.request_id,
        vectors=tuple(tuple(entry.values) for entry in message.embeddings),
        usage=_usage(message.usage),
    )


def score_from_proto(message: pb.ScoreResponse) -> ScoreOutput:
    """Scores."""
    return ScoreOutput(
        request_id=message.request_id,
        scores=tuple(_scores(entry.logprobs) for entry in message.scores),
        usage=_usage(message.usage),
    )


def model_from_proto(message: pb.Model) -> ModelInfo:
    """A served model."""
    names = (field.name for field in dataclasses.fields(ModelInfo))
    return ModelInfo(**{name: getattr(message, name) for name in names})


def status_from_proto(message: pb.StatusResponse) -> dict[str, Any]:
    """The status as plain data with the proto's field names; every field is present.

    What is a message of its own and unset is None.
    """
    return _plain(message)


def _plain(message: Message) -> dict[str, Any]:
    """A message as dicts, lists and scalars; unlike JSON's form, 64-bit integers stay integers."""
    fields: dict[str, Any] = {}
    for descriptor in message.DESCRIPTOR.fields:
        value = getattr(message, descriptor.name)
        if isinstance(value, MutableMapping):
            fields[descriptor.name] = dict(value)
        elif descriptor.message_type is not None and descriptor.is_repeated:
            fields[descriptor.name] = [_plain(entry) for entry in value]
        elif descriptor.message_type is not None:
            is_set = message.HasField(descriptor.name)
            fields[descriptor.name] = _plain(value) if is_set else None
        elif descriptor.is_repeated:
            fields[descriptor.name] = list(value)
        else:
            fields[descriptor.name] = value
    return fields


def _usage(message: pb.Usage) -> Usage:
    return Usage(
        prompt_tokens=message.prompt_tokens,
        completion_tokens=message.completion_tokens,
        cached_tokens=message.cached_tokens,
    )


def _scores(messages: Iterable[pb.TokenLogprob]) -> tuple[TokenScore, ...]:
    return tuple(
        TokenScore(
            token_id=m.token_id,
            text=m.token,
            # Rank 0 marks the first prompt token, which has no logprob.
            logprob=m.logprob if m.rank else None,
            rank=m.rank,
            top=tuple(
                TopToken(token_id=top.token_id, logprob=top.logprob, text=top.token)
                for top in m.top
            ),
        )
        for m in messages
    )
