"""The ways in which models write tool calls."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class CallFormat(enum.StrEnum):
    """What a model writes when it calls."""

    HERMES = "hermes"
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`: Hermes, Qwen2.5, Qwen3."""
    LLAMA3_JSON = "llama3_json"
    """`{"name": ..., "parameters": {...}}` as the whole answer, several with `;` between them."""
    MISTRAL = "mistral"
    """`[TOOL_CALLS]` and a list of such objects, or `[TOOL_CALLS]name{...}` for each."""

    @property
    def keeps_specials(self) -> bool:
        """Whether calls begin with a control token, which must not be left out of the text."""
        return self is CallFormat.MISTRAL


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call, complete."""

    name: str
    arguments: str
    """A JSON object."""


def format_of_template(source: str) -> CallFormat | None:
    """The format that a chat template teaches; None: none of these."""
    if "[TOOL_CALLS]" in source:
        return CallFormat.MISTRAL
    if "<tool_call>" in source and "<function=" not in source and "<arg_key>" not in source:
        return CallFormat.HERMES
    if '"parameters":' in source and ("<|python_tag|>" in source or "ipython" in source):
        return CallFormat.LLAMA3_JSON
    return None
