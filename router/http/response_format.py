"""OpenAI's `response_format` and vLLM's `structured_outputs`, as the handler takes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from router import field_checks as check
from router.http.wire_fields import unknown_field

_FORMATS = ("text", "json_object", "json_schema")
_SCHEMA_FIELDS = frozenset({"name", "schema", "strict", "description"})
_KINDS: Mapping[str, str] = {
    "json": "json_schema",
    "regex": "regex",
    "choice": "choices",
    "grammar": "lark",
}
"""Name on the wire -> name behind the front."""


def structured_output(body: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the output has to look like; None: anything.

    Raises:
        InvalidRequestError: a field has the wrong form, or both are given.
    """
    given, bound = body.get("response_format"), body.get("structured_outputs")
    if bound is None:
        return None if given is None else _response_format(given)
    if given is not None:
        raise check.bad_field("structured_outputs", "contradicts response_format", "Give one.")
    if not isinstance(bound, dict):
        raise check.bad_field("structured_outputs", "must be an object")
    for name in bound:
        if name not in _KINDS:
            raise unknown_field(name, frozenset(_KINDS), "structured_outputs.")
    return {_KINDS[name]: value for name, value in bound.items() if value is not None}


def output_names(body: Mapping[str, Any]) -> dict[str, str]:
    """How errors name the field: as the client wrote it."""
    used = "response_format" if body.get("structured_outputs") is None else "structured_outputs"
    return {"structured_output": used}


def _response_format(value: object) -> dict[str, Any] | None:
    if not isinstance(value, dict):
        raise check.bad_field("response_format", "must be an object with a type")
    kind = value.get("type")
    if kind not in _FORMATS:
        raise check.bad_field("response_format.type", f"must be one of {', '.join(_FORMATS)}")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"json_schema": {"type": "object"}}
    return {"json_schema": _schema(value.get("json_schema"))}


def _schema(value: object) -> Any:
    param = "response_format.json_schema"
    if not isinstance(value, dict):
        raise check.bad_field(param, "must be an object with name and schema")
    for name in value:
        if name not in _SCHEMA_FIELDS:
            raise unknown_field(name, _SCHEMA_FIELDS, f"{param}.")
    if not isinstance(value.get("schema"), dict):
        raise check.bad_field(f"{param}.schema", "must be an object")
    return value["schema"]
