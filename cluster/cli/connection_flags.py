"""Flags that say which gateway a command talks to, and how it shows who it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from cluster.base.env import read_environment
from cluster.control.target import Connection, open_client
from router.client import PenstockClient

CommandT = TypeVar("CommandT", bound=Callable[..., Any])

_FILE = click.Path(path_type=Path)
_FLAGS = (
    click.option("--address", metavar="HOST:PORT", help="A gateway's gRPC address."),
    click.option(
        "--api-key", help="API key; rather set PENSTOCK_API_KEY, which `ps` does not show."
    ),
    click.option("--tls", is_flag=True, help="Speak TLS, trusting the system's authorities."),
    click.option("--ca-cert", type=_FILE, help="Speak TLS, trusting this file's (PEM)."),
    click.option("--client-cert", type=_FILE, help="Show this certificate (PEM)."),
    click.option("--client-key", type=_FILE, help="Its private key (PEM)."),
)
CONNECTION_NAMES = frozenset(
    {"address", "cluster", "api_key", "tls", "ca_cert", "client_cert", "client_key"}
)


def connection_flags(command: CommandT) -> CommandT:
    """Add the flags to a command that has `cluster` already."""
    for flag in reversed(_FLAGS):
        command = flag(command)
    return command


def client_of(flags: dict[str, Any]) -> PenstockClient:
    """A client as the flags and the environment say; other flags are left alone.

    Raises:
        ConfigError: they do not name one gateway, or name files that cannot be read.
    """
    wish = Connection(**{name: flags[name] for name in CONNECTION_NAMES})
    return open_client(wish, read_environment().api_key)
