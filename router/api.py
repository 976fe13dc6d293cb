"""The front-neutral request and answer: what gRPC and HTTP both translate to and from.

A front only parses its wire form into these values and prints them back; every check is in
`router/validate.py`, every behaviour in `router/handler.py`, so the fronts cannot differ.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from replicas.api import FinishReason
from router.tools.tool_use import ToolUse


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatTurn:
    """One message of a conversation."""

    role: str
    content: str
    name: str = ""
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    """Of an assistant's turn: OpenAI's objects, with `arguments` as an object, not its text."""
    tool_call_id: str = ""
    """Of a tool's turn: which call it answers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationInput:
    """A generation as the client wrote it, unchecked.

    Exactly one of `text`, `token_ids`, `messages` is given. `sampling` maps the field names of
    the public proto's `SamplingOptions` to raw values; absent means unset.
    """

    model: object
    text: object = None
    token_ids: object = None
    messages: Sequence[ChatTurn] | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    request_id: str = ""
    priority: int = 0
    echo: bool = False
    timeout_s: float = 0.0
    peer: str = ""
    tools: object = None
    """What the model may call, as OpenAI's objects; with `messages` only."""
    tool_choice: object = None
    parallel_tool_calls: object = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TopToken:
    """One alternative at a position."""

    token_id: int
    logprob: float
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenScore:
    """A token's logprob as shown to a client; `logprob` is None for the first prompt token."""

    token_id: int
    text: str
    logprob: float | None
    rank: int = 0
    top: tuple[TopToken, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Token counts of a finished request, all choices together."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One increment of one choice. `usage` is set on the last piece of the whole stream."""

    index: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenScore, ...] = ()
    prompt_logprobs: tuple[TokenScore, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str = ""
    usage: Usage | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TextOrIds:
    """An input given as text or as token ids (exactly one is set)."""

    text: object = None
    token_ids: object = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedInput:
    """An embedding request, unchecked."""

    model: object
    inputs: Sequence[TextOrIds]
    pooling: str = ""
    normalize: bool = True
    dimensions: int = 0
    request_id: str = ""
    timeout_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedOutput:
    """One vector per input."""

    request_id: str
    vectors: tuple[tuple[float, ...], ...]
    usage: Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreInput:
    """Continuations to score after a prompt, unchecked."""

    model: object
    prompt: TextOrIds
    continuations: Sequence[TextOrIds]
    request_id: str = ""
    timeout_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreOutput:
    """Per continuation, the scores of its tokens."""

    request_id: str
    scores: tuple[tuple[TokenScore, ...], ...]
    usage: Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """A served model as shown to clients."""

    name: str
    family: str
    engine: str
    max_context: int
    vocab_size: int
    ready_replicas: int
    replicas: int
    chat: bool
    created: int
    shared_weight_bytes: int = 0
    """Of each rank's weights, what replicas on one node have in common."""


class PieceStream(Protocol):
    """An async iterator of pieces that can be closed early; an async generator is one."""

    def __aiter__(self) -> AsyncIterator[Piece]: ...

    def __anext__(self) -> Awaitable[Piece]: ...

    async def aclose(self) -> None:
        """Stop the engine's work; harmless when everything was read."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Tier:
    """Where a generation runs, for the client to know."""

    model: str
    """The entry of the cluster file: the one asked for, or that it overflows to."""
    engine: str
    overflow: str = ""
    """Why it is not the one asked for: too_long, busy or unavailable."""
    tokens_per_s: float = 0.0
    """Predicted for a request like this among as many as are planned for; 0: not predicted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """An admitted generation: its id is known before the first piece."""

    request_id: str
    model: str
    created: int
    pieces: PieceStream
    """Closing the iterator (`aclose`), or cancelling the task in it, stops the engine's work."""
    tier: Tier | None = None
    tools: ToolUse | None = None
    """What may be called, checked; None: the text is all there is."""


class Handler(Protocol):
    """What a front calls. Every method raises `PenstockError` subclasses and nothing else.

    Errors before admission are raised by the call itself; errors after it by `pieces`.
    """

    async def generate(self, request: GenerationInput) -> Generation:
        """Validate, admit, tokenise, route and start one generation."""
        ...

    async def embed(self, request: EmbedInput) -> EmbedOutput:
        """Embed each input."""
        ...

    async def score(self, request: ScoreInput) -> ScoreOutput:
        """Score each continuation."""
        ...

    async def tokenize(
        self,
        model: object,
        text: object,
        messages: Sequence[ChatTurn] | None,
        add_special_tokens: bool,
    ) -> tuple[list[int], list[str]]:
        """Token ids and their printable forms."""
        ...

    async def detokenize(self, model: object, token_ids: object, skip_special: bool) -> str:
        """Text of token ids."""
        ...

    def list_models(self) -> list[ModelInfo]:
        """All models of the cluster file, ready or not."""
        ...

    async def cancel(self, request_id: str) -> bool:
        """Stop a running request, whichever gateway has it; False when there is none."""
        ...

    async def status(self) -> dict[str, Any]:
        """The cluster's status as JSON-ready data; keys follow the proto's StatusResponse."""
        ...

    def ready(self) -> bool:
        """Whether every model has at least one replica that can take requests."""
        ...
