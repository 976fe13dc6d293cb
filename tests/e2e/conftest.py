"""One real cluster for the folder: `penstock up` as a user runs it, two replicas of two ranks."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from bench.running_cluster import free_ports
from router.client import PenstockClient

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "models" / "demo-dense"
MIXTURE = MODEL.with_name("demo-moe")
PENSTOCK = str(Path(sys.executable).with_name("penstock"))
CLUSTER = """
cluster: {{name: {name}}}
dashboard: {{port: {dashboard}}}
gateway: {{grpc_port: {grpc}, http_port: {http}}}
models:
  - name: {served}
    path: {model}
    dtype: float32
    replicas: 2
    parallel: {{tp: 2}}
    kv_cache: {{memory: 16MiB}}
    limits: {{max_step_tokens: 128, step_timeout: 5s}}
"""


def penstock(
    *arguments: str, env: dict[str, str], timeout: float = 60.0
) -> subprocess.CompletedProcess:
    return subprocess.run(
        [PENSTOCK, *arguments],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@dataclass
class RunningCluster:
    """A `penstock up` in the foreground, as this test run's child."""

    process: subprocess.Popen
    grpc: str
    http: str
    env: dict[str, str]
    log: Path

    def status(self) -> dict:
        """What `penstock status --json` prints, without a process for every look."""
        with PenstockClient(self.grpc) as client:
            return client.status(deadline_s=10.0)

    def replicas(self, model: str | None = None) -> list[dict]:
        """Replicas that are ready: those of one model, or all."""
        return [
            replica
            for replica in self.status()["replicas"]
            if replica["state"] == "ready" and model in (None, replica["model"])
        ]

    def wait_for(self, condition, timeout_s: float = 60.0) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline_s, (
                f"not within {timeout_s} s\n{self.log.read_text()}"
            )
            time.sleep(0.1)


@dataclass
class ClusterFile:
    path: Path
    grpc: int
    http: int


def write_cluster(
    folder: Path, name: str, model: Path = MODEL, template: str = CLUSTER
) -> ClusterFile:
    """A cluster file on free ports."""
    grpc_port, http_port, dashboard = free_ports(3)
    path = folder / "cluster.yaml"
    ports = {"dashboard": dashboard, "grpc": grpc_port, "http": http_port}
    path.write_text(template.format(name=name, served=model.name, model=model, **ports))
    return ClusterFile(path, grpc_port, http_port)


def start_cluster(
    folder: Path, name: str, model: Path = MODEL, template: str = CLUSTER, *flags: str
) -> RunningCluster:
    file = write_cluster(folder, name, model, template)
    env = {"PENSTOCK_STATE_DIR": str(folder / "state")}
    log = folder / "up.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [PENSTOCK, "up", str(file.path), "--timeout", "120", *flags],
            env={**os.environ, **env},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    cluster = RunningCluster(
        process, f"127.0.0.1:{file.grpc}", f"http://127.0.0.1:{file.http}", env, log
    )
    deadline_s = time.monotonic() + 150.0
    while "ready in" not in log.read_text():
        assert process.poll() is None, f"up ended early:\n{log.read_text()}"
        assert time.monotonic() < deadline_s, f"up is not ready:\n{log.read_text()}"
        time.sleep(0.1)
    return cluster


def stop_cluster(cluster: RunningCluster) -> int:
    if cluster.process.poll() is None:
        cluster.process.send_signal(signal.SIGINT)
    return cluster.process.wait(timeout=90)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    running = start_cluster(tmp_path_factory.mktemp("cluster"), "e2e")
    try:
        yield running
    finally:
        stop_cluster(running)
