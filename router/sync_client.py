"""The blocking client; users import it from `router.client`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any

import grpc

from router import client_calls as calls
from router import client_codec as codec
from router.api import EmbedOutput, ModelInfo, Piece, ScoreOutput
from router.client_calls import Answer, UnaryCall, coded_errors
from router.client_codec import Completion, MessageLike, PromptLike, RequestOptions
from router.client_transport import channel_options, key_metadata
from router.grpc.status_details import REQUEST_ID_KEY
from router.proto import penstock_pb2_grpc as pb_grpc

_NO_OPTIONS = RequestOptions()


class TokenStream(Iterator[Piece]):
    """A running generation: iterate its pieces, or take `result()`."""

    def __init__(self, call: Any) -> None:
        self._call = call

    @property
    def request_id(self) -> str:
        """The request's id; waits for the first piece.

        Raises:
            PenstockError: the request was refused.
        """
        with coded_errors():
            metadata = dict(self._call.initial_metadata())
        return str(metadata.get(REQUEST_ID_KEY, ""))

    def __next__(self) -> Piece:
        with coded_errors():
            return codec.piece_from_proto(next(self._call))

    def result(self) -> list[Completion]:
        """Read to the end; one entry per choice."""
        return codec.completions(self)

    def cancel(self) -> None:
        """Stop the request."""
        self._call.cancel()

    def __enter__(self) -> TokenStream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cancel()


class PenstockClient:
    """Blocking client of one cluster; safe to share by threads.

    Example:
        with PenstockClient("localhost:8101") as client:
            [answer] = client.chat("tiny", [{"role": "user", "content": "Hi"}]).result()
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
            grpc.insecure_channel(target, options=options)
            if credentials is None
            else grpc.secure_channel(target, credentials, options=options)
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
    ) -> TokenStream:
        """Complete a text or a list of token ids; `sampling` are SamplingOptions fields."""
        message = codec.generate_message(model, prompt, options, sampling)
        return TokenStream(
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
    ) -> TokenStream:
        """Answer a conversation: `ChatTurn`s or dicts with role and content."""
        message = codec.chat_message(model, messages, options, sampling)
        return TokenStream(self._stub.Chat(message, timeout=deadline_s, metadata=self._metadata))

    def embed(
        self,
        model: str,
        inputs: Iterable[PromptLike],
        *,
        deadline_s: float | None = None,
        **fields: Any,
    ) -> EmbedOutput:
        """Embed inputs; `fields`: pooling, normalize, dimensions, request_id."""
        return self._ask(calls.embed(model, inputs, fields), deadline_s)

    def score(
        self,
        model: str,
        prompt: PromptLike,
        continuations: Iterable[PromptLike],
        *,
        deadline_s: float | None = None,
        request_id: str = "",
    ) -> ScoreOutput:
        """Log-probabilities of each continuation's tokens after the prompt."""
        return self._ask(calls.score(model, prompt, continuations, request_id), deadline_s)

    def tokenize(
        self,
        model: str,
        text: str = "",
        *,
        messages: Iterable[MessageLike] | None = None,
        add_special_tokens: bool = True,
        deadline_s: float | None = None,
    ) -> tuple[list[int], list[str]]:
        """Token ids and printable tokens of a text, or of a conversation."""
        return self._ask(calls.tokenize(model, text, messages, add_special_tokens), deadline_s)

    def detokenize(
        self,
        model: str,
        token_ids: Sequence[int],
        *,
        skip_special_tokens: bool = True,
        deadline_s: float | None = None,
    ) -> str:
        """Text of token ids."""
        return self._ask(calls.detokenize(model, token_ids, skip_special_tokens), deadline_s)

    def models(self, *, deadline_s: float | None = None) -> list[ModelInfo]:
        """All served models."""
        return self._ask(calls.models(), deadline_s)

    def cancel(self, request_id: str, *, deadline_s: float | None = None) -> bool:
        """Stop a running request; False when the gateway has none of that id."""
        return self._ask(calls.cancel(request_id), deadline_s)

    def status(self, *, deadline_s: float | None = None) -> dict[str, Any]:
        """The cluster's status as plain data; keys as in the proto's StatusResponse."""
        return self._ask(calls.status(), deadline_s)

    def close(self) -> None:
        """Close the connection; running streams end as cancelled."""
        self._channel.close()

    def _ask(self, call: UnaryCall[Answer], deadline_s: float | None) -> Answer:
        with coded_errors():
            message = getattr(self._stub, call.method)(
                call.message, timeout=deadline_s, metadata=self._metadata
            )
        return call.read(message)

    def __enter__(self) -> PenstockClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
