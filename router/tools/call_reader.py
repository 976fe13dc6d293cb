"""Finds tool calls in an answer while it is written.

A reader is fed the text as it comes. It gives back text that is no part of a call at once, and a
call when it is complete, is JSON and names a function that was offered; what turns out to be no
call is text again, unchanged. So a client never sees half a call, or a broken one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from router.tools.call_formats import CallFormat, ToolCall

_BLANK = " \n\r\t"
_ENDS_OF_CALLS = "}]>"
_PYTHON_TAG = "<|python_tag|>"
_HERMES_END = re.compile(r"\s*</tool_call>")
_LLAMA3_START = re.compile(r"[\s;]*(?:<\|python_tag\|>)?\s*")
_LISTED_START = re.compile(r"[\s\[,]*")
_LISTED_END = re.compile(r"\s*\]\s*")
_MISTRAL_HEAD = re.compile(r"\s*([\w-]+)(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?\s*(?=\{)")

Found = tuple[list[ToolCall], int]
"""Calls at the beginning of a text, and the characters they take with what closes them."""


class CallReader:
    """Reads one answer of a model that is free to call, or is made to by a grammar.

    Args:
        form: how calls are written; None: as a grammar wants them (`forced_calls.py`).
        names: the functions that were offered.
    """

    def __init__(self, form: CallFormat | None, names: frozenset[str]) -> None:
        self._form = _FORMS[form]
        self._names = names
        self._unread = ""
        self._is_inside = not self._form.opening
        self._is_text = False
        self._has_called = False

    def feed(self, text: str) -> Iterator[str | ToolCall]:
        """Add text; what is certain now."""
        self._unread += text
        may_end = any(mark in text for mark in _ENDS_OF_CALLS)
        yield from self._parts(may_end=may_end, is_over=False)

    def finish(self) -> Iterator[str | ToolCall]:
        """The answer has ended; the rest of it."""
        yield from self._parts(may_end=True, is_over=True)
        rest, self._unread = self._unread, ""
        if self._is_inside and not self._is_text:
            rest = self._form.opening + rest
        if rest.strip(_BLANK) or (rest and not self._has_called):
            yield rest

    def _parts(self, *, may_end: bool, is_over: bool) -> Iterator[str | ToolCall]:
        form = self._form
        while self._unread:
            if not self._is_inside:
                yield from self._until_opening()
                if not self._is_inside:
                    return
            if not form.opening and (self._is_text or not form.may_begin(self._unread)):
                yield self._take_text()
                return
            found = form.read(self._unread, self._names, is_over) if may_end else None
            if found is None:
                return
            calls, length = found
            self._unread = self._unread[length:]
            self._is_inside = not form.opening
            self._has_called = True
            yield from calls

    def _until_opening(self) -> Iterator[str]:
        """Text before the next call, or all that cannot be the beginning of one.

        Blanks around calls belong to the form, not to the answer.
        """
        opening, text = self._form.opening, self._unread
        at = text.find(opening)
        if at >= 0:
            self._unread = text[at + len(opening) :]
            self._is_inside = True
            safe = text[:at].rstrip(_BLANK)
        else:
            tail = range(min(len(opening) - 1, len(text)), 0, -1)
            cut = next((n for n in tail if opening.startswith(text[-n:])), 0)
            safe = text[: len(text) - cut].rstrip(_BLANK)
            self._unread = text[len(safe) :]
        if safe:
            yield safe

    def _take_text(self) -> str:
        """All that is there; what follows is text too."""
        self._is_text = True
        text, self._unread = self._unread, ""
        return text


@dataclass(frozen=True, slots=True)
class _Form:
    opening: str
    """What stands before a call; empty: a call can only be at the beginning of the answer."""
    read: Callable[[str, frozenset[str], bool], Found | None]
    """Takes a call off the beginning of a text, which may be the whole rest of the answer."""
    may_begin: Callable[[str], bool] = bool
    """Whether a text can still become a call; of forms without `opening`."""


def _read_hermes(text: str, names: frozenset[str], is_over: bool) -> Found | None:
    call, end = _named_object(text, 0, names)
    if call is None:
        return None
    if closing := _HERMES_END.match(text, end):
        return [call], closing.end()
    # Some models end their answer in place of closing the last call.
    return ([call], len(text)) if is_over and not text[end:].strip(_BLANK) else None


def _read_llama3(text: str, names: frozenset[str], is_over: bool) -> Found | None:
    start = _LLAMA3_START.match(text)
    call, end = _named_object(text, start.end() if start else 0, names)
    return None if call is None else ([call], end)


def _read_mistral(text: str, names: frozenset[str], is_over: bool) -> Found | None:
    if text.lstrip(_BLANK).startswith("["):
        listed, end = _decoded(text, 0)
        calls = [_call(entry, names) for entry in listed] if isinstance(listed, list) else []
        whole = [call for call in calls if call is not None]
        return (whole, end) if calls and len(whole) == len(calls) else None
    head = _MISTRAL_HEAD.match(text)
    if head is None or head[1] not in names:
        return None
    arguments, end = _decoded(text, head.end())
    return ([_tool_call(head[1], arguments)], end) if isinstance(arguments, dict) else None


def _read_listed(text: str, names: frozenset[str], is_over: bool) -> Found | None:
    """One call of `[{...}, {...}]`, with the brackets and commas around it."""
    if text.strip(_BLANK) == "]":
        return [], len(text)
    start = _LISTED_START.match(text)
    call, end = _named_object(text, start.end() if start else 0, names)
    closing = _LISTED_END.match(text, end)
    return None if call is None else ([call], closing.end() if closing else end)


def _may_be_llama3(text: str) -> bool:
    text = text.lstrip(_BLANK + ";")
    is_tag = text.startswith(_PYTHON_TAG) or _PYTHON_TAG.startswith(text)
    return is_tag or text.startswith("{")


_FORMS = {
    CallFormat.HERMES: _Form("<tool_call>", _read_hermes),
    CallFormat.LLAMA3_JSON: _Form("", _read_llama3, _may_be_llama3),
    CallFormat.MISTRAL: _Form("[TOOL_CALLS]", _read_mistral),
    None: _Form("", _read_listed),
}


def _named_object(text: str, start: int, names: frozenset[str]) -> tuple[ToolCall | None, int]:
    value, end = _decoded(text, start)
    return _call(value, names), end


def _call(value: Any, names: frozenset[str]) -> ToolCall | None:
    """A call in the form that all models share but for a word."""
    if not isinstance(value, dict) or value.get("name") not in names:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    return _tool_call(value["name"], arguments) if isinstance(arguments, dict) else None


def _tool_call(name: str, arguments: dict[str, Any]) -> ToolCall:
    return ToolCall(name=name, arguments=json.dumps(arguments, ensure_ascii=False))


def _decoded(text: str, start: int) -> tuple[Any, int]:
    """The JSON value at `start`, blanks skipped, and its end; None where there is no whole one."""
    while start < len(text) and text[start] in _BLANK:
        start += 1
    try:
        return _DECODER.raw_decode(text, start)
    except (ValueError, RecursionError):
        return None, start


def _refuse(name: str) -> NoReturn:
    raise ValueError(name)


_DECODER = json.JSONDecoder(parse_constant=_refuse)
"""Refuses NaN and Infinity, which are no JSON."""
