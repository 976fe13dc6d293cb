"""Checks of a request's head, and the request id that follows it everywhere.

Works on the ASGI scope, so it holds behind any server. A client's X-Request-Id is echoed only when
it is harmless; ids are labels for logs and Cancel, nothing is keyed by them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.types import Scope

from cluster.base.ids import is_client_id, new_request_id
from router.http.limits import HttpLimits

_KEY = "penstock.request_id"
CERTIFICATE_KEY = "penstock.client_certificate"
"""Set in the scope by the server where the connection has shown a certificate."""


def assign_request_id(scope: Scope) -> str:
    """Take the client's id if it is well formed, else make one; later `request_id_of` has it."""
    given = header_values(scope, b"x-request-id")
    text = given[0].decode("latin-1") if len(given) == 1 else ""
    request_id = text if is_client_id(text) else new_request_id()
    scope[_KEY] = request_id
    return request_id


def request_id_of(scope: Scope) -> str:
    """The id that `assign_request_id` put into the scope."""
    request_id: str = scope.get(_KEY, "")
    return request_id


def shows_certificate(scope: Scope) -> bool:
    """Whether the client has shown a certificate on this connection."""
    return bool(scope.get(CERTIFICATE_KEY))


def header_values(scope: Scope, name: bytes) -> list[bytes]:
    """All values of a header; `name` in lower case."""
    headers: Sequence[tuple[bytes, bytes]] = scope["headers"]
    return [value for key, value in headers if key == name]


def head_fault(scope: Scope, limits: HttpLimits) -> tuple[int, str, str] | None:
    """Status, code and message for a head that is refused, else None."""
    url_bytes = len(scope.get("raw_path") or b"") + len(scope.get("query_string") or b"")
    if url_bytes > limits.max_url_bytes:
        return 414, "url_too_long", f"The URL is over {limits.max_url_bytes} bytes."
    headers: Sequence[tuple[bytes, bytes]] = scope["headers"]
    size = sum(len(name) + len(value) + 4 for name, value in headers)
    if len(headers) > limits.max_headers or size > limits.max_header_bytes:
        return 431, "headers_too_large", "The request has too many or too large headers."
    problem = _framing_problem(scope)
    return (400, "invalid_request", problem) if problem else None


def _framing_problem(scope: Scope) -> str:
    """What two servers in a row could read differently (request smuggling)."""
    hosts: list[Any] = header_values(scope, b"host")
    if len(hosts) > 1 or (not hosts and scope.get("http_version") == "1.1"):
        return "The request must have exactly one Host header."
    lengths = header_values(scope, b"content-length")
    encodings = header_values(scope, b"transfer-encoding")
    if len(lengths) > 1 or len(encodings) > 1 or (lengths and encodings):
        return "The request has contradicting Content-Length or Transfer-Encoding headers."
    return ""
