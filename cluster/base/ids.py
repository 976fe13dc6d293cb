"""Names that must never collide: requests, and the lives ("epochs") of leaders and gateways."""

from __future__ import annotations

import re
import secrets

_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


def new_request_id(prefix: str = "req") -> str:
    """A fresh public request id, `<prefix>-<32 hex digits>`: 128 random bits, safe in a header."""
    return f"{prefix}-{secrets.token_hex(16)}"


def new_epoch(role: str = "epoch") -> str:
    """A fresh name for one life of a process; a restarted process has another one."""
    return f"{role}-{secrets.token_hex(8)}"


def is_client_id(text: str) -> bool:
    """Whether a client's own request id may be echoed and logged as it is."""
    return _ID.fullmatch(text) is not None
