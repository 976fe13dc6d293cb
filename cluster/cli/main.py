"""The `penstock` command: a table of subcommands, loaded when used, and one place for errors.

`--help` must not pay for Ray or torch, so the table holds each command's help line and only the
chosen one is imported. Exit codes: 0 done, 1 our fault, 2 the user can mend it, 130 interrupted.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import click

from cluster.base.env import read_environment, set_ray_defaults
from cluster.base.log import LogStyle, configure_logging

EXIT_INTERRUPTED = 130


@dataclass(frozen=True, slots=True, kw_only=True)
class LazyCommand:
    """Where a command lives and what it does, without importing it."""

    target: str
    """module:attribute."""
    help: str


COMMANDS: Mapping[str, LazyCommand] = {
    "validate": LazyCommand(
        target="cluster.cli.validate:validate", help="Check a cluster file; starts nothing."
    ),
    "plan": LazyCommand(target="cluster.cli.plan:plan", help="Show what would run where, and why."),
    "pack": LazyCommand(
        target="cluster.cli.pack:pack", help="Write the packed weights of streamed models."
    ),
    "up": LazyCommand(target="cluster.cli.up:up", help="Run a cluster until Ctrl-C."),
    "apply": LazyCommand(
        target="cluster.cli.apply:apply", help="Bring a running cluster to an edited file."
    ),
    "scale": LazyCommand(
        target="cluster.cli.scale:scale", help="Change a model's replicas, in the file and live."
    ),
    "status": LazyCommand(
        target="cluster.cli.status:status", help="Show replicas, ranks, load and memory."
    ),
    "generate": LazyCommand(
        target="cluster.cli.generate:generate", help="Complete a prompt, streamed."
    ),
    "chat": LazyCommand(target="cluster.cli.chat:chat", help="Talk to a chat model."),
    "render": LazyCommand(
        target="cluster.cli.render:render", help="Write manifests for Kubernetes (KubeRay)."
    ),
    "down": LazyCommand(target="cluster.cli.down:down", help="End a cluster of this machine."),
}


class PenstockGroup(click.Group):
    """Imports a subcommand when it is used and turns errors into exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, imported now."""
        entry = COMMANDS.get(cmd_name)
        if entry is None:
            return None
        module, _, attribute = entry.target.partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands from the table alone."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.help) for name, entry in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; every way it can end becomes an exit code."""
        try:
            configure_logging(read_environment().log_level, LogStyle.PLAIN, sys.stderr)
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            ctx.exit(EXIT_INTERRUPTED)
        except Exception as error:
            console = importlib.import_module("cluster.cli.console")
            ctx.exit(console.report_error(error))


@click.group(cls=PenstockGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(metadata.version("penstock"), prog_name="penstock")
def cli() -> None:
    """Penstock: an LLM serving cluster on Ray, described by one YAML file."""


def main() -> None:
    """Entry point of the `penstock` script."""
    # Before any command imports Ray, which reads the environment when it is loaded.
    set_ray_defaults()
    cli(prog_name="penstock")
