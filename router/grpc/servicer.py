"""The public gRPC service over a `Handler`: it translates, streams and maps errors, no more.

Every method goes through `coded`, which names the call (request id), turns a failure into a status
with details, and never lets an exception's text out. A request message that could not be parsed
arrives as `MalformedRequest` (see `server.py`), because grpcio would answer INTERNAL for it.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

from cluster.base.errors import InternalError, InvalidRequestError, PenstockError
from cluster.base.ids import is_client_id, new_request_id
from router.api import Generation, Handler
from router.error_map import status_of
from router.grpc import codec
from router.grpc.call import ServerCall
from router.grpc.status_details import REQUEST_ID_KEY, trailing_metadata
from router.proto import penstock_pb2 as pb
from router.proto import penstock_pb2_grpc as pb_grpc
from router.tier_fields import tier_fields

log = logging.getLogger(__name__)

Context: TypeAlias = ServerCall
RequestT = TypeVar("RequestT")
ResponseT = TypeVar("ResponseT")
ServicerT = TypeVar("ServicerT")


@dataclass(frozen=True, slots=True)
class MalformedRequest:
    """Stands for bytes that are no message of the expected type."""

    expected: str


def coded(
    method: Callable[[ServicerT, RequestT, Context, str], Awaitable[ResponseT]],
) -> Callable[[ServicerT, RequestT, Context], Awaitable[ResponseT]]:
    """Give a method its call's request id and turn its failures into coded statuses.

    The id is the client's where the message has one, else a fresh one.
    """

    @functools.wraps(method)
    async def guarded(self: ServicerT, request: RequestT, context: Context) -> ResponseT:
        call_id = _client_id(request) or new_request_id()
        try:
            if isinstance(request, MalformedRequest):
                raise InvalidRequestError(f"The request is not a valid {request.expected} message.")
            return await method(self, request, context, call_id)
        except PenstockError as error:
            failure = error
        except Exception:
            log.exception("request %r failed in the gRPC front", call_id[:64])
            failure = InternalError("The gateway failed; its log has the details.")
        # A client's id that was refused is not repeated: it may not even be valid metadata.
        shown_id = call_id if is_client_id(call_id) else new_request_id()
        await context.abort(
            status_of(failure).grpc, str(failure), trailing_metadata(failure, shown_id)
        )
        raise failure  # abort has raised; this tells the type checker so

    return guarded


def _client_id(request: object) -> str:
    if isinstance(request, pb.GenerateRequest | pb.ChatRequest | pb.EmbedRequest | pb.ScoreRequest):
        return request.request_id
    return ""


class PenstockServicer(pb_grpc.PenstockServicer):
    """`penstock.v1.Penstock` over a handler."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler

    @coded
    async def Generate(  # noqa: N802 (method names are the proto's)
        self, request: pb.GenerateRequest, context: Context, call_id: str
    ) -> None:
        """Stream a completion."""
        raw = codec.generation_input(request, call_id, context.peer())
        await _stream(await self._handler.generate(raw), context)

    @coded
    async def Chat(  # noqa: N802
        self, request: pb.ChatRequest, context: Context, call_id: str
    ) -> None:
        """Stream a chat completion."""
        raw = codec.chat_input(request, call_id, context.peer())
        await _stream(await self._handler.generate(raw), context)

    @coded
    async def Embed(  # noqa: N802
        self, request: pb.EmbedRequest, context: Context, call_id: str
    ) -> pb.EmbedResponse:
        """Embed inputs."""
        output = await self._handler.embed(codec.embed_input(request, call_id))
        await _name_call(context, output.request_id)
        return codec.embed_to_proto(output)

    @coded
    async def Score(  # noqa: N802
        self, request: pb.ScoreRequest, context: Context, call_id: str
    ) -> pb.ScoreResponse:
        """Score continuations."""
        output = await self._handler.score(codec.score_input(request, call_id))
        await _name_call(context, output.request_id)
        return codec.score_to_proto(output)

    @coded
    async def Tokenize(  # noqa: N802
        self, request: pb.TokenizeRequest, context: Context, call_id: str
    ) -> pb.TokenizeResponse:
        """Token ids of text or of a conversation."""
        messages = codec.chat_turns(request.messages) if request.messages else None
        special = request.add_special_tokens if request.HasField("add_special_tokens") else True
        ids, texts = await self._handler.tokenize(request.model, request.text, messages, special)
        await _name_call(context, call_id)
        return pb.TokenizeResponse(token_ids=ids, tokens=texts)

    @coded
    async def Detokenize(  # noqa: N802
        self, request: pb.DetokenizeRequest, context: Context, call_id: str
    ) -> pb.DetokenizeResponse:
        """Text of token ids."""
        skip = request.skip_special_tokens if request.HasField("skip_special_tokens") else True
        text = await self._handler.detokenize(request.model, list(request.token_ids), skip)
        await _name_call(context, call_id)
        return pb.DetokenizeResponse(text=text)

    @coded
    async def ListModels(  # noqa: N802
        self, request: pb.ListModelsRequest, context: Context, call_id: str
    ) -> pb.ListModelsResponse:
        """All served models."""
        await _name_call(context, call_id)
        models = [codec.model_to_proto(info) for info in self._handler.list_models()]
        return pb.ListModelsResponse(models=models)

    @coded
    async def Cancel(  # noqa: N802
        self, request: pb.CancelRequest, context: Context, call_id: str
    ) -> pb.CancelResponse:
        """Stop a running request."""
        await _name_call(context, call_id)
        return pb.CancelResponse(cancelled=await self._handler.cancel(request.request_id))

    @coded
    async def Status(  # noqa: N802
        self, request: pb.StatusRequest, context: Context, call_id: str
    ) -> pb.StatusResponse:
        """The cluster as this gateway sees it."""
        await _name_call(context, call_id)
        return codec.status_to_proto(await self._handler.status())


async def _stream(generation: Generation, context: Context) -> None:
    """Write every piece; whatever ends the call early also stops the engine.

    Headers go out with the first piece: until then a client may retry the call (gRFC A6).
    """
    named = False
    async with aclosing(generation.pieces) as pieces:
        async for piece in pieces:
            if not named:
                named = True
                await _name_call(context, generation.request_id, _tier(generation))
            message = codec.piece_to_proto(generation.request_id, piece)
            if piece.usage is None:
                await context.write(message)
            else:
                await context.write_last(message)


def _tier(generation: Generation) -> tuple[tuple[str, str], ...]:
    return tuple((f"penstock-{name}", value) for name, value in tier_fields(generation.tier))


async def _name_call(
    context: Context, request_id: str, more: tuple[tuple[str, str], ...] = ()
) -> None:
    metadata = ((REQUEST_ID_KEY, request_id), *more)
    context.set_trailing_metadata(metadata)
    await context.send_initial_metadata(metadata)
