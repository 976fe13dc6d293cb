"""`penstock chat`: a conversation in the terminal, or one turn with --message."""

from __future__ import annotations

import sys
from typing import Any

import click

from cluster.cli.connection_flags import client_of
from cluster.cli.console import console
from cluster.cli.sampling_flags import given_sampling, sampling_flags
from cluster.control.target import model_name
from router.api import ChatTurn
from router.client import PenstockClient


@click.command()
@sampling_flags
@click.option("--message", help="Send one message, print the answer, end.")
@click.option("--system", help="Instructions that open the conversation.")
def chat(message: str | None, system: str | None, **flags: Any) -> None:
    """Talk to a chat model; an empty line or Ctrl-D ends the conversation."""
    turns = [ChatTurn(role="system", content=system)] if system else []
    with client_of(flags) as client:
        model = model_name(client, flags["model"], deadline_s=10.0)
        while text := message or _ask():
            turns.append(ChatTurn(role="user", content=text))
            answer = _answer(client, model, turns, flags)
            turns.append(ChatTurn(role="assistant", content=answer))
            if message is not None:
                return


def _ask() -> str:
    try:
        return console.input("[bold]> [/]").strip()
    except EOFError:
        return ""


def _answer(
    client: PenstockClient, model: str, turns: list[ChatTurn], flags: dict[str, Any]
) -> str:
    """Stream one answer to the terminal; returns it whole."""
    parts: list[str] = []
    stream = client.chat(model, turns, deadline_s=flags["timeout"], **given_sampling(flags))
    with stream:
        for piece in stream:
            parts.append(piece.text)
            click.echo(piece.text, nl=False)
            sys.stdout.flush()
    click.echo()
    return "".join(parts)
