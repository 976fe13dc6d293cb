"""Peers as child processes: a host that answers over a pipe, a server that answers over HTTP.

Every child is the head of its own session and is ended with all that it started; its output goes
to a log whose end becomes the reason when it does not come up.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.peers.protocol import Batch, BatchTimes, PeerError, Server

START_TIMEOUT_S = 400.0
BATCH_TIMEOUT_S = 300.0
_END_TIMEOUT_S = 20.0


@contextmanager
def child(
    command: Sequence[str], log: Path, env: Mapping[str, str], *, piped: bool = False
) -> Iterator[subprocess.Popen[str]]:
    """A child process in its own session, ended with its descendants."""
    pipe = subprocess.PIPE if piped else subprocess.DEVNULL
    with log.open("w", encoding="utf-8") as sink:
        process = subprocess.Popen(
            list(command),
            stdin=pipe,
            stdout=pipe if piped else sink,
            stderr=sink,
            env={**os.environ, **env},
            text=True,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        if process.stdin:
            process.stdin.close()
        _end(process)


class HostedBatches:
    """The programs in `hosts/`: one JSON object a line, in and out."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self._process = process
        self._log = log
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.version = str(self._answer(START_TIMEOUT_S)["ready"])

    def run(self, batch: Batch) -> BatchTimes:
        """See `Offline`."""
        wish = {"batch": batch.size, "prompt": batch.prompt_tokens, "new": batch.new_tokens}
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({**wish, "seed": batch.seed}) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise PeerError(last_lines(self._log)) from error
        return BatchTimes(**self._answer(BATCH_TIMEOUT_S))

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            raise PeerError(f"no answer in {timeout_s:.0f} s") from None
        if not line:
            raise PeerError(last_lines(self._log))
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextmanager
def http_server(
    command: Sequence[str], log: Path, env: Mapping[str, str], *, port: int, model: str
) -> Iterator[Server]:
    """A server that answers /health with 200 when it can take requests."""
    started_s = time.monotonic()
    with child(command, log, env) as process:
        while not _is_healthy(port):
            if process.poll() is not None:
                raise PeerError(last_lines(log))
            if time.monotonic() - started_s > START_TIMEOUT_S:
                raise PeerError(f"not ready in {START_TIMEOUT_S:.0f} s: {last_lines(log)}")
            time.sleep(0.2)
        yield Server(
            target=f"127.0.0.1:{port}",
            model=model,
            start_s=time.monotonic() - started_s,
        )


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


def session_pids(leader: int) -> list[int]:
    """All processes of the session that `leader` heads."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if os.getsid(int(folder.name)) == leader:
                    found.append(int(folder.name))
            except ProcessLookupError:
                continue
    return sorted(found)


def last_lines(log: Path, count: int = 3) -> str:
    """The end of a log on one line."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    said = [line.strip() for line in lines if line.strip()][-count:]
    return " / ".join(said)[-300:] or "it ended without a word"


def _is_healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _end(process: subprocess.Popen[str]) -> None:
    """Ask the whole session to end, then make it; children may outlive the leader."""
    members = session_pids(process.pid)
    for signal_number in (signal.SIGTERM, signal.SIGKILL):
        for pid in members:
            try:
                os.kill(pid, signal_number)
            except ProcessLookupError:
                continue
        deadline_s = time.monotonic() + _END_TIMEOUT_S
        while time.monotonic() < deadline_s and (
            process.poll() is None or session_pids(process.pid)
        ):
            time.sleep(0.05)
        members = session_pids(process.pid)
        if not members:
            break
    process.wait()
