"""Clients of a Penstock cluster over gRPC: `PenstockClient` (blocking) and `AsyncPenstockClient`.

    with PenstockClient("localhost:8101") as client:
        for piece in client.generate("tiny", "Once upon a time", max_tokens=64):
            print(piece.text, end="")

Failures are the cluster's own `PenstockError` subclasses with the cause, remedy and field the
gateway named. Nothing is retried here: `OverloadedError.retry_after_s` says when to try again.
`deadline_s` bounds a whole call; when it passes, the engine stops working on it. Where the cluster
asks for keys or speaks TLS: `PenstockClient(target, api_key=..., credentials=tls_credentials())`.
"""

from __future__ import annotations

from router.async_client import AsyncPenstockClient, AsyncTokenStream
from router.client_codec import Completion, RequestOptions
from router.client_transport import tls_credentials
from router.sync_client import PenstockClient, TokenStream

__all__ = [
    "AsyncPenstockClient",
    "AsyncTokenStream",
    "Completion",
    "PenstockClient",
    "RequestOptions",
    "TokenStream",
    "tls_credentials",
]
