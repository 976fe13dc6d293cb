"""Completions and chat answers: whole bodies, and the events of a stream.

A stream's events differ only in a few values, so each shape prepares the constant part once and an
event is a few joined byte strings (about 3 us). Shapes are per request and hold no tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from replicas.api import FinishReason
from router.api import Generation, Piece, TokenScore, Usage
from router.http.json_text import json_bytes
from router.http.logprob_format import CompletionLogprobs, chat_logprobs, prompt_logprobs

DONE = b"data: [DONE]\n\n"
_NULL = b"null"


@dataclass(slots=True, kw_only=True)
class WholeChoice:
    """One choice, gathered."""

    index: int
    text: list[str] = field(default_factory=list)
    scores: list[TokenScore] = field(default_factory=list)
    prompt_scores: list[TokenScore] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str = ""

    def add(self, piece: Piece) -> None:
        """Append one piece."""
        self.text.append(piece.text)
        self.scores += piece.logprobs
        self.prompt_scores += piece.prompt_logprobs
        self.finish_reason = piece.finish_reason or self.finish_reason
        self.stop_reason = piece.stop_reason or self.stop_reason


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapeOptions:
    """What the body asked to see."""

    logprobs: bool = False
    prompt_logprobs: bool = False
    echo: bool = False
    include_usage: bool = False


class AnswerShape(Protocol):
    """How one endpoint prints."""

    def whole(self, choices: Sequence[WholeChoice], usage: Usage) -> dict[str, Any]:
        """The body of a non-streamed answer."""
        ...

    def event(self, piece: Piece) -> bytes:
        """The events of one piece; empty when it shows nothing."""
        ...

    def ending(self, usage: Usage) -> bytes:
        """The last events of a stream that went well."""
        ...


class CompletionShape:
    """Prints /v1/completions."""

    def __init__(self, generation: Generation, options: ShapeOptions) -> None:
        self._head = {
            "id": f"cmpl-{generation.request_id}",
            "object": "text_completion",
            "created": generation.created,
            "model": generation.model,
        }
        self._options = options
        self._events = EventParts(self._head, options.include_usage)
        self._offsets: dict[int, CompletionLogprobs] = {}

    def whole(self, choices: Sequence[WholeChoice], usage: Usage) -> dict[str, Any]:
        """The body of a non-streamed answer."""
        return {
            **self._head,
            "choices": [self._whole_choice(choice) for choice in choices],
            "usage": usage_body(usage),
        }

    def event(self, piece: Piece) -> bytes:
        """One event, or nothing."""
        scores = self._scores(piece.prompt_logprobs, piece.logprobs)
        if not (piece.text or scores or piece.finish_reason):
            return b""
        logprobs = _NULL
        if scores:
            offsets = self._offsets.setdefault(piece.index, CompletionLogprobs())
            logprobs = json_bytes(offsets.format(scores))
        return self._events.event(piece, b'"text":' + json_bytes(piece.text), logprobs)

    def ending(self, usage: Usage) -> bytes:
        """Usage if asked for, and the end mark."""
        return self._events.ending(usage)

    def _whole_choice(self, choice: WholeChoice) -> dict[str, Any]:
        scores = self._scores(choice.prompt_scores, choice.scores)
        body: dict[str, Any] = {
            "index": choice.index,
            "text": "".join(choice.text),
            "logprobs": CompletionLogprobs().format(scores) if self._options.logprobs else None,
            **answer_ending(choice.finish_reason, choice.stop_reason),
        }
        if self._options.prompt_logprobs:
            body["prompt_logprobs"] = prompt_logprobs(choice.prompt_scores)
        return body

    def _scores(
        self, prompt: Sequence[TokenScore], output: Sequence[TokenScore]
    ) -> list[TokenScore]:
        if not self._options.logprobs:
            return []
        return [*(prompt if self._options.echo else ()), *output]


class ChatShape:
    """Prints /v1/chat/completions."""

    def __init__(self, generation: Generation, options: ShapeOptions) -> None:
        self._head = {
            "id": f"chatcmpl-{generation.request_id}",
            "object": "chat.completion",
            "created": generation.created,
            "model": generation.model,
        }
        self._options = options
        self.events = EventParts(
            {**self._head, "object": "chat.completion.chunk"}, options.include_usage
        )
        self._introduced: set[int] = set()

    def whole(self, choices: Sequence[WholeChoice], usage: Usage) -> dict[str, Any]:
        """The body of a non-streamed answer."""
        body = {
            **self._head,
            "choices": [self._whole_choice(choice) for choice in choices],
            "usage": usage_body(usage),
        }
        if self._options.prompt_logprobs:
            body["prompt_logprobs"] = prompt_logprobs(choices[0].prompt_scores)
        return body

    def event(self, piece: Piece) -> bytes:
        """The role's event before a choice's first one, then the piece's."""
        opening = b"" if piece.index in self._introduced else self._introduce(piece.index)
        scores = piece.logprobs if self._options.logprobs else ()
        if not (piece.text or scores or piece.finish_reason):
            return opening
        delta = b'"delta":{"content":' + json_bytes(piece.text) + b"}" if piece.text else b""
        logprobs = json_bytes(chat_logprobs(scores)) if scores else _NULL
        return opening + self.events.event(piece, delta or b'"delta":{}', logprobs)

    def ending(self, usage: Usage) -> bytes:
        """Usage if asked for, and the end mark."""
        return self.events.ending(usage)

    def _introduce(self, index: int) -> bytes:
        self._introduced.add(index)
        delta = b'"delta":{"role":"assistant","content":""}'
        return self.events.event(Piece(index=index), delta, _NULL)

    def _whole_choice(self, choice: WholeChoice) -> dict[str, Any]:
        message = {"role": "assistant", "content": "".join(choice.text), "refusal": None}
        return {
            "index": choice.index,
            "message": message,
            "logprobs": chat_logprobs(choice.scores) if self._options.logprobs else None,
            **answer_ending(choice.finish_reason, choice.stop_reason),
        }


class EventParts:
    """The constant bytes around what changes from event to event."""

    def __init__(self, head: dict[str, Any], include_usage: bool) -> None:
        self._usage = include_usage
        self._prefix = b"data: " + json_bytes(head)[:-1] + b',"choices":['
        self._suffix = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"

    def event(
        self, piece: Piece, content: bytes, logprobs: bytes, *, has_called: bool = False
    ) -> bytes:
        """One choice's event; `content` is its text or delta member."""
        if piece.finish_reason is None:
            tail = b',"finish_reason":null,"stop_reason":null}'
        else:
            ending = answer_ending(piece.finish_reason, piece.stop_reason, has_called=has_called)
            tail = b"," + json_bytes(ending)[1:]
        parts = (
            self._prefix,
            b'{"index":%d,' % piece.index,
            content,
            b',"logprobs":',
            logprobs,
            tail,
            self._suffix,
        )
        return b"".join(parts)

    def ending(self, usage: Usage) -> bytes:
        """The events that close a stream."""
        if not self._usage:
            return DONE
        return self._prefix + b'],"usage":' + json_bytes(usage_body(usage)) + b"}\n\n" + DONE


def usage_body(usage: Usage) -> dict[str, Any]:
    """OpenAI's usage object."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def answer_ending(
    reason: FinishReason | None, stop_reason: str, *, has_called: bool = False
) -> dict[str, str | None]:
    """Why a choice ended; a model that chose to call something has stopped for that."""
    value = None if reason is None else reason.value
    return {
        "finish_reason": "tool_calls" if has_called and reason is FinishReason.STOP else value,
        "stop_reason": stop_reason or None,
    }
