"""The value of `--timeout`: a time that passes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import click

CommandT = TypeVar("CommandT", bound=Callable[..., Any])
_MOST_S = 7 * 86_400.0


class Seconds(click.ParamType[float]):
    """A number of seconds above 0, at most a week."""

    name = "seconds"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """The number; anything else is a usage error."""
        try:
            seconds = float(str(value))
        except ValueError:
            seconds = math.nan
        if not 0.0 < seconds <= _MOST_S:
            self.fail(f"{value!r} is no number of seconds above 0 (at most a week).", param, ctx)
        return seconds


def timeout_option(default_s: float, meaning: str) -> Callable[[CommandT], CommandT]:
    """The `--timeout` flag of a command."""
    return click.option(
        "--timeout", type=Seconds(), default=default_s, show_default=True, help=meaning
    )
