"""What one HTTP connection and request may cost before the shared validator sees anything.

These are transport limits; limits of the request's meaning (n, prompts, logprobs) are in the
plan. Defaults are far above what a real client sends.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpLimits:
    """Sizes in bytes, times in seconds."""

    max_url_bytes: int = 8 * 1024
    max_header_bytes: int = 16 * 1024
    max_headers: int = 100
    max_body_bytes: int = 4 * 1024 * 1024
    max_body_chunks: int = 16_384
    max_json_depth: int = 64
    max_json_keys: int = 4_096
    max_json_containers: int = 16_384
    head_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    keep_alive_s: int = 75
    max_connections: int = 1_024
    """Over it a new connection is answered 503 and closed."""
