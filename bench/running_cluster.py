"""A whole cluster as a benchmark sees it: `penstock up` as a child process, on free ports.

The child is started and ended as a user would; its processes' CPU time comes from /proc.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

PENSTOCK = str(Path(sys.executable).with_name("penstock"))
_READY_S = 180.0
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSpec:
    """What to serve."""

    model: str
    path: Path
    tp: int = 1
    threads: int = 1
    max_running_requests: int = 64
    dtype: str = "float32"
    max_context: int | str = "auto"
    max_step_tokens: int = 512


class RunningCluster:
    """A serving cluster; use as a context manager."""

    def __init__(self, spec: ClusterSpec) -> None:
        self.spec = spec
        self._folder = tempfile.TemporaryDirectory(prefix="penstock-bench-")
        self._file = Path(self._folder.name) / "cluster.yaml"
        self._log = Path(self._folder.name) / "up.log"
        grpc_port, http_port, dashboard = free_ports(3)
        self.target = f"127.0.0.1:{grpc_port}"
        self.http_target = f"127.0.0.1:{http_port}"
        self._file.write_text(
            f"cluster: {{name: bench}}\n"
            f"dashboard: {{port: {dashboard}}}\n"
            f"gateway: {{grpc_port: {grpc_port}, http_port: {http_port}}}\n"
            f"models:\n"
            f"  - name: {spec.model}\n"
            f"    path: {spec.path}\n"
            f"    dtype: {spec.dtype}\n"
            f"    parallel: {{tp: {spec.tp}}}\n"
            f"    limits:\n"
            f"      max_running_requests: {spec.max_running_requests}\n"
            f"      max_context: {spec.max_context}\n"
            f"      max_step_tokens: {spec.max_step_tokens}\n"
            f"    resources: {{threads_per_rank: {spec.threads}}}\n"
        )
        self._env = {**os.environ, "PENSTOCK_STATE_DIR": self._folder.name}
        self._process: subprocess.Popen[bytes] | None = None
        self.ready_s = 0.0
        """Seconds from the command to "ready"."""
        self.phases_s: dict[str, float] = {}

    def __enter__(self) -> RunningCluster:
        started_s = time.monotonic()
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [PENSTOCK, "up", str(self._file)], env=self._env, stdout=log, stderr=log
            )
        while not (match := re.search(r"ready in .*\((.*)\)", self._log.read_text())):
            if self._process.poll() is not None or time.monotonic() - started_s > _READY_S:
                said = self._log.read_text()
                self.__exit__(None, None, None)
                raise RuntimeError(f"the cluster did not start:\n{said}")
            time.sleep(0.02)
        self.ready_s = time.monotonic() - started_s
        for part in match[1].split(", "):
            name, seconds, _ = part.rsplit(" ", 2)
            self.phases_s[name] = float(seconds)
        self.phases_s |= self._replica()["startup_s"]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(60)
        if error is None:
            self._folder.cleanup()

    def plan(self) -> dict[str, Any]:
        """The model plan that is running (JSON of `ModelPlan`)."""
        output = self._penstock("plan", str(self._file), "--json")
        plan: dict[str, Any] = json.loads(output)["models"][0]
        return plan

    def pids(self) -> dict[str, list[int]]:
        """Process ids by role: gateway, leader, worker."""
        replica = self._replica()
        return {
            "gateway": [int(self._status()["gateway_pid"])],
            "leader": [int(replica["pid"])],
            "worker": [int(worker["pid"]) for worker in replica["workers"]],
        }

    def _replica(self) -> dict[str, Any]:
        replica: dict[str, Any] = self._status()["replicas"][0]
        return replica

    def _status(self) -> dict[str, Any]:
        status: dict[str, Any] = json.loads(self._penstock("status", "--json"))
        return status

    def _penstock(self, *arguments: str) -> str:
        answer = subprocess.run(
            [PENSTOCK, *arguments], env=self._env, capture_output=True, text=True, check=True
        )
        return answer.stdout


def cpu_seconds(pids: list[int]) -> float:
    """User plus system time that processes have used."""
    total = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / _TICKS_PER_S


def free_ports(count: int) -> list[int]:
    """Free ports below those that the kernel gives to whoever asks for any.

    A port from that range may, before the cluster opens it, become one of Ray's own gRPC servers'.
    They share ports (SO_REUSEPORT) as gateways do: both would listen, and calls would reach either.
    """
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports: list[int] = []
    while len(ports) < count:
        port = random.randrange(10_000, max(first, 11_000))
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            if port not in ports:
                ports.append(port)
    return ports
