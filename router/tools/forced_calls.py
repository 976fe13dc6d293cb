"""Schemas of answers that have to be calls: a grammar keeps every rank to them.

One function: its arguments alone. Any of several: a list of `{"name": ..., "parameters": {...}}`,
whatever the model writes of its own accord, since JSON is what every model with tools knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from router import field_checks as check
from router.tools.tool_use import ToolChoice, ToolUse


def forced_schema(use: ToolUse) -> dict[str, Any]:
    """The JSON schema of the whole answer."""
    functions = {tool["function"]["name"]: tool["function"] for tool in use.definitions}
    if use.choice is ToolChoice.NAMED:
        return dict(functions[use.named]["parameters"])
    schemas = {f"tool{at}": function for at, function in enumerate(functions.values())}
    calls = {
        "type": "array",
        "minItems": 1,
        "items": {"anyOf": [_call(key, function) for key, function in schemas.items()]},
        "$defs": {key: _moved(each["parameters"], key) for key, each in schemas.items()},
    }
    return calls if use.parallel else {**calls, "maxItems": 1}


def tool_sampling(sampling: Mapping[str, Any], use: ToolUse | None) -> Mapping[str, Any]:
    """A request's sampling fields with what its tools need.

    Raises:
        InvalidRequestError: it wants its output in another form, too.
    """
    if use is None:
        return sampling
    if use.choice is ToolChoice.AUTO:
        if use.format is not None and use.format.keeps_specials:
            return {**sampling, "skip_special_tokens": False}
        return sampling
    if sampling.get("structured_output") is not None:
        raise check.bad_field("structured_output", "contradicts tool_choice", "Give one.")
    return {**sampling, "structured_output": {"json_schema": forced_schema(use)}}


def _call(key: str, function: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {
            "name": {"const": function["name"]},
            "parameters": {"$ref": f"#/$defs/{key}"},
        },
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }


def _moved(schema: Any, key: str) -> Any:
    """A schema whose references to itself hold where it now stands."""
    if isinstance(schema, Mapping):
        return {
            name: f"#/$defs/{key}{value[1:]}"
            if name == "$ref" and isinstance(value, str) and value.startswith("#")
            else _moved(value, key)
            for name, value in schema.items()
        }
    return [_moved(entry, key) for entry in schema] if isinstance(schema, list) else schema
