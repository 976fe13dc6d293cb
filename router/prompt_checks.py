"""Checks of what a request is about: texts, token ids and conversations.

Everything that needs no tokenizer; the part of the validator (`validate.py`) that looks at prompts.
"""

from __future__ import annotations

from collections.abc import Sequence

from cluster.base.errors import ContextTooLongError, InvalidRequestError, PenstockError
from router import field_checks as check
from router.api import ChatTurn, GenerationInput, TextOrIds
from router.checked_requests import Prompt
from router.served_model import ServedModel
from router.tools.tool_use import ToolUse

MAX_MESSAGES = 1024
MAX_NAME_BYTES = 256

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
"""Accepted roles and what templates know them as ("developer" is OpenAI's newer "system")."""


def generation_prompt(
    raw: GenerationInput, model: ServedModel, tools: ToolUse | None = None
) -> Prompt:
    """The one prompt of a generation: a text, ids or a conversation.

    Raises:
        InvalidRequestError: it is missing, given twice or malformed.
    """
    given = [raw.text is not None, raw.token_ids is not None, raw.messages is not None]
    if sum(given) != 1:
        raise check.bad_field("prompt", "must be given exactly once, as text or token ids")
    if raw.messages is not None:
        turns = messages(raw.messages)
        _check_template(turns, model)
        return Prompt(messages=turns, tools=tools.definitions if tools is not None else ())
    return text_or_ids("prompt", TextOrIds(text=raw.text, token_ids=raw.token_ids), model)


def messages(raw: object) -> tuple[ChatTurn, ...]:
    """A conversation.

    Raises:
        InvalidRequestError: it is empty, too long or malformed.
    """
    entries = check.items("messages", raw, MAX_MESSAGES)
    if not entries:
        raise check.bad_field("messages", "must not be empty")
    return tuple(_turn(f"messages[{at}]", entry) for at, entry in enumerate(entries))


def prompts(param: str, raw: object, model: ServedModel, limit: int) -> tuple[Prompt, ...]:
    """One to `limit` texts or lists of ids.

    Raises:
        InvalidRequestError: there is none, there are more, or one is malformed.
    """
    entries = check.items(param, raw, limit)
    if not entries:
        raise check.bad_field(param, "must not be empty")
    return tuple(text_or_ids(f"{param}[{at}]", entry, model) for at, entry in enumerate(entries))


def text_or_ids(param: str, raw: object, model: ServedModel) -> Prompt:
    """One text or one list of ids, not empty.

    Raises:
        InvalidRequestError: it is neither, or both.
        ContextTooLongError: there are more ids than the context holds.
    """
    if not isinstance(raw, TextOrIds) or (raw.text is None) == (raw.token_ids is None):
        raise check.bad_field(param, "must be given exactly once, as text or token ids")
    if raw.text is not None:
        text = check.text(param, raw.text)
        if not text:
            raise check.bad_field(param, "must not be empty")
        return Prompt(text=text)
    ids = token_ids(param, raw.token_ids, model)
    if not ids:
        raise check.bad_field(param, "must not be empty")
    return Prompt(token_ids=ids)


def token_ids(
    param: str, raw: object, model: ServedModel, limit: int | None = None
) -> tuple[int, ...]:
    """A list of ids of the model; by default as many as the context holds.

    Raises:
        InvalidRequestError: it is no list of ids, or has more than `limit`.
        ContextTooLongError: it has more than the context holds.
    """
    if limit is None:
        model = model.longest
        limit = model.max_tokens_per_choice
        if isinstance(raw, Sequence) and not isinstance(raw, str) and len(raw) > limit:
            raise too_long(model, len(raw), 0, param)
    return check.token_ids(param, raw, vocab_size=model.plan.vocab_size, limit=limit)


def too_long(
    model: ServedModel, num_prompt_tokens: int | str, max_tokens: int, param: str
) -> PenstockError:
    """The error for a prompt (and output) that does not fit, with the numbers."""
    limit = model.max_tokens_per_choice
    asked = f" plus max_tokens {max_tokens}" if max_tokens else ""
    return ContextTooLongError(
        f"The prompt's {num_prompt_tokens} tokens{asked} exceed the {limit} tokens that "
        f"{model.plan.name!r} holds per request.",
        "Shorten the prompt or lower max_tokens.",
        param=param,
    )


def _turn(param: str, raw: object) -> ChatTurn:
    if not isinstance(raw, ChatTurn):
        raise check.bad_field(param, "must be a message with role and content")
    role = _ROLES.get(raw.role) if isinstance(raw.role, str) else None
    if role is None:
        raise InvalidRequestError(
            f"{param}.role must be one of {', '.join(_ROLES)}, not '{check.shown(raw.role)}'.",
            param=f"{param}.role",
        )
    if raw.tool_calls and role != "assistant":
        raise check.bad_field(f"{param}.tool_calls", "is only for the assistant's messages")
    if bool(raw.tool_call_id) != (role == "tool"):
        problem = "is missing" if role == "tool" else "is only for messages of a tool"
        raise check.bad_field(f"{param}.tool_call_id", problem)
    return ChatTurn(
        role=role,
        content=check.text(f"{param}.content", raw.content),
        name=check.text(f"{param}.name", raw.name, max_bytes=MAX_NAME_BYTES),
        tool_calls=raw.tool_calls,
        tool_call_id=check.text(
            f"{param}.tool_call_id", raw.tool_call_id, max_bytes=MAX_NAME_BYTES
        ),
    )


def _check_template(turns: Sequence[ChatTurn], model: ServedModel) -> None:
    """Refuse calls and answers of tools that the model's template would leave out."""
    template = model.chat_template
    if template is None or template.takes_tools:
        return
    for at, turn in enumerate(turns):
        if turn.tool_calls or turn.role == "tool":
            raise InvalidRequestError(
                f"messages[{at}] is about a tool call, and the chat template of model "
                f"{model.plan.name!r} knows none.",
                "Ask another model, or say it in plain messages.",
                param=f"messages[{at}]",
            )
