"""Checks of tools as a request offers them, and of what it wants done with them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from cluster.base.errors import InvalidRequestError
from router import field_checks as check
from router.api import GenerationInput
from router.served_model import ServedModel
from router.tools.call_formats import CallFormat
from router.tools.tool_use import ToolChoice, ToolUse

MAX_TOOLS = 128
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_TOOL_FIELDS = frozenset({"type", "function"})
_FUNCTION_FIELDS = frozenset({"name", "description", "parameters", "strict"})


def check_tools(raw: GenerationInput, model: ServedModel) -> ToolUse | None:
    """Check what a request says of tools; None: nothing may be called.

    Raises:
        InvalidRequestError: a field is malformed, or the model cannot call tools.
    """
    parallel = raw.parallel_tool_calls
    given = () if raw.tools is None else check.items("tools", raw.tools, MAX_TOOLS)
    definitions = tuple(_definition(f"tools[{at}]", tool) for at, tool in enumerate(given))
    names = [tool["function"]["name"] for tool in definitions]
    for at, name in enumerate(names):
        if name in names[:at]:
            raise check.bad_field(f"tools[{at}].function.name", f"'{name}' is there twice")
    if parallel is not None:
        check.boolean("parallel_tool_calls", parallel)
    kind, named = _choice(raw.tool_choice, names)
    if kind is None or not definitions:
        return None
    template = model.chat_template
    if template is None or not template.takes_tools:
        raise InvalidRequestError(
            f"Model {model.plan.name!r} cannot call tools: its chat template does not take any.",
            "Ask another model, or leave tools out.",
            param="tools",
        )
    return ToolUse(
        definitions=definitions,
        choice=kind,
        named=named,
        parallel=parallel is not False,
        format=_format(definitions, model) if kind is ToolChoice.AUTO else None,
    )


def _definition(param: str, tool: object) -> Mapping[str, Any]:
    if not isinstance(tool, Mapping) or tool.get("type") != "function":
        raise check.bad_field(param, "must be an object of type 'function'")
    _only(param, tool, _TOOL_FIELDS)
    function = tool.get("function")
    param = f"{param}.function"
    if not isinstance(function, Mapping):
        raise check.bad_field(param, "must be an object with a name")
    _only(param, function, _FUNCTION_FIELDS)
    name = check.text(f"{param}.name", function.get("name"))
    if _NAME.fullmatch(name) is None:
        raise check.bad_field(f"{param}.name", f"must match {_NAME.pattern}")
    described: dict[str, Any] = {"name": name}
    if function.get("description") is not None:
        described["description"] = check.text(f"{param}.description", function["description"])
    parameters = function.get("parameters")
    if parameters is not None and not isinstance(parameters, Mapping):
        raise check.bad_field(f"{param}.parameters", "must be a JSON schema, an object")
    described["parameters"] = parameters or {"type": "object", "properties": {}}
    if function.get("strict") is not None:
        described["strict"] = check.boolean(f"{param}.strict", function["strict"])
    return {"type": "function", "function": described}


def _only(param: str, given: Mapping[str, Any], allowed: frozenset[str]) -> None:
    for name in given:
        if name not in allowed:
            known = ", ".join(sorted(allowed))
            raise check.bad_field(
                f"{param}.{check.shown(name)}", "is not known", f"There are: {known}."
            )


def _choice(choice: object, names: list[str]) -> tuple[ToolChoice | None, str]:
    """What has to be called; None: nothing may be."""
    match choice:
        case None | "auto":
            return ToolChoice.AUTO, ""
        case "none":
            return None, ""
        case "required":
            if not names:
                raise check.bad_field("tool_choice", "is 'required', and there are no tools")
            return ToolChoice.REQUIRED, ""
        case {"type": "function", "function": {"name": str(name)}}:
            if name not in names:
                raise check.bad_field(
                    "tool_choice", f"names '{check.shown(name)}', which is not among the tools"
                )
            return ToolChoice.NAMED, name
    raise check.bad_field(
        "tool_choice", "must be 'none', 'auto', 'required' or an object that names a function"
    )


def _format(definitions: tuple[Mapping[str, Any], ...], model: ServedModel) -> CallFormat:
    """How the model writes calls where nothing makes it.

    Raises:
        InvalidRequestError: that is not known, or a tool wants what only a grammar can hold.
    """
    for at, tool in enumerate(definitions):
        if tool["function"].get("strict"):
            raise check.bad_field(
                f"tools[{at}].function.strict",
                "cannot be kept while the model is free not to call",
                "Set it to false, or tool_choice to 'required' or to the function.",
            )
    found = model.call_format
    if found is None:
        raise InvalidRequestError(
            f"How model {model.plan.name!r} writes tool calls is not known.",
            "Set tool_choice to 'required' or to a function; or let the operator set "
            "tool_call_parser in the cluster file.",
            param="tools",
        )
    return found
