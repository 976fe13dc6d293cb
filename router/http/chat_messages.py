"""OpenAI chat messages -> chat turns: content as text or as a list of text parts.

Images, audio and files are refused by name; nothing a message points to is ever fetched. Roles and
texts are checked by the shared validator.
"""

from __future__ import annotations

import json
from typing import Any

from cluster.base.errors import InvalidRequestError
from router import field_checks as check
from router.api import ChatTurn
from router.http.wire_fields import unknown_field

_FIELDS = frozenset({"role", "content", "name", "tool_calls", "tool_call_id"})
_NOT_OFFERED = frozenset({"annotations", "audio", "function_call", "reasoning_content", "refusal"})
_PART_FIELDS = frozenset({"type", "text"})
MAX_MESSAGES = 1_024
MAX_CALLS = 128


def chat_turns(value: object) -> tuple[ChatTurn, ...]:
    """Read the messages field.

    Raises:
        InvalidRequestError: it is not a list of messages in the accepted form.
    """
    entries = check.items("messages", value, MAX_MESSAGES)
    return tuple(_turn(entry, f"messages[{at}]") for at, entry in enumerate(entries))


def _turn(entry: object, param: str) -> ChatTurn:
    if not isinstance(entry, dict):
        raise check.bad_field(param, "must be an object with role and content")
    for name, value in entry.items():
        if name in _FIELDS:
            continue
        if name not in _NOT_OFFERED:
            raise unknown_field(name, _FIELDS, f"{param}.")
        if value not in (None, []):
            raise check.bad_field(f"{param}.{name}", "is not supported by this server")
    name, call_id = entry.get("name"), entry.get("tool_call_id")
    calls = _tool_calls(entry.get("tool_calls"), f"{param}.tool_calls")
    content = entry.get("content")
    return ChatTurn(
        role=entry.get("role"),  # type: ignore[arg-type]  # checked by the validator
        content="" if content is None and calls else _content(content, f"{param}.content"),
        name="" if name is None else name,
        tool_calls=calls,
        tool_call_id="" if call_id is None else call_id,
    )


def _tool_calls(value: object, param: str) -> tuple[dict[str, Any], ...]:
    """Calls of an assistant's message, with their arguments as templates want them: an object."""
    if value is None:
        return ()
    return tuple(
        _tool_call(entry, f"{param}[{at}]")
        for at, entry in enumerate(check.items(param, value, MAX_CALLS))
    )


def _tool_call(value: object, param: str) -> dict[str, Any]:
    function = value.get("function") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(function, dict):
        raise check.bad_field(param, "must be an object with id, type and function")
    if value.get("type", "function") != "function":
        raise check.bad_field(f"{param}.type", "must be 'function'")
    try:
        arguments = json.loads(check.text(f"{param}.function.arguments", function.get("arguments")))
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise check.bad_field(f"{param}.function.arguments", "must be the JSON text of an object")
    return {
        "id": check.text(f"{param}.id", value.get("id")),
        "type": "function",
        "function": {
            "name": check.text(f"{param}.function.name", function.get("name")),
            "arguments": arguments,
        },
    }


def _content(value: object, param: str) -> Any:
    if not isinstance(value, list):
        return value
    if not value:
        raise check.bad_field(param, "must not be empty")
    return "".join(_part(part, f"{param}[{at}]") for at, part in enumerate(value))


def _part(part: object, param: str) -> str:
    if not isinstance(part, dict):
        raise check.bad_field(param, "must be an object with type and text")
    kind = part.get("type")
    if kind != "text":
        raise InvalidRequestError(
            f"{param}.type '{check.shown(kind)}' is not supported.",
            "Only text parts are.",
            param=f"{param}.type",
        )
    for name in part:
        if name not in _PART_FIELDS:
            raise unknown_field(name, _PART_FIELDS, f"{param}.")
    return check.text(f"{param}.text", part.get("text"))
