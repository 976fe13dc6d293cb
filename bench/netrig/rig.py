"""Nodes on one machine: a network namespace each, and a link between them that has a price.

For tests and benchmarks of what crosses between nodes. A small switch (switch.c, built with the C
compiler at start) moves packets between the namespaces; delay, rate and cost per message can be
changed while it runs, and it counts what passes. Inside a node, processes use its loopback.

Needs root, a C compiler, `ip` and /dev/net/tun; `why_not` says what is missing.
"""

from __future__ import annotations

import mmap
import os
import shutil
import struct
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).parent / "switch.c"
COMMANDS = ("cc", "ip", "unshare", "nsenter")
MAX_NODES = 16
_LINK = struct.Struct("=4Q")
_NODE = struct.Struct("=3Q")
_SUBNET = "10.77.0"
# The largest a TUN device takes: a message of gloo is then one packet more often than not.
_MTU = 65520
_START_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """The way between any two nodes; zero costs nothing."""

    delay_s: float = 0.0
    message_s: float = 0.0
    """How long a packet with data occupies its node, besides its bytes."""
    bytes_per_s: float = 0.0
    """What a node sends, and what it receives; 0: no limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wire:
    """What has crossed between nodes: TCP packets with data, and the data in them."""

    messages: int
    num_bytes: int

    def __sub__(self, other: Wire) -> Wire:
        return Wire(
            messages=self.messages - other.messages, num_bytes=self.num_bytes - other.num_bytes
        )


def why_not() -> str:
    """What keeps this machine from having nodes; empty when nothing does."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if missing := [name for name in COMMANDS if shutil.which(name) is None]:
        return f"not installed: {', '.join(missing)}"
    if not Path("/dev/net/tun").exists():
        return "this machine has no /dev/net/tun"
    probe = subprocess.run(["unshare", "--net", "--pid", "--fork", "true"], capture_output=True)
    return "" if probe.returncode == 0 else "namespaces are not permitted here"


class Control:
    """The memory shared with the switch: the link's settings and the counters."""

    SIZE = _LINK.size + MAX_NODES * _NODE.size

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), self.SIZE)

    @property
    def is_ready(self) -> bool:
        """Whether the switch has opened its devices."""
        ready: int = _LINK.unpack_from(self._memory)[3]
        return ready == 1

    def shape(self, link: Link) -> None:
        """Set the link, from the next packet on."""
        numbers = (round(1e9 * link.delay_s), round(1e9 * link.message_s), round(link.bytes_per_s))
        struct.pack_into("=3Q", self._memory, 0, *numbers)

    def wire(self) -> Wire:
        """Totals since the switch began."""
        nodes = [
            _NODE.unpack_from(self._memory, _LINK.size + index * _NODE.size)
            for index in range(MAX_NODES)
        ]
        return Wire(messages=sum(n[0] for n in nodes), num_bytes=sum(n[1] for n in nodes))

    def close(self) -> None:
        """Let go of the memory."""
        self._memory.close()


class NetRig:
    """Nodes 0 ... num_nodes - 1 until `close`; a context manager.

    Raises:
        RuntimeError: a command failed; `why_not` tells the usual reasons beforehand.
    """

    def __init__(self, num_nodes: int, link: Link | None = None) -> None:
        self.num_nodes = num_nodes
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        self.control_path = folder / "control"
        self.control_path.write_bytes(bytes(Control.SIZE))
        self.control = Control(self.control_path)
        self.control.shape(link or Link())
        self._names = [f"rig{os.getpid()}n{node}" for node in range(num_nodes)]
        self._switch: subprocess.Popen[bytes] | None = None
        try:
            _run("cc", "-O2", "-o", str(folder / "switch"), str(SOURCE))
            self._start(str(folder / "switch"))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> NetRig:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def address(self, node: int) -> str:
        """Where the other nodes reach it."""
        return f"{_SUBNET}.{node + 1}"

    def command(self, node: int, *argv: str) -> list[str]:
        """`argv` to be run on a node, as a process that this machine sees."""
        return ["ip", "netns", "exec", self._names[node], *argv]

    def contained_command(self, node: int, *argv: str) -> list[str]:
        """The same in a process namespace of its own, which ends with it; for whole Ray nodes."""
        own = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child", *argv)
        return self.command(node, *own)

    def close(self) -> None:
        """Take everything down; safe to call twice. Processes on the nodes should have ended."""
        if self._switch is not None:
            self._switch.kill()
            self._switch.wait()
            self._switch = None
        for name in self._names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
        self._names = []
        self.control.close()
        self._folder.cleanup()

    def _start(self, switch: str) -> None:
        devices = [f"{name}t" for name in self._names]
        self._switch = subprocess.Popen([switch, str(self.control_path), *devices])
        give_up_s = time.monotonic() + _START_TIMEOUT_S
        while not self.control.is_ready:
            if self._switch.poll() is not None or time.monotonic() > give_up_s:
                raise RuntimeError("the switch between the nodes did not start")
            time.sleep(0.01)
        for node, (name, device) in enumerate(zip(self._names, devices, strict=True)):
            _run("ip", "netns", "add", name)
            _run("ip", "link", "set", device, "netns", name)
            inside = ("ip", "-n", name)
            _run(*inside, "addr", "add", f"{self.address(node)}/24", "dev", device)
            _run(*inside, "link", "set", device, "mtu", str(_MTU), "txqueuelen", "10000", "up")
            _run(*inside, "link", "set", "lo", "up")
            self._open_windows(node, device)

    def _open_windows(self, node: int, device: str) -> None:
        """Let TCP send at once what the link takes: it is the link that is studied, not TCP."""
        settings = {
            "tcp_slow_start_after_idle": "0",
            "tcp_rmem": "4096 8388608 33554432",
            "tcp_wmem": "4096 8388608 33554432",
        }
        script = "; ".join(f"echo {v} > /proc/sys/net/ipv4/{k}" for k, v in settings.items())
        _run(*self.command(node, "sh", "-c", script))
        route = ("ip", "-n", self._names[node], "route", "replace", f"{_SUBNET}.0/24")
        _run(*route, "dev", device, "initcwnd", "200", "initrwnd", "200")


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
