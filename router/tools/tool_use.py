"""What one request wants done with tools, checked."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from router.tools.call_formats import CallFormat


class ToolChoice(enum.Enum):
    """Whether the model has to call something."""

    AUTO = "auto"
    REQUIRED = "required"
    NAMED = "named"


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """The tools of one request."""

    definitions: tuple[Mapping[str, Any], ...]
    """As chat templates take them: OpenAI's objects."""
    choice: ToolChoice
    named: str = ""
    """The function that has to be called."""
    parallel: bool = True
    """Whether there may be several calls in one answer."""
    format: CallFormat | None = None
    """How the model writes calls of its own accord; None where a grammar makes it write them."""

    @property
    def names(self) -> frozenset[str]:
        """The functions' names."""
        return frozenset(tool["function"]["name"] for tool in self.definitions)
