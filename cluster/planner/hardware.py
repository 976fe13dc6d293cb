"""What this machine has: cores, memory and GPUs, as a `Topology` of one node.

Sees what the process may use, not what the board carries: CPU affinity, cgroup limits (v1 and v2,
every level up to the root) and CUDA_VISIBLE_DEVICES count. GPUs come from `nvidia-smi`; a machine
without it has none, which is normal. Never imports torch, never changes anything.
"""

from __future__ import annotations

import csv
import math
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster.base.env import Environment, read_environment
from cluster.dist.topology import Device, Node, Topology

_SMI = (
    "nvidia-smi",
    "--query-gpu=index,uuid,name,memory.total",
    "--format=csv,noheader,nounits",
)
_SMI_TIMEOUT_S = 20.0
_UNLIMITED_BYTES = 1 << 60
"""cgroup v1 writes "no limit" as a number near 2**63."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFiles:
    """Where the kernel's files are; tests point it elsewhere."""

    proc: Path = Path("/proc")
    cgroup: Path = Path("/sys/fs/cgroup")


def local_topology(environment: Environment | None = None) -> Topology:
    """This machine alone, as one node; `environment` defaults to the process's own."""
    files = HostFiles()
    visible = (environment or read_environment()).cuda_visible_devices
    node = Node(
        node_id="local",
        host=socket.gethostname(),
        cores=usable_cores(files),
        memory_bytes=usable_memory_bytes(files),
        devices=visible_devices(query_nvidia_smi, visible),
    )
    return Topology(nodes=(node,))


def usable_cores(files: HostFiles) -> int:
    """Cores this process may run on: its affinity, or its CPU quota when that is smaller."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else (os.cpu_count() or 1)
    quotas = [*_cpu_quotas_v2(files), *_cpu_quotas_v1(files)]
    return max(1, min([cores, *(math.floor(quota) for quota in quotas)]))


def usable_memory_bytes(files: HostFiles) -> int:
    """Memory this process may use: the machine's, or its cgroup's limit when that is smaller."""
    limits = [
        limit
        for path in (*_cgroup_files(files, "", "memory.max"), *_memory_files_v1(files))
        if (limit := _read_number(path)) is not None and 0 < limit < _UNLIMITED_BYTES
    ]
    return min([_machine_memory_bytes(files), *limits])


def _machine_memory_bytes(files: HostFiles) -> int:
    try:
        for line in (files.proc / "meminfo").read_text().splitlines():
            if line.startswith("MemTotal:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass  # not Linux: sysconf knows it too
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _memory_files_v1(files: HostFiles) -> Iterator[Path]:
    return _cgroup_files(files, "memory", "memory.limit_in_bytes")


def _cpu_quotas_v2(files: HostFiles) -> Iterator[float]:
    for path in _cgroup_files(files, "", "cpu.max"):
        quota, _, period = (_read(path) or "max").partition(" ")
        if quota.isdigit() and period.isdigit() and int(period) > 0:
            yield int(quota) / int(period)


def _cpu_quotas_v1(files: HostFiles) -> Iterator[float]:
    for path in _cgroup_files(files, "cpu", "cpu.cfs_quota_us"):
        quota, period = _read_number(path), _read_number(path.with_name("cpu.cfs_period_us"))
        if quota is not None and period is not None and quota > 0 and period > 0:
            yield quota / period


def _cgroup_files(files: HostFiles, controller: str, name: str) -> Iterator[Path]:
    """`name` in this process's cgroup and in all above it; controller "" means cgroup v2.

    Inside a container the path that /proc tells may be the host's: then only the root exists.
    """
    for line in (_read(files.proc / "self" / "cgroup") or "").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controller not in controllers.split(","):
            continue
        root = files.cgroup / controllers if controllers else files.cgroup
        if controllers and not root.is_dir():
            root = files.cgroup / controller
        own = root / path.lstrip("/")
        if ".." in own.parts:
            own = root
        for directory in (own, *own.parents):
            if (directory / name).is_file():
                yield directory / name
            if directory == root:
                break


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None


def _read_number(path: Path) -> int | None:
    text = _read(path) or ""
    return int(text) if text.lstrip("-").isdigit() else None


def query_nvidia_smi() -> str:
    """One line per GPU: index, uuid, name, MiB; empty when there is no working driver."""
    try:
        done = subprocess.run(
            _SMI, capture_output=True, text=True, timeout=_SMI_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def visible_devices(query: Callable[[], str], visible: str | None) -> tuple[Device, ...]:
    """GPUs that CUDA would show, in its order.

    As in CUDA, entries are indices or uuid prefixes, the list ends at the first one that names
    no GPU, and an empty list shows none. Slices (MIG) are not counted: `nvidia-smi` reports no
    memory for them here.
    """
    if visible is not None and not visible.strip():
        return ()
    by_uuid: dict[str, Device] = {}
    for row in csv.reader(query().splitlines(), skipinitialspace=True):
        if len(row) == 4 and row[0].isdigit() and row[3].isdigit():
            index, uuid, kind, mebibytes = row
            by_uuid[uuid] = Device(index=int(index), kind=kind, memory_bytes=int(mebibytes) * 2**20)
    if visible is None:
        return tuple(by_uuid.values())
    chosen: list[Device] = []
    for entry in visible.split(","):
        device = _match_device(by_uuid, entry.strip())
        if device is None or device in chosen:
            break
        chosen.append(device)
    return tuple(chosen)


def _match_device(by_uuid: dict[str, Device], entry: str) -> Device | None:
    for uuid, device in by_uuid.items():
        if entry == str(device.index) or (entry.startswith("GPU-") and uuid.startswith(entry)):
            return device
    return None
