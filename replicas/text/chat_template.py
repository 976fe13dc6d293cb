"""Conversation to prompt text with the checkpoint's own Jinja template.

The template comes from the operator's checkpoint, never from a request, and still runs bounded
(`template_sandbox`). Control-token strings inside messages are broken before rendering, so that
`Tokenizer.encode_template` can tell them from the template's own; the result is meant for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError
from jinja2.exceptions import SecurityError
from jinja2.meta import find_undeclared_variables

from cluster.base.errors import ConfigError, CorruptWeightsError, InvalidRequestError
from replicas.text.control_text import SpecialBreaker
from replicas.text.template_budget import RenderBudget
from replicas.text.template_sandbox import BoundedEnvironment
from replicas.text.tokenizer_files import TokenizerFiles, read_tokenizer_files

MAX_PROMPT_CHARS = 8 * 1024 * 1024
MAX_RENDER_S = 1.0
_OUT_OF_BOUNDS = (SecurityError, RecursionError, OverflowError, MemoryError)
_PROBE = ({"role": "user", "content": "Hello"},)


class ChatTemplate:
    """One checkpoint's chat template; build it with `from_directory`.

    Args:
        source: Jinja text.
        specials: the strings of all control tokens.
        variables: bos_token and its kin, as the template sees them.
        tool_source: another template, for conversations in which tools are offered.
        max_render_s: CPU time one render may take.

    Raises:
        ConfigError: the template does not parse, or runs out of its budget on one short message.
    """

    def __init__(
        self,
        source: str,
        specials: Sequence[str],
        variables: Mapping[str, str],
        *,
        tool_source: str | None = None,
        max_render_s: float = MAX_RENDER_S,
    ) -> None:
        self._environment = BoundedEnvironment()
        self._variables = dict(variables)
        self._max_render_s = max_render_s
        self._breaker = SpecialBreaker(specials)
        self.tool_source = source if tool_source is None else tool_source
        """The template that is used where tools are offered."""
        self._template = self._compiled(source)
        self._tool_template = self._template if tool_source is None else self._compiled(tool_source)
        undeclared = find_undeclared_variables(self._environment.parse(self.tool_source))
        self.takes_tools = "tools" in undeclared
        """Whether it tells the model of tools."""
        self._probe()

    def _compiled(self, source: str) -> Template:
        try:
            return self._environment.from_string(source)
        except (TemplateSyntaxError, SecurityError) as error:
            raise ConfigError(
                f"The chat template is not valid: {error}.", "Mend the checkpoint's chat_template."
            ) from error

    @classmethod
    def from_directory(cls, path: str | Path) -> ChatTemplate | None:
        """Load chat_template.jinja, else tokenizer_config.json's chat_template.

        Returns:
            None when the checkpoint has no template: it does not serve chat.

        Raises:
            ConfigError, CorruptWeightsError: the template or a file is broken.
        """
        files = read_tokenizer_files(path)
        source, tool_source = _template_sources(files)
        if source is None:
            return None
        return cls(source, files.special_texts(), files.named, tool_source=tool_source)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """The prompt of a conversation, for `Tokenizer.encode_template`.

        Args:
            messages: texts, and JSON in them such as calls of tools.
            tools: what the model may call.

        Raises:
            InvalidRequestError: the template refuses the messages, or they make too large a prompt.
        """
        try:
            return self._render(messages, add_generation_prompt, tools)
        except InvalidRequestError:
            raise
        except TemplateError as error:
            raise InvalidRequestError(
                f"The model's chat template refused the messages: {error}.", param="messages"
            ) from error
        except Exception as error:  # foreign code: a KeyError in it is the messages' fault
            raise InvalidRequestError(
                f"The model's chat template cannot render these messages ({type(error).__name__}).",
                param="messages",
            ) from error

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        values: dict[str, Any] = {
            **self._variables,
            "messages": [self._safe(message) for message in messages],
            "tools": [self._safe(tool) for tool in tools] or None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        budget = self._environment.budget
        token = budget.set(RenderBudget(MAX_PROMPT_CHARS, self._max_render_s))
        try:
            return (self._tool_template if tools else self._template).render(values)
        finally:
            budget.reset(token)

    def _safe(self, value: Any) -> Any:
        """JSON in which no text holds a control token."""
        if isinstance(value, str):
            return self._breaker.break_specials(value)
        if isinstance(value, Mapping):
            return {self._safe(key): self._safe(entry) for key, entry in value.items()}
        return [self._safe(entry) for entry in value] if isinstance(value, list | tuple) else value

    def _probe(self) -> None:
        try:
            self._render(_PROBE, add_generation_prompt=True)
        except _OUT_OF_BOUNDS as error:
            raise ConfigError(
                f"The chat template is refused: {error}.", "Mend the checkpoint's chat_template."
            ) from error
        except Exception:
            # It may want other messages than the probe's; a request will be told so.
            return


def _template_sources(files: TokenizerFiles) -> tuple[str | None, str | None]:
    """The template, and the one for tools where there are two."""
    path = files.directory / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8"), None
        except (OSError, UnicodeDecodeError) as error:
            raise CorruptWeightsError(f"{path} cannot be read: {error}.") from error
    value, tool_use = files.config.get("chat_template"), None
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if entry}
        value, tool_use = named.get("default"), named.get("tool_use")
    if isinstance(value, str | None) and isinstance(tool_use, str | None):
        return value, tool_use
    raise CorruptWeightsError(f"{files.directory}: chat_template must be text or named templates.")
