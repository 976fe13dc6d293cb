"""Sampling flags that `generate` and `chat` share; an unset flag leaves the model's default."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from cluster.cli.connection_flags import CONNECTION_NAMES, connection_flags
from cluster.cli.seconds import timeout_option

CommandT = TypeVar("CommandT", bound=Callable[..., Any])

_FLAGS = (
    click.option("--max-tokens", type=int, help="Most tokens to generate."),
    click.option("--min-tokens", type=int, help="No stop before this many."),
    click.option("--temperature", type=float, help="0 is greedy."),
    click.option("--top-k", type=int, help="Keep the k most likely tokens; 0 keeps all."),
    click.option("--top-p", type=float, help="Keep the most likely tokens up to this mass."),
    click.option("--min-p", type=float, help="Drop tokens below this share of the likeliest."),
    click.option("--repetition-penalty", type=float, help="1 is off."),
    click.option("--presence-penalty", type=float, help="0 is off."),
    click.option("--frequency-penalty", type=float, help="0 is off."),
    click.option("--seed", type=int, help="Repeat a sampled answer exactly."),
    click.option("--stop", multiple=True, help="Stop at this text; may be repeated."),
    click.option("--ignore-eos", is_flag=True, default=None, help="Go on past the end token."),
    click.option("--model", "-m", help="Model name; the only served one if not given."),
    click.option("--cluster", help="A cluster of this machine, by name."),
    timeout_option(300.0, "Seconds for a whole answer."),
)
_NO_SAMPLING = CONNECTION_NAMES | {"model", "timeout"}


def sampling_flags(command: CommandT) -> CommandT:
    """Add every shared flag to a command."""
    command = connection_flags(command)
    for flag in reversed(_FLAGS):
        command = flag(command)
    return command


def given_sampling(flags: dict[str, Any]) -> dict[str, Any]:
    """The sampling fields that the user set."""
    return {
        name: value
        for name, value in flags.items()
        if name not in _NO_SAMPLING and value is not None and value != ()
    }
