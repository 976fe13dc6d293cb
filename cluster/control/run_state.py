"""Which clusters run on this machine: one small JSON file each, so that other shells find them.

A file whose process is gone (pid reused or dead) counts as absent. Written atomically, readable by
the owner alone.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path

from cluster.base import env
from cluster.base.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """A running cluster as `penstock up` left it on record."""

    name: str
    pid: int
    pid_started: str
    """Kernel start time of `pid`: a reused pid does not match."""
    grpc: str
    http: str
    dashboard_url: str
    dashboard_token: bool
    """Whether the dashboard asks for `ray get-auth-token`."""
    ray_address: str
    models: tuple[str, ...]
    ready: bool = False
    file: str = ""
    """The cluster file, absolute."""
    control: str = ""
    """The socket that takes changes (`control_socket.py`)."""
    api_keys_file: str = ""
    """Where the gateways' API keys are; empty: they ask for none."""
    certificate: str = ""
    """The gateways' certificate; empty: they speak plain text."""
    server_name: str = ""
    """What the certificate is for."""


def process_started(pid: int) -> str:
    """Kernel start time of a process in clock ticks; empty when there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[19]


def write(state: RunState) -> None:
    """Put the state on record."""
    path = _path(state.name)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    draft.write_text(json.dumps(dataclasses.asdict(state), indent=2) + "\n")
    draft.chmod(0o600)
    draft.replace(path)


def remove(name: str, pid: int) -> None:
    """Take the record away if it is `pid`'s own."""
    state = read(name)
    if state is not None and state.pid == pid:
        _path(name).unlink(missing_ok=True)


def read(name: str) -> RunState | None:
    """The record of a living cluster, else None."""
    try:
        data = json.loads(_path(name).read_text())
        state = RunState(**{**data, "models": tuple(data["models"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None
    alive = state.pid_started and process_started(state.pid) == state.pid_started
    return state if alive else None


def check_free(name: str) -> None:
    """Refuse the name of a cluster that runs here already.

    Raises:
        ConfigError: says which process it is and how to end it.
    """
    state = read(name)
    if state is not None and state.pid != os.getpid():
        raise ConfigError(
            f"A cluster named {name!r} already runs on this machine (pid {state.pid}).",
            f"End it with `penstock down {name}`, or give this one another cluster.name.",
            param="cluster.name",
        )


def running() -> list[RunState]:
    """All living clusters on record, by name."""
    folder = _folder()
    found = [read(path.stem) for path in sorted(folder.glob("*.json"))] if folder.is_dir() else []
    return [state for state in found if state is not None]


def only(name: str | None) -> RunState:
    """The named cluster, or the only one when no name is given.

    Raises:
        ConfigError: none runs, or several do and no name says which.
    """
    states = running()
    if name is not None:
        states = [state for state in states if state.name == name]
    if not states:
        which = f"No cluster named {name!r} runs" if name else "No cluster runs"
        raise ConfigError(
            f"{which} on this machine.",
            "Start one with `penstock up FILE`, or point at one with --address HOST:PORT.",
        )
    if len(states) > 1:
        listed = ", ".join(state.name for state in states)
        raise ConfigError(f"Several clusters run here: {listed}.", "Say which with --cluster NAME.")
    return states[0]


def _folder() -> Path:
    return env.read_environment().state_dir / "clusters"


def _path(name: str) -> Path:
    return _folder() / f"{name}.json"
