"""Chat answers in which a model may call tools: text, calls, and the events of a stream.

A call is shown when it is complete, in one delta with its id, name and arguments. The arguments of
a function that had to be called are all that the answer is, so they are streamed as they come.
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Iterable, Sequence
from typing import Any

from router.api import Generation, Piece, Usage
from router.http.answer_shapes import (
    ChatShape,
    ShapeOptions,
    WholeChoice,
    answer_ending,
)
from router.http.json_text import json_bytes
from router.http.logprob_format import chat_logprobs
from router.tools.call_formats import CallFormat, ToolCall
from router.tools.call_reader import CallReader
from router.tools.tool_use import ToolChoice, ToolUse

_ID_LETTERS = string.ascii_letters + string.digits
_MISTRAL_ID_LENGTH = 9
"""Mistral's templates refuse others."""
_NULL = b"null"


def chat_shape(generation: Generation, options: ShapeOptions) -> ChatShape | ToolChatShape:
    """How a chat answer is printed."""
    if generation.tools is None:
        return ChatShape(generation, options)
    return ToolChatShape(generation, options, generation.tools)


class ToolChatShape:
    """Prints /v1/chat/completions where tools are offered."""

    def __init__(self, generation: Generation, options: ShapeOptions, tools: ToolUse) -> None:
        self._plain = ChatShape(generation, options)
        self._options = options
        self._tools = tools
        self._events = self._plain.events
        self._choices: dict[int, _Choice] = {}

    def whole(self, choices: Sequence[WholeChoice], usage: Usage) -> dict[str, Any]:
        """The body of a non-streamed answer."""
        body = self._plain.whole(choices, usage)
        for shown, choice in zip(body["choices"], choices, strict=True):
            reader = _Choice(self._tools)
            parts = [*reader.take("".join(choice.text)), *reader.end()]
            text = "".join(part for part in parts if isinstance(part, str))
            calls = [part for part in parts if isinstance(part, dict)]
            for call in calls:
                del call["index"]
            shown["message"]["content"] = text or (None if calls else "")
            if calls:
                shown["message"]["tool_calls"] = calls
            ending = answer_ending(
                choice.finish_reason, choice.stop_reason, has_called=reader.has_chosen_to_call
            )
            shown.update(ending)
        return body

    def event(self, piece: Piece) -> bytes:
        """The events of one piece: one for each part of text and each call."""
        choice = self._choices.get(piece.index)
        opening = b""
        if choice is None:
            choice = self._choices[piece.index] = _Choice(self._tools)
            opening = self._plain.event(Piece(index=piece.index))
        parts = list(choice.take(piece.text))
        if piece.finish_reason is not None:
            parts += choice.end()
        deltas = [_delta(part) for part in parts]
        scores = piece.logprobs if self._options.logprobs else ()
        if not deltas and (scores or piece.finish_reason):
            deltas = [b'"delta":{}']
        return opening + b"".join(self._print(piece, deltas, choice))

    def ending(self, usage: Usage) -> bytes:
        """Usage if asked for, and the end mark."""
        return self._plain.ending(usage)

    def _print(self, piece: Piece, deltas: Sequence[bytes], choice: _Choice) -> Iterable[bytes]:
        """Log-probabilities go with the piece's first event, its ending with the last."""
        between = Piece(index=piece.index)
        scores = piece.logprobs if self._options.logprobs else ()
        for at, delta in enumerate(deltas):
            logprobs = json_bytes(chat_logprobs(scores)) if scores and at == 0 else _NULL
            shown = piece if at == len(deltas) - 1 else between
            yield self._events.event(shown, delta, logprobs, has_called=choice.has_chosen_to_call)


class _Choice:
    """One choice: what is text in it, and what is a call."""

    def __init__(self, tools: ToolUse) -> None:
        self._tools = tools
        self._reader = CallReader(tools.format, tools.names)
        self._num_calls = 0

    @property
    def has_chosen_to_call(self) -> bool:
        """Whether it called something that it was not told by name; OpenAI tells them apart."""
        return self._num_calls > 0 and self._tools.choice is not ToolChoice.NAMED

    def take(self, text: str) -> Iterable[str | dict[str, Any]]:
        """Parts of the answer: text, or a call as deltas have it."""
        if not text:
            return
        if self._tools.choice is ToolChoice.NAMED:
            yield self._named(text)
            return
        for part in self._reader.feed(text):
            yield from self._shown(part)

    def end(self) -> Iterable[str | dict[str, Any]]:
        """What is left when the answer has ended."""
        if self._tools.choice is not ToolChoice.NAMED:
            for part in self._reader.finish():
                yield from self._shown(part)

    def _named(self, text: str) -> dict[str, Any]:
        """A part of the arguments; the first one says whose they are."""
        self._num_calls += 1
        if self._num_calls > 1:
            return {"index": 0, "function": {"arguments": text}}
        return self._call(0, ToolCall(name=self._tools.named, arguments=text))

    def _shown(self, part: str | ToolCall) -> Iterable[str | dict[str, Any]]:
        if isinstance(part, str):
            yield part
        elif self._tools.parallel or not self._num_calls:
            self._num_calls += 1
            yield self._call(self._num_calls - 1, part)

    def _call(self, index: int, call: ToolCall) -> dict[str, Any]:
        return {
            "index": index,
            "id": _new_id(self._tools.format),
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }


def _delta(part: str | dict[str, Any]) -> bytes:
    shown = {"content": part} if isinstance(part, str) else {"tool_calls": [part]}
    return b'"delta":' + json_bytes(shown)


def _new_id(form: CallFormat | None) -> str:
    if form is CallFormat.MISTRAL:
        return "".join(secrets.choice(_ID_LETTERS) for _ in range(_MISTRAL_ID_LENGTH))
    return f"call_{secrets.token_hex(12)}"
