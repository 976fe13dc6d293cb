"""JSON as this front prints it: compact, UTF-8, safe to split into lines.

`json_bytes` never fails on text: a lone surrogate becomes "?". U+0085, U+2028 and U+2029 are
escaped, because clients that split an event stream with a Unicode-aware splitlines would cut an
event in half there.
"""

from __future__ import annotations

import json
import re
from typing import Any

_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)
_LINE_BREAKS = re.compile("[\u0085\u2028\u2029]")


def json_bytes(value: Any) -> bytes:
    """`value` as UTF-8 JSON."""
    text = _ENCODER.encode(value)
    if text.isascii():
        return text.encode("ascii")
    return _LINE_BREAKS.sub(_escape, text).encode("utf-8", "replace")


def _escape(found: re.Match[str]) -> str:
    return f"\\u{ord(found.group()):04x}"
