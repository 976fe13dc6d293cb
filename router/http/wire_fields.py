"""Which fields the OpenAI bodies may have, and what each is called behind the front.

A field that is not listed is refused with the nearest valid name; one that is known but not
offered is refused too, unless it is null or has its neutral value. Values are not looked at here:
the shared validator does that.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from cluster.base.errors import InvalidRequestError, UserError
from router import field_checks as check

SAMPLING_FIELDS: Mapping[str, str] = {
    name: name
    for name in (
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "no_repeat_ngram_size",
        "logit_bias",
        "min_tokens",
        "max_tokens",
        "stop",
        "stop_token_ids",
        "ignore_eos",
        "seed",
        "n",
        "prompt_logprobs",
        "skip_special_tokens",
    )
} | {"include_stop_str_in_output": "include_stop_in_output"}
"""Name on the wire -> name in `GenerationInput.sampling`."""

_GENERATION = (
    *SAMPLING_FIELDS,
    *("model", "stream", "stream_options", "user", "priority", "timeout"),
    *("response_format", "structured_outputs"),
)
COMPLETION_FIELDS = frozenset({*_GENERATION, "prompt", "logprobs", "echo", "best_of"})
CHAT_FIELDS = frozenset(
    {*_GENERATION, "messages", "logprobs", "top_logprobs", "max_completion_tokens"}
    | {"tools", "tool_choice", "parallel_tool_calls"}
)
EMBEDDING_FIELDS = frozenset(
    {"model", "input", "encoding_format", "dimensions", "user", "pooling", "normalize", "timeout"}
)
TOKENIZE_FIELDS = frozenset(
    {"model", "prompt", "messages", "add_special_tokens", "return_token_strs"}
)
DETOKENIZE_FIELDS = frozenset({"model", "tokens", "skip_special_tokens"})

NOT_OFFERED: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "chat_template": (),
    "chat_template_kwargs": (),
    "function_call": ("none",),
    "functions": ([],),
    "guided_json": (),
    "metadata": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "prompt_cache_key": (),
    "prompt_embeds": (),
    "reasoning_effort": (),
    "safety_identifier": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "use_beam_search": (False,),
    "verbosity": (),
    "web_search_options": (),
}
"""Fields of other servers, with the values that ask for nothing."""

_NAMES_ON_THE_WIRE: Mapping[str, str] = {
    "include_stop_in_output": "include_stop_str_in_output",
    "timeout_s": "timeout",
}


def check_fields(body: Mapping[str, Any], allowed: frozenset[str]) -> None:
    """Refuse fields that are unknown or not offered.

    Raises:
        InvalidRequestError: naming the field and, for an unknown one, the nearest valid one.
    """
    for name, value in body.items():
        if name in allowed:
            continue
        if name not in NOT_OFFERED:
            raise unknown_field(name, allowed)
        if value is not None and value not in NOT_OFFERED[name]:
            raise InvalidRequestError(
                f"{name} is not supported by this server.", "Leave it out.", param=name
            )


def unknown_field(name: str, allowed: frozenset[str], prefix: str = "") -> InvalidRequestError:
    """The error for a field nobody knows."""
    near = difflib.get_close_matches(name[:64], sorted(allowed), n=1)
    hint = f"Did you mean '{near[0]}'?" if near else "Leave it out."
    param = prefix + check.shown(name)
    return InvalidRequestError(f"Unknown field '{param}'.", hint, param=param)


def chat_names(body: Mapping[str, Any]) -> dict[str, str]:
    """How errors name a chat body's own fields: as the client wrote them."""
    newer = body.get("max_completion_tokens") is not None
    return {"logprobs": "top_logprobs"} | ({"max_tokens": "max_completion_tokens"} if newer else {})


def tool_names(body: Mapping[str, Any]) -> dict[str, str]:
    """How errors name the form of an answer that tools ask for."""
    is_asked = body.get("response_format") or body.get("structured_outputs")
    return {"structured_output": "tools"} if body.get("tools") and not is_asked else {}


@contextmanager
def names_on_the_wire(extra: Mapping[str, str] | None = None) -> Iterator[None]:
    """Let errors name fields as this front spells them."""
    names = {**_NAMES_ON_THE_WIRE, **(extra or {})}
    try:
        yield
    except UserError as error:
        inner = (error.param or "").partition("[")[0]
        wire = names.get(inner)
        if wire is None:
            raise
        raise type(error)(
            error.cause.replace(inner, wire, 1),
            error.remedy,
            param=wire + (error.param or "")[len(inner) :],
        ) from None
