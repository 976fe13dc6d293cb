"""Bodies of /v1/completions and /v1/chat/completions -> front-neutral generation inputs.

Only wire forms are decided here (what kind of prompt, stream or not, names); every check of a
value is the shared validator's. One body makes one input per prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.base.front_plan import LimitsPlan
from router import field_checks as check
from router.api import GenerationInput, TextOrIds
from router.http.chat_messages import chat_turns
from router.http.response_format import structured_output
from router.http.wire_fields import (
    CHAT_FIELDS,
    COMPLETION_FIELDS,
    SAMPLING_FIELDS,
    check_fields,
    unknown_field,
)

MAX_USER_BYTES = 256
_MAX_PROMPT_ID = 60
_STREAM_OPTIONS = frozenset({"include_usage", "include_obfuscation"})


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationJob:
    """What a generation body asks for."""

    inputs: tuple[GenerationInput, ...]
    choices_per_input: int
    """Meaningful once the handler has accepted the inputs."""
    stream: bool
    include_usage: bool
    wants_logprobs: bool
    wants_prompt_logprobs: bool
    echo: bool = False


def completion_job(
    body: Mapping[str, Any], limits: LimitsPlan, request_id: str, peer: str
) -> GenerationJob:
    """Read a completions body.

    Raises:
        InvalidRequestError: a field is unknown or has the wrong form.
    """
    check_fields(body, COMPLETION_FIELDS)
    sampling = _sampling(body)
    sampling["logprobs"] = body.get("logprobs")
    echo = _flag(body, "echo")
    _check_best_of(body)
    wants_prompt_logprobs = body.get("prompt_logprobs") is not None
    if echo and sampling["logprobs"] is not None and not wants_prompt_logprobs:
        sampling["prompt_logprobs"] = sampling["logprobs"]
    prompts = _prompts(body.get("prompt"), "prompt", limits.max_prompts_per_request)
    inputs = tuple(
        GenerationInput(
            text=prompt.text,
            token_ids=prompt.token_ids,
            sampling=sampling,
            echo=echo,
            request_id=_prompt_request_id(request_id, at, len(prompts)),
            **_common(body, peer),
        )
        for at, prompt in enumerate(prompts)
    )
    return _job(body, inputs, sampling, wants_prompt_logprobs, echo)


def chat_job(body: Mapping[str, Any], request_id: str, peer: str) -> GenerationJob:
    """Read a chat completions body.

    Raises:
        InvalidRequestError: a field is unknown or has the wrong form.
    """
    check_fields(body, CHAT_FIELDS)
    sampling = _sampling(body)
    sampling["max_tokens"] = _chat_max_tokens(body)
    sampling["logprobs"] = _chat_logprobs(body)
    request = GenerationInput(
        messages=chat_turns(body.get("messages")),
        tools=body.get("tools"),
        tool_choice=body.get("tool_choice"),
        parallel_tool_calls=body.get("parallel_tool_calls"),
        sampling=sampling,
        request_id=request_id,
        **_common(body, peer),
    )
    wants_prompt_logprobs = body.get("prompt_logprobs") is not None
    return _job(body, (request,), sampling, wants_prompt_logprobs, echo=False)


def text_or_ids(value: object, param: str, limit: int) -> tuple[TextOrIds, ...]:
    """OpenAI's four forms of an input: text, ids, list of texts, list of ids."""
    return _prompts(value, param, limit)


def check_user(body: Mapping[str, Any]) -> None:
    """`user` is accepted for OpenAI's sake and means nothing here."""
    if body.get("user") is not None:
        check.text("user", body["user"], max_bytes=MAX_USER_BYTES)


def _job(
    body: Mapping[str, Any],
    inputs: tuple[GenerationInput, ...],
    sampling: Mapping[str, Any],
    wants_prompt_logprobs: bool,
    echo: bool,
) -> GenerationJob:
    stream = _flag(body, "stream")
    include_usage = _include_usage(body, stream)
    if stream and wants_prompt_logprobs:
        raise check.bad_field("prompt_logprobs", "is not available with stream")
    n = sampling.get("n")
    return GenerationJob(
        inputs=inputs,
        choices_per_input=n if isinstance(n, int) else 1,
        stream=stream,
        include_usage=include_usage,
        wants_logprobs=sampling.get("logprobs") is not None,
        wants_prompt_logprobs=wants_prompt_logprobs,
        echo=echo,
    )


def _sampling(body: Mapping[str, Any]) -> dict[str, Any]:
    sampling = {inner: body.get(wire) for wire, inner in SAMPLING_FIELDS.items()}
    sampling["structured_output"] = structured_output(body)
    # OpenAI-compatible servers take -1 for "off" too.
    if sampling["top_k"] == -1 and type(sampling["top_k"]) is int:
        sampling["top_k"] = 0
    return sampling


def _common(body: Mapping[str, Any], peer: str) -> dict[str, Any]:
    check_user(body)
    given = {"priority": body.get("priority"), "timeout_s": body.get("timeout")}
    present = {name: value for name, value in given.items() if value is not None}
    return {"model": body.get("model"), "peer": peer, **present}


def _flag(body: Mapping[str, Any], name: str, prefix: str = "") -> bool:
    value = body.get(name)
    return False if value is None else check.boolean(prefix + name, value)


def _include_usage(body: Mapping[str, Any], stream: bool) -> bool:
    options = body.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict):
        raise check.bad_field("stream_options", "must be an object")
    if not stream:
        raise check.bad_field("stream_options", "is only allowed with stream")
    for name in options:
        if name not in _STREAM_OPTIONS:
            raise unknown_field(name, _STREAM_OPTIONS, "stream_options.")
    if options.get("include_obfuscation"):
        raise check.bad_field("stream_options.include_obfuscation", "is not supported")
    return _flag(options, "include_usage", "stream_options.")


def _check_best_of(body: Mapping[str, Any]) -> None:
    best_of = body.get("best_of")
    n = 1 if body.get("n") is None else body.get("n")
    if best_of is not None and (type(best_of) is not int or best_of != n):
        raise check.bad_field("best_of", "is only supported when it equals n")


def _chat_max_tokens(body: Mapping[str, Any]) -> Any:
    old, new = body.get("max_tokens"), body.get("max_completion_tokens")
    if old is not None and new is not None and old != new:
        raise check.bad_field("max_completion_tokens", "contradicts max_tokens", "Give one.")
    return old if new is None else new


def _chat_logprobs(body: Mapping[str, Any]) -> Any:
    top = body.get("top_logprobs")
    if not _flag(body, "logprobs"):
        if top is not None:
            raise check.bad_field("top_logprobs", "needs logprobs: true")
        return None
    return 0 if top is None else top


def _prompts(value: object, param: str, limit: int) -> tuple[TextOrIds, ...]:
    if isinstance(value, str):
        return (TextOrIds(text=value),)
    if isinstance(value, list) and value:
        kinds = set(map(type, value))
        if kinds == {int}:
            return (TextOrIds(token_ids=value),)
        if kinds == {str}:
            return tuple(TextOrIds(text=text) for text in check.items(param, value, limit))
        if kinds == {list}:
            return tuple(TextOrIds(token_ids=ids) for ids in check.items(param, value, limit))
    raise check.bad_field(param, "must be a string, a list of token ids, or a list of either")


def _prompt_request_id(request_id: str, at: int, count: int) -> str:
    return request_id if count == 1 else f"{request_id[:_MAX_PROMPT_ID]}-{at}"
