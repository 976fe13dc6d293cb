"""Strict checks of single request fields: a bool is no number, NaN is nothing, text is Unicode.

Every function returns the value in the type it promises or raises `InvalidRequestError` naming
the field. Values come from JSON or protobuf, so only JSON's Python types can occur.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from cluster.base.errors import InvalidRequestError

_SHOWN = 64
"""Characters of a client's own value that an error message repeats."""


def shown(value: object) -> str:
    """A client's value for an error message: short, and without control characters."""
    text = value if isinstance(value, str) else repr(value)[: 4 * _SHOWN]
    cut = text[:_SHOWN].encode("unicode_escape").decode("ascii")
    return cut + ("..." if len(text) > _SHOWN else "")


def bad_field(param: str, problem: str, remedy: str = "") -> InvalidRequestError:
    """The error for one field."""
    return InvalidRequestError(f"{param} {problem}.", remedy, param=param)


def integer(param: str, value: object, low: int, high: int) -> int:
    """An int in [low, high]; bool and float are refused, integral ones too."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise bad_field(param, f"must be an integer, not {type(value).__name__}")
    if not low <= value <= high:
        raise bad_field(param, f"must be between {low} and {high}")
    return value


def number(
    param: str, value: object, low: float, high: float, *, low_excluded: bool = False
) -> float:
    """A finite number in [low, high], or (low, high]."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise bad_field(param, f"must be a number, not {type(value).__name__}")
    # Compared before converting: an int may be too large for a float. NaN fails both.
    if not (low < value if low_excluded else low <= value) or not value <= high:
        raise bad_field(param, f"must be in {'(' if low_excluded else '['}{low:g}, {high:g}]")
    result = float(value)
    if not math.isfinite(result):
        raise bad_field(param, "must be finite")
    return result


def boolean(param: str, value: object) -> bool:
    """True or False itself."""
    if not isinstance(value, bool):
        raise bad_field(param, f"must be true or false, not {type(value).__name__}")
    return value


def text(param: str, value: object, *, max_bytes: int | None = None) -> str:
    """A string that has a UTF-8 form (no lone surrogates)."""
    if not isinstance(value, str):
        raise bad_field(param, f"must be a string, not {type(value).__name__}")
    try:
        encoded = value.encode("utf-8")
    except UnicodeEncodeError:
        raise bad_field(param, "holds a lone surrogate, which is no character") from None
    if max_bytes is not None and len(encoded) > max_bytes:
        raise bad_field(param, f"must be at most {max_bytes} bytes long")
    return value


def items(param: str, value: object, limit: int) -> Sequence[object]:
    """A list of at most `limit` entries (a string is no list)."""
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise bad_field(param, f"must be a list, not {type(value).__name__}")
    if len(value) > limit:
        raise bad_field(param, f"must have at most {limit} entries, not {len(value)}")
    return value


def token_ids(param: str, value: object, *, vocab_size: int, limit: int) -> tuple[int, ...]:
    """Ids in [0, vocab_size); over `limit` entries are refused before any is looked at."""
    entries = items(param, value, limit)
    for entry in entries:
        if type(entry) is not int:
            raise bad_field(param, f"must hold integers, not {type(entry).__name__}")
        if not 0 <= entry < vocab_size:
            raise bad_field(
                param, f"holds {shown(entry)}, outside the vocabulary of {vocab_size} tokens"
            )
    return tuple(entries)  # type: ignore[arg-type]
