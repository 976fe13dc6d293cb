"""`penstock generate`: complete a prompt, streamed to the terminal as it comes."""

from __future__ import annotations

import sys
from typing import Any

import click

from cluster.cli.connection_flags import client_of
from cluster.cli.sampling_flags import given_sampling, sampling_flags
from cluster.control.target import model_name
from router.client import RequestOptions


@click.command()
@click.argument("prompt")
@sampling_flags
@click.option("--echo", is_flag=True, help="Print the prompt too.")
@click.option("--token-ids", is_flag=True, help="Print token ids instead of text.")
def generate(prompt: str, echo: bool, token_ids: bool, **flags: Any) -> None:
    """Complete PROMPT ('-' reads it from standard input)."""
    text = sys.stdin.read() if prompt == "-" else prompt
    with client_of(flags) as client:
        model = model_name(client, flags["model"], deadline_s=10.0)
        stream = client.generate(
            model,
            text,
            options=RequestOptions(echo=echo),
            deadline_s=flags["timeout"],
            **given_sampling(flags),
        )
        with stream:
            for piece in stream:
                shown = " ".join(map(str, piece.token_ids)) + " " if token_ids else piece.text
                click.echo(shown, nl=False)
                sys.stdout.flush()
    click.echo()
