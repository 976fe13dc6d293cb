"""Bodies of /v1/embeddings, /tokenize and /detokenize, and how vectors are printed.

The official clients ask for base64 (little-endian float32) unless told otherwise.
"""

from __future__ import annotations

import base64
import sys
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.base.front_plan import LimitsPlan
from router import field_checks as check
from router.api import ChatTurn, EmbedInput, EmbedOutput
from router.http.chat_messages import chat_turns
from router.http.generation_body import check_user, text_or_ids
from router.http.wire_fields import EMBEDDING_FIELDS, TOKENIZE_FIELDS, check_fields

_RENAMED = {"pooling": "pooling", "normalize": "normalize", "dimensions": "dimensions"}
_RENAMED |= {"timeout": "timeout_s"}


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingJob:
    """What an embeddings body asks for."""

    request: EmbedInput
    base64: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizeJob:
    """What a tokenize body asks for."""

    model: object
    text: object
    messages: Sequence[ChatTurn] | None
    add_special_tokens: bool
    token_strings: bool


def embedding_job(body: Mapping[str, Any], limits: LimitsPlan, request_id: str) -> EmbeddingJob:
    """Read an embeddings body.

    Raises:
        InvalidRequestError: a field is unknown or has the wrong form.
    """
    check_fields(body, EMBEDDING_FIELDS)
    check_user(body)
    encoding = body.get("encoding_format")
    if encoding not in (None, "float", "base64"):
        raise check.bad_field("encoding_format", "must be 'float' or 'base64'")
    dimensions = body.get("dimensions")
    if dimensions == 0:  # behind the front 0 means all, on this wire it is a mistake
        raise check.bad_field("dimensions", "must be at least 1")
    given = {inner: body[wire] for wire, inner in _RENAMED.items() if body.get(wire) is not None}
    request = EmbedInput(
        model=body.get("model"),
        inputs=text_or_ids(body.get("input"), "input", limits.max_prompts_per_request),
        request_id=request_id,
        **given,
    )
    return EmbeddingJob(request=request, base64=encoding == "base64")


def embedding_answer(job: EmbeddingJob, output: EmbedOutput) -> dict[str, Any]:
    """The body of an embeddings answer."""
    data = [
        {"object": "embedding", "index": at, "embedding": _vector(vector, job.base64)}
        for at, vector in enumerate(output.vectors)
    ]
    prompt_tokens = output.usage.prompt_tokens
    return {
        "object": "list",
        "data": data,
        "model": job.request.model,
        "usage": {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens},
    }


def tokenize_job(body: Mapping[str, Any]) -> TokenizeJob:
    """Read a tokenize body: a prompt or messages.

    Raises:
        InvalidRequestError: a field is unknown or has the wrong form.
    """
    check_fields(body, TOKENIZE_FIELDS)
    messages = body.get("messages")
    if (messages is None) == (body.get("prompt") is None):
        raise check.bad_field("prompt", "or messages must be given, and not both")
    add_special = body.get("add_special_tokens")
    strings = body.get("return_token_strs")
    return TokenizeJob(
        model=body.get("model"),
        text=body.get("prompt"),
        messages=None if messages is None else chat_turns(messages),
        add_special_tokens=True if add_special is None else add_special,
        token_strings=strings is not None and check.boolean("return_token_strs", strings),
    )


def _vector(values: Sequence[float], as_base64: bool) -> list[float] | str:
    if not as_base64:
        return list(values)
    floats = array("f", values)
    if sys.byteorder == "big":
        floats.byteswap()
    return base64.b64encode(floats.tobytes()).decode("ascii")
