"""The rates of a machine: from the cache, or probed now by a process with a deadline. Torch-free.

A result belongs to a fingerprint (processor, cores, device, threads, dtype, file system of the
store) and is kept in the cache directory; a damaged entry is measured again. A probe that fails or
takes too long is an error that says why: a plan on invented rates would be worse than none.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.base.errors import ConfigError
from offload.rates import GemmPoint, Rates

DEADLINE_S = 60.0
"""Measuring takes about 10 s; starting Python and torch on a cold disk can double that, and a busy
machine multiplies it."""
_VERSION = 8
"""Changes when the probe measures something else."""
_GEMMS = ("gemm", "int8_gemm", "int4_gemm")
_MAY_BE_ZERO = (
    "layer_overhead_s",
    "part_overhead_s",
    "kv_window_s",
    "kv_copy_bytes_per_s",
    "row_value_s",
    "attention_bytes_per_s",
    "host_flops_per_s",
    "decode_bytes_per_s",
    "decode_slowdown",
    "compute_lost_to_reads",
)

Run = Callable[[Sequence[str], float], str]
"""Runs a command with a timeout in seconds and gives its output."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RatesRequest:
    """What the rates are asked for."""

    device: str
    num_threads: int
    dtype: str
    device_kind: str = ""
    """Which GPU, as its driver names it."""
    disk: Path
    """A directory on the file system that will hold the store."""


def run_probe(command: Sequence[str], timeout_s: float) -> str:
    """The output of a probe process.

    Raises:
        OSError, subprocess.SubprocessError: it failed or took too long.
    """
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=True)
    return done.stdout


def machine_rates(request: RatesRequest, cache_dir: Path, run: Run = run_probe) -> Rates:
    """Cached rates, or new ones.

    Raises:
        ConfigError: they could not be measured.
    """
    entry = cache_dir / "rates" / f"{_fingerprint(request)}.json"
    if (cached := _read(entry)) is not None:
        return cached
    command = [
        sys.executable,
        "-m",
        "offload.probe",
        f"--device={request.device}",
        f"--threads={request.num_threads}",
        f"--dtype={request.dtype}",
        f"--disk={request.disk}",
    ]
    try:
        rates = rates_from_json(json.loads(run(command, DEADLINE_S).splitlines()[-1]))
    except (OSError, subprocess.SubprocessError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(
            f"This machine's speeds could not be measured: {_why(error)}.",
            f"Run it by hand to see more: {' '.join(command[1:])}",
        ) from error
    _write(entry, rates)
    return rates


def rates_to_json(rates: Rates) -> dict[str, Any]:
    """Plain values; inverse of `rates_from_json`."""
    return dataclasses.asdict(rates)


def rates_from_json(data: Mapping[str, Any]) -> Rates:
    """Rates from plain values.

    Raises:
        TypeError, KeyError: a field is missing or unknown.
        ValueError: a rate is not a positive number.
    """
    points = {name: tuple(GemmPoint(**point) for point in data[name]) for name in _GEMMS}
    rates = Rates(**{**data, **points})
    others = (*_GEMMS, "device_is_host")
    numbers = {key: value for key, value in data.items() if key not in others}
    if not all(points.values()) or not all(
        math.isfinite(number) and (number > 0 or (key in _MAY_BE_ZERO and number == 0))
        for key, number in numbers.items()
    ):
        raise ValueError(f"not rates: {data}")
    return rates


def _fingerprint(request: RatesRequest) -> str:
    parts = [
        _VERSION,
        platform.machine(),
        _processor(),
        os.cpu_count(),
        request.device,
        request.device_kind,
        request.num_threads,
        request.dtype,
        _file_system(request.disk),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith("model name")), "")


def _file_system(directory: Path) -> int:
    """Number of the device that holds the nearest directory that exists."""
    return next(path.stat().st_dev for path in (directory, *directory.parents) if path.exists())


def _read(entry: Path) -> Rates | None:
    try:
        return rates_from_json(json.loads(entry.read_text(encoding="utf-8")))
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _write(entry: Path, rates: Rates) -> None:
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        part = entry.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(rates_to_json(rates)), encoding="utf-8")
        part.rename(entry)
    except OSError:
        return  # measured again next time


def _why(error: Exception) -> str:
    if isinstance(error, subprocess.TimeoutExpired):
        return f"the probe took longer than {error.timeout:.0f} s"
    if isinstance(error, subprocess.CalledProcessError):
        lines = (error.stderr or "").strip().splitlines() or [f"exit status {error.returncode}"]
        return f"the probe failed ({lines[-1]})"
    return f"{type(error).__name__}: {error}"
