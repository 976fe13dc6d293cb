"""What the validator hands on: requests whose fields need no further check."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from replicas.api import Pooling
from router.api import ChatTurn
from router.sampling_fields import SamplingFields
from router.served_model import ServedModel
from router.tools.tool_use import ToolUse


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A checked prompt: exactly one of the three is set."""

    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    messages: tuple[ChatTurn, ...] | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    """Offered with `messages`."""

    @property
    def tool_chars(self) -> int:
        """About how much text the tools make."""
        return sum(len(json.dumps(tool)) for tool in self.tools)

    def estimated_tokens(self, model: ServedModel) -> int:
        """A cheap guess for admission, before tokenising (about 4 characters a token).

        Never more than the model can hold: what is longer will be refused.
        """
        if self.token_ids is not None:
            return len(self.token_ids)
        if self.text is not None:
            guess = len(self.text) // 4 + 1
        else:
            guess = sum(len(turn.content) // 4 + 4 for turn in self.messages or ())
            guess += self.tool_chars // 4
        return min(guess, model.longest.max_tokens_per_choice)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedGeneration:
    """A generation with every field checked but the prompt's length."""

    request_id: str
    model: ServedModel
    prompt: Prompt
    sampling: SamplingFields
    tools: ToolUse | None
    priority: int
    echo: bool
    timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedEmbed:
    """An embedding request with every field checked but the inputs' lengths."""

    request_id: str
    model: ServedModel
    inputs: tuple[Prompt, ...]
    pooling: Pooling
    normalize: bool
    dimensions: int
    timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedScore:
    """A scoring request with every field checked but the inputs' lengths."""

    request_id: str
    model: ServedModel
    prompt: Prompt
    continuations: tuple[Prompt, ...]
    timeout_s: float
