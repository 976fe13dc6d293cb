"""The asyncio client; users import it from `router.client`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from types import TracebackType
from typing import Any

import grpc
import grpc.aio

from cluster.base.errors import CancelledError
from router import client_calls as calls
from router import client_codec as codec
from router.api import EmbedOutput, ModelInfo, Piece, ScoreOutput
from router.client_calls import Answer, UnaryCall, coded_errors
from router.client_codec import Completion, MessageLike, PromptLike, RequestOptions
from router.client_transport import channel_options, key_metadata
from router.grpc.status_details import REQUEST_ID_KEY
from router.proto import penstock_pb2_grpc as pb_grpc

_NO_OPTIONS = RequestOptions()


class AsyncTokenStream(AsyncIterator[Piece]):
    """A running generation: iterate its pieces, or take `result()`."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._cancelled = False

    async def request_id(self) -> str:
        """The request's id; waits for the first piece.

        Raises:
            PenstockError: the request was refused.
        """
        with coded_errors():
            metadata = await self._call.initial_metadata()
        return str(dict(metadata or ()).get(REQUEST_ID_KEY, ""))

    async def __anext__(self) -> Piece:
        try:
            with coded_errors():
                message = await self._call.read()
        except asyncio.CancelledError:
            if not self._cancelled:
                raise
            raise CancelledError("The request was cancelled.") from None
        if message is grpc.aio.EOF:  # type: ignore[attr-defined]
            raise StopAsyncIteration
        return codec.piece_from_proto(message)

    async def result(self) -> list[Completion]:
        """Read to the end; one entry per choice."""
        return codec.completions([piece async for piece in self])

    def cancel(self) -> None:
        """Stop the request."""
        self._cancelled = True
        self._call.cancel()

    async def __aenter__(self) -> AsyncTokenStream:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cancel()


class AsyncPenstockClient:
    """Asyncio client of one cluster; belongs to the loop it is used on.

    Example:
        async with AsyncPenstockClient("localhost:8101") as client:
            async for piece in client.generate("tiny", "Once upon a time", max_tokens=64):
                print(piece.text, end="")
    """

    def __init__(
        self,
        target: str,
        *,
        api_key: str | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        server_name: str | None = None,
    ) -> None:
        """Connect when the first call is made.

        Args:
            target: `host:port`.
            api_key: sent with every call; without TLS whoever is on the way can read it.
            credentials: switch TLS on; see `tls_credentials`.
            server_name: what the gateway's certificate is for, where that is not `target`.

        Raises:
            ConfigError: the key cannot be sent.
        """
        self._metadata = key_metadata(api_key)
        options = channel_options(server_name)
        self._channel = (
            grpc.aio.insecure_channel(target, options=options)
            if credentials is None
            else grpc.aio.secure_channel(target, credentials, options=options)
        )
        self._stub = pb_grpc.PenstockStub(self._channel)

    def generate(
        self,
        model: str,
        prompt: PromptLike,
        *,
        options: RequestOptions = _NO_OPTIONS,
        deadline_s: float | None = None,
        **sampling: Any,
    ) -> AsyncTokenStream:
        """Complete a text or a list of token ids; `sampling` are SamplingOptions fields."""
        message = codec.generate_message(model, prompt, options, sampling)
        return AsyncTokenStream(
            self._stub.Generate(message, timeout=deadline_s, metadata=self._metadata)
        )

    def chat(
        self,
        model: str,
        messages: Iterable[MessageLike],
        *,
        options: RequestOptions = _NO_OPTIONS,
        deadline_s: float | None = None,
        **sampling: Any,
    ) -> AsyncTokenStream:
        """Answer a conversation: `ChatTurn`s or dicts with role and content."""
        message = codec.chat_message(model, messages, options, sampling)
        return AsyncTokenStream(
            self._stub.Chat(message, timeout=deadline_s, metadata=self._metadata)
        )

    async def embed(
        self,
        model: str,
        inputs: Iterable[PromptLike],
        *,
        deadline_s: float | None = None,
        **fields: Any,
    ) -> EmbedOutput:
        """Embed inputs; `fields`: pooling, normalize, dimensions, request_id."""
        return await self._ask(calls.embed(model, inputs, fields), deadline_s)

    async def score(
        self,
        model: str,
        prompt: PromptLike,
        continuations: Iterable[PromptLike],
        *,
        deadline_s: float | None = None,
        request_id: str = "",
    ) -> ScoreOutput:
        """Log-probabilities of each continuation's tokens after the prompt."""
        return await self._ask(calls.score(model, prompt, continuations, request_id), deadline_s)

    async def tokenize(
        self,
        model: str,
        text: str = "",
        *,
        messages: Iterable[MessageLike] | None = None,
        add_special_tokens: bool = True,
        deadline_s: float | None = None,
    ) -> tuple[list[int], list[str]]:
        """Token ids and printable tokens of a text, or of a conversation."""
        return await self._ask(
            calls.tokenize(model, text, messages, add_special_tokens), deadline_s
        )

    async def detokenize(
        self,
        model: str,
        token_ids: Sequence[int],
        *,
        skip_special_tokens: bool = True,
        deadline_s: float | None = None,
    ) -> str:
        """Text of token ids."""
        return await self._ask(calls.detokenize(model, token_ids, skip_special_tokens), deadline_s)

    async def models(self, *, deadline_s: float | None = None) -> list[ModelInfo]:
        """All served models."""
        return await self._ask(calls.models(), deadline_s)

    async def cancel(self, request_id: str, *, deadline_s: float | None = None) -> bool:
        """Stop a running request; False when the gateway has none of that id."""
        return await self._ask(calls.cancel(request_id), deadline_s)

    async def status(self, *, deadline_s: float | None = None) -> dict[str, Any]:
        """The cluster's status as plain data; keys as in the proto's StatusResponse."""
        return await self._ask(calls.status(), deadline_s)

    async def close(self) -> None:
        """Close the connection; running streams end as cancelled."""
        await self._channel.close(None)

    async def _ask(self, call: UnaryCall[Answer], deadline_s: float | None) -> Answer:
        with coded_errors():
            message = await getattr(self._stub, call.method)(
                call.message, timeout=deadline_s, metadata=self._metadata
            )
        return call.read(message)

    async def __aenter__(self) -> AsyncPenstockClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()
