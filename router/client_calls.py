"""The unary calls of both clients: what goes out, and how the answer is read. No network here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import grpc
from google.protobuf.message import Message

from router import client_codec as codec
from router.api import EmbedOutput, ModelInfo, ScoreOutput
from router.client_codec import MessageLike, PromptLike
from router.grpc.status_details import error_from_status
from router.proto import penstock_pb2 as pb

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class UnaryCall(Generic[Answer]):
    """One question to the gateway."""

    method: str
    """Name of the method in the `.proto` file, and of the stub's attribute."""
    message: Message
    read: Callable[[Any], Answer]
    """Turns the method's response message into what the caller gets."""


@contextmanager
def coded_errors() -> Iterator[None]:
    """Raise what the gateway raised instead of gRPC's own error.

    Raises:
        PenstockError: with the code, cause, remedy and field of the status.
    """
    try:
        yield
    except grpc.RpcError as error:
        raise error_from_status(
            error.code(), error.details() or "", error.trailing_metadata()
        ) from None


def embed(
    model: str, inputs: Iterable[PromptLike], fields: Mapping[str, Any]
) -> UnaryCall[EmbedOutput]:
    """Vectors of inputs."""
    message = pb.EmbedRequest(model=model, inputs=codec.inputs(inputs), **fields)
    return UnaryCall("Embed", message, codec.embed_from_proto)


def score(
    model: str, prompt: PromptLike, continuations: Iterable[PromptLike], request_id: str
) -> UnaryCall[ScoreOutput]:
    """Log-probabilities of continuations."""
    message = pb.ScoreRequest(
        model=model,
        continuations=codec.inputs(continuations),
        request_id=request_id,
        **codec.prompt_fields(prompt),
    )
    return UnaryCall("Score", message, codec.score_from_proto)


def tokenize(
    model: str, text: str, messages: Iterable[MessageLike] | None, add_special_tokens: bool
) -> UnaryCall[tuple[list[int], list[str]]]:
    """Token ids and printable tokens."""
    message = pb.TokenizeRequest(
        model=model,
        text=text,
        messages=codec.turns(messages or ()),
        add_special_tokens=add_special_tokens,
    )
    return UnaryCall("Tokenize", message, lambda a: (list(a.token_ids), list(a.tokens)))


def detokenize(model: str, token_ids: Sequence[int], skip_special_tokens: bool) -> UnaryCall[str]:
    """Text of token ids."""
    message = pb.DetokenizeRequest(
        model=model, token_ids=token_ids, skip_special_tokens=skip_special_tokens
    )
    return UnaryCall("Detokenize", message, lambda answer: str(answer.text))


def models() -> UnaryCall[list[ModelInfo]]:
    """All served models."""
    return UnaryCall(
        "ListModels",
        pb.ListModelsRequest(),
        lambda answer: [codec.model_from_proto(entry) for entry in answer.models],
    )


def cancel(request_id: str) -> UnaryCall[bool]:
    """Whether a running request was stopped."""
    message = pb.CancelRequest(request_id=request_id)
    return UnaryCall("Cancel", message, lambda answer: bool(answer.cancelled))


def status() -> UnaryCall[dict[str, Any]]:
    """The cluster's status as plain data."""
    return UnaryCall("Status", pb.StatusRequest(), codec.status_from_proto)
