"""Where a measurement was taken: processor, memory, software versions, commit.

Read once, at the end of a benchmark. Whatever cannot be found out is left out: a result file
never holds a guess.
"""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

# What a benchmark writes is no change of what it measured.
_CODE = ("--", ":/", ":(top,exclude)bench/results", ":(top,exclude)docs/performance.md")
PACKAGES = ("torch", "ray", "deepspeed", "transformers", "grpcio", "numpy")


def describe_machine() -> dict[str, str | int | float]:
    """Processor, usable cores, memory, accelerators, operating system, versions."""
    machine: dict[str, str | int | float] = {
        "cores": len(os.sched_getaffinity(0)),
        "os": platform.platform(),
        "python": platform.python_version(),
    }
    if cpu := _first_value(Path("/proc/cpuinfo"), "model name"):
        machine["cpu"] = cpu
    if memory := _first_value(Path("/proc/meminfo"), "MemTotal"):
        machine["memory_gib"] = round(int(memory.split()[0]) / 2**20, 1)
    if gpus := _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader"):
        machine["gpus"] = ", ".join(gpus.splitlines())
    for package in PACKAGES:
        try:
            machine[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return machine


def describe_commit() -> dict[str, str | bool]:
    """Commit of the checkout, whether files differ from it, and the time (UTC, ISO 8601)."""
    described: dict[str, str | bool] = {"date": datetime.now(UTC).isoformat(timespec="seconds")}
    if commit := _output("git", "rev-parse", "HEAD"):
        described["commit"] = commit
        described["uncommitted_changes"] = bool(_output("git", "status", "--porcelain", *_CODE))
    return described


def _first_value(path: Path, key: str) -> str:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    values = (line.partition(":")[2].strip() for line in lines if line.startswith(key))
    return next(values, "")


def _output(*command: str) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return result.stdout.strip()
