"""Request body -> JSON object, within caps on size, pieces, time, depth and keys.

Stricter than `json.loads`: UTF-8 only, no NaN or Infinity, no number that is infinite as a float,
no duplicate keys (two readers could take different ones). Depth is checked before parsing, so
that no input can exhaust the interpreter's stack here or later.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from typing import Any, NoReturn

from starlette.requests import Request
from starlette.types import Receive, Scope

from cluster.base.errors import InvalidRequestError
from router.http.errors import ClientGoneError, HttpFaultError
from router.http.limits import HttpLimits
from router.http.request_head import header_values

_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_BRACKET = re.compile(rb"[\[\]{}]")
_DISCARD_S = 2.0


async def read_json_object(request: Request, limits: HttpLimits) -> dict[str, Any]:
    """The body of a POST as a JSON object.

    Raises:
        HttpFaultError: wrong media type, too large or too slow.
        ClientGoneError: the client left before the body was complete.
        InvalidRequestError: it is not a JSON object within the caps.
    """
    _check_media_type(request.scope)
    body = await _read_body(request, limits)
    return parse_json_object(body, limits)


def parse_json_object(body: bytes, limits: HttpLimits) -> dict[str, Any]:
    """Parse strictly.

    Raises:
        InvalidRequestError: it is not a JSON object within the caps.
    """
    _check_nesting(body, limits)
    num_keys = 0

    def pairs_to_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal num_keys
        num_keys += len(pairs)
        if num_keys > limits.max_json_keys:
            raise _bad_body(f"has more than {limits.max_json_keys} keys")
        result = dict(pairs)
        if len(result) != len(pairs):
            raise _bad_body("repeats a key in one object")
        return result

    try:
        value = json.loads(
            body.decode("utf-8"),
            object_pairs_hook=pairs_to_dict,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
    except UnicodeDecodeError:
        raise _bad_body("is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        place = f" (at character {error.pos})" if isinstance(error, json.JSONDecodeError) else ""
        raise _bad_body(f"is not valid JSON{place}") from None
    if not isinstance(value, dict):
        raise _bad_body(f"must be a JSON object, not {type(value).__name__}")
    return value


def _check_media_type(scope: Scope) -> None:
    types = header_values(scope, b"content-type")
    media_type = types[0].split(b";")[0].strip().lower() if len(types) == 1 else b""
    if media_type != b"application/json":
        raise HttpFaultError(
            415, "unsupported_media_type", "Content-Type must be application/json."
        )
    if any(value.strip().lower() != b"identity" for value in _content_encodings(scope)):
        raise HttpFaultError(
            415, "unsupported_media_type", "Compressed bodies are not accepted; send it as it is."
        )


def _content_encodings(scope: Scope) -> list[bytes]:
    return header_values(scope, b"content-encoding")


async def _read_body(request: Request, limits: HttpLimits) -> bytes:
    declared = header_values(request.scope, b"content-length")
    if declared and declared[0].isdigit() and int(declared[0][:20]) > limits.max_body_bytes:
        await _discard(request.receive)
        raise _too_large(limits)
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            return await _collect(request.receive, limits)
    except TimeoutError:
        raise HttpFaultError(
            408, "request_timeout", "The body came too slowly.", close=True
        ) from None


async def _collect(receive: Receive, limits: HttpLimits) -> bytes:
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        chunk = message.get("body", b"")
        size += len(chunk)
        chunks.append(chunk)
        if size > limits.max_body_bytes:
            await _discard(receive)
            raise _too_large(limits)
        if len(chunks) > limits.max_body_chunks:
            raise HttpFaultError(
                400, "invalid_request", "The body has too many chunks.", close=True
            )
        if not message.get("more_body", False):
            return b"".join(chunks)


async def _discard(receive: Receive) -> None:
    """Let the client finish sending for a moment; it reads the answer only then."""
    try:
        async with asyncio.timeout(_DISCARD_S):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return
    except TimeoutError:
        return


def _too_large(limits: HttpLimits) -> HttpFaultError:
    text = f"The body is over {limits.max_body_bytes} bytes."
    return HttpFaultError(413, "body_too_large", text, close=True)


def _check_nesting(body: bytes, limits: HttpLimits) -> None:
    if body.count(b"[") + body.count(b"{") <= limits.max_json_depth:
        return
    depth = containers = 0
    for found in _BRACKET.finditer(_STRING.sub(b"", body)):
        if found.group() in b"[{":
            depth += 1
            containers += 1
        else:
            depth -= 1
        if depth > limits.max_json_depth or containers > limits.max_json_containers:
            raise _bad_body("is nested too deeply or has too many lists and objects")


def _refuse_constant(name: str) -> NoReturn:
    raise _bad_body(f"holds {name}, which is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _bad_body("holds a number that is too large")
    return value


def _bad_body(problem: str) -> InvalidRequestError:
    return InvalidRequestError(f"The body {problem}.")
