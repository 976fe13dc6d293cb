"""How much one render of a chat template may use, and the checks that keep it below that.

Pure arithmetic on sizes: each check looks at operands and refuses before the result is made, since
a single `'x' * 10**9` would otherwise take seconds and gigabytes inside one uninterruptible call.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence, Sized
from typing import Any

from jinja2.exceptions import SecurityError

_MAX_STEPS = 1_000_000
_STEPS_PER_CLOCK_READ = 16
_MAX_INTEGER_BITS = 4096
_WIDE_FIELD = re.compile(r"%[^%]*\*|\d{5,}|\{[^{}]*\{")
"""`%*d`, a width of five digits, or a `{}` field inside a `{}` field."""


class RenderBudget:
    """What one render may still use.

    Args:
        max_chars: largest text or list it may hold at once.
        seconds: time it may take by `clock`.
        clock: seconds; by default the CPU time of this thread, so a busy machine refuses nobody.
    """

    def __init__(
        self, max_chars: int, seconds: float, clock: Callable[[], float] = time.thread_time
    ) -> None:
        self._max_chars = max_chars
        self._clock = clock
        self._deadline = clock() + seconds
        self._steps = 0

    def tick(self) -> None:
        """Count one loop round or call.

        Raises:
            SecurityError: too many steps, or too much time.
        """
        self._steps += 1
        due = self._steps % _STEPS_PER_CLOCK_READ == 0
        if self._steps > _MAX_STEPS or (due and self._clock() > self._deadline):
            raise SecurityError("the chat template runs too long")

    def check_size(self, size: int) -> None:
        """Refuse to make a text or list of `size` items.

        Raises:
            SecurityError: it is too large.
        """
        if size > self._max_chars:
            raise SecurityError("the chat template makes too large a text")


def check_binop(budget: RenderBudget, operator: str, left: Any, right: Any) -> None:
    """Refuse `left operator right` if its result would be too large."""
    if operator == "%" and isinstance(left, str):
        _check_format(left)
        budget.check_size(len(left) + _text_size(right))
    elif operator == "+" and isinstance(left, str | list | tuple) and isinstance(right, Sized):
        budget.check_size(len(left) + len(right))
    elif operator == "*" and isinstance(left, str | list | tuple) and isinstance(right, int):
        budget.check_size(len(left) * max(right, 0))
    elif operator == "*" and isinstance(right, str | list | tuple) and isinstance(left, int):
        budget.check_size(len(right) * max(left, 0))
    elif operator in "**" and isinstance(left, int) and isinstance(right, int):
        grown = left.bit_length() * abs(right) if operator == "**" else right.bit_length()
        if grown + left.bit_length() > _MAX_INTEGER_BITS:
            raise SecurityError("too large a number")


def check_text_call(budget: RenderBudget, owner: str, name: str, args: Sequence[Any]) -> None:
    """Refuse `owner.name(*args)` if its result would be too large."""
    if name in ("format", "format_map"):
        _check_format(owner)
        budget.check_size(len(owner) + _text_size(args))
    elif name == "join" and args:
        _check_join(budget, owner, args[0])
    elif name == "replace" and len(args) >= 2:
        _check_replace(budget, owner, args[0], args[1])
    elif name == "translate":
        raise SecurityError("translate is not offered to chat templates")
    else:  # center, ljust, rjust, zfill, expandtabs
        tabs = owner.count("\t") if name == "expandtabs" else 1
        widths = [value for value in args if isinstance(value, int)]
        budget.check_size(max(widths, default=0) * max(tabs, 1))


def check_filter(
    budget: RenderBudget, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    """Refuse `args[0] | name(*args[1:], **kwargs)` if its result would be too large."""
    budget.tick()
    rest = [*args[1:], *kwargs.values()]
    if name == "format":
        _check_format(str(args[0]))
        budget.check_size(_text_size(args) + _text_size(rest))
    elif name == "replace" and len(rest) >= 2:
        _check_replace(budget, str(args[0]), str(rest[0]), str(rest[1]))
    elif name == "join":
        separator = next((value for value in rest if isinstance(value, str)), "")
        _check_join(budget, separator, args[0])
    else:  # center, indent, wordwrap, batch, slice
        lines = str(args[0]).count("\n") + 1 if isinstance(args[0], str) else 1
        widths = [value if isinstance(value, int) else _text_size(value) for value in rest]
        budget.check_size(max(widths, default=0) * lines)


def _check_format(pattern: str) -> None:
    if _WIDE_FIELD.search(pattern):
        raise SecurityError("too wide a format field")


def _check_join(budget: RenderBudget, separator: str, values: Any) -> None:
    if isinstance(values, Sized):
        budget.check_size(len(separator) * len(values) + _text_size(values))


def _check_replace(budget: RenderBudget, text: str, old: Any, new: Any) -> None:
    if isinstance(old, str) and isinstance(new, str):
        found = text.count(old) if old else len(text) + 1
        budget.check_size(len(text) + found * len(new))


def _text_size(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(_text_size(item) for item in value.values())
    if isinstance(value, list | tuple):
        return sum(len(item) if isinstance(item, str) else 32 for item in value)
    return 32
