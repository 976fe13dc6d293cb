"""A Ray cluster of several nodes on one machine: each in network and process namespaces of its own.

Nodes reach each other over the rig's link only, and see neither each other's processes nor
/tmp/ray.
The first node is the head. Everything a node has started ends with its namespace.
"""

from __future__ import annotations

import os
import secrets
import shlex
import subprocess
import sys
import time
from pathlib import Path

from bench.netrig.rig import NetRig

_PORT = 6379
_START_TIMEOUT_S = 90.0
_BIN = Path(sys.executable).parent


class RayNodes:
    """The nodes of a rig as a Ray cluster, until `close`.

    Args:
        folder: for what each node keeps under /tmp/ray, and logs.
        cpus: what each node offers.
    """

    def __init__(self, rig: NetRig, folder: Path, cpus: int) -> None:
        self._rig = rig
        self._folder = folder
        self._token = secrets.token_hex(16)
        self._nodes: list[subprocess.Popen[bytes]] = []
        self.address = f"{rig.address(0)}:{_PORT}"
        join = ["--head", f"--port={_PORT}", "--include-dashboard=false"]
        try:
            for node in range(rig.num_nodes):
                self._nodes.append(self._start(node, cpus, join))
                self._wait_for(node)
                join = [f"--address={self.address}"]
        except BaseException:
            self.close()
            raise

    def log(self, node: int) -> str:
        """What a node's Ray said."""
        return (self._folder / f"node{node}.log").read_text()

    def run_on_head(self, *command: str, log: Path) -> subprocess.Popen[bytes]:
        """Start a command beside the head's processes, in all its namespaces."""
        (init,) = _children(self._nodes[0].pid)
        inside = ["nsenter", f"--target={init}", "--net", "--pid", "--mount", *command]
        with log.open("w") as output:
            return subprocess.Popen(
                inside, env=self._env(0), stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )

    def end(self, node: int) -> None:
        """All processes of a node die at once."""
        self._nodes[node].kill()  # its namespace's first process, and with it all others, ends too
        self._nodes[node].wait()

    def close(self) -> None:
        """End all nodes; safe to call twice."""
        for node in reversed(range(len(self._nodes))):
            self.end(node)
        self._nodes = []

    def _start(self, node: int, cpus: int, arguments: list[str]) -> subprocess.Popen[bytes]:
        own_tmp = self._folder / f"node{node}"
        own_tmp.mkdir()
        ray = [
            str(_BIN / "ray"),
            "start",
            *arguments,
            f"--node-ip-address={self._rig.address(node)}",
            f"--num-cpus={cpus}",
            "--object-store-memory=100000000",
            "--disable-usage-stats",
            "--block",
        ]
        script = f"mkdir -p /tmp/ray && mount --bind {own_tmp} /tmp/ray && exec {shlex.join(ray)}"
        with (self._folder / f"node{node}.log").open("w") as output:
            return subprocess.Popen(
                self._rig.contained_command(node, "sh", "-c", script),
                env=self._env(node),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    def _env(self, node: int) -> dict[str, str]:
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        return {
            **inherited,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self._token,
            "PENSTOCK_STATE_DIR": str(self._folder / f"state{node}"),
        }

    def _wait_for(self, node: int) -> None:
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        while "Ray runtime started" not in self.log(node):
            if self._nodes[node].poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError(f"node {node} did not start:\n{self.log(node)}")
            time.sleep(0.2)


def _children(pid: int) -> list[int]:
    """Processes that a process has started, by its only thread.

    `ip netns exec` becomes `unshare`, whose one child is the namespace's first process.
    """
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
