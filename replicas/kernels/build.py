"""Compiles the C++ kernels at first use and keeps the library in a cache directory.

A library's name holds a key (sources, flags, compiler, processor) and the digest of its bytes, so a
changed source means a new build and a damaged file is noticed and replaced. It appears by rename:
nobody sees half of one. A lock keeps ranks that start together from compiling the same thing; it is
the kernel's own file lock, which dies with its holder, and even a stuck holder only costs
`LOCK_TIMEOUT_S`. Whatever goes wrong is a `KernelsUnavailableError`, never an end of the process.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from cluster.base.file_lock import file_lock

SOURCES = Path(__file__).parent / "cpu"
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno")
COMPILE_TIMEOUT_S = 180.0
LOCK_TIMEOUT_S = 200.0
_ASK_TIMEOUT_S = 20.0


class KernelsUnavailableError(Exception):
    """Why there is no library; the caller goes on without."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildPlan:
    """What is built, with what, for whom."""

    compiler: str
    march: str = "native"
    sources: Path = SOURCES
    headers: Path | None = None
    """A second folder, whose headers the sources include."""
    lock_timeout_s: float = LOCK_TIMEOUT_S
    compile_timeout_s: float = COMPILE_TIMEOUT_S
    """Longest time of one run of the compiler."""
    without_tiles: bool = False
    """Leave matrix tiles (AMX) alone on processors that have them."""

    def flags(self) -> list[str]:
        """Compiler flags; the OpenMP runtime is torch's own where torch has one.

        Two runtimes in a process would be two thread pools that fight for the cores.
        """
        linked = [] if hasattr(ctypes.CDLL(None), "GOMP_parallel") else ["-fopenmp"]
        less = ["-mno-amx-tile"] if self.without_tiles else []
        return [*FLAGS, f"-march={self.march}", *less, *[f"-link:{flag}" for flag in linked]]

    def files(self) -> list[Path]:
        """Everything that the library is made of."""
        headers = [] if self.headers is None else _source_files(self.headers)
        return [*_source_files(self.sources), *[path for path in headers if path.suffix == ".h"]]

    def key(self) -> str:
        """Changes with everything that the machine code depends on."""
        digest = hashlib.sha256()
        for path in self.files():
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
        parts = [*self.flags(), _ask(self.compiler, "--version"), platform.machine()]
        if self.march == "native":
            parts.append(_processor())
        digest.update("\0".join(parts).encode())
        return digest.hexdigest()[:24]


def find_compiler() -> str:
    """The first C++ compiler on the path.

    Raises:
        KernelsUnavailableError: there is none.
    """
    for name in COMPILERS:
        if found := shutil.which(name):
            return found
    raise KernelsUnavailableError(f"there is no C++ compiler ({', '.join(COMPILERS)})")


def build_library(plan: BuildPlan, cache_dir: Path) -> Path:
    """The compiled library, from the cache or new.

    Raises:
        KernelsUnavailableError: the cache cannot be used, or the compiler failed.
    """
    try:
        _private_directory(cache_dir)
        key = plan.key()
        if found := _cached(cache_dir, key):
            return found
        # Held or not: building twice is harmless, waiting is not.
        with file_lock(cache_dir / f"{key}.lock", plan.lock_timeout_s):
            return _cached(cache_dir, key) or _compile(plan, cache_dir, key)
    except OSError as error:
        raise KernelsUnavailableError(f"{cache_dir} cannot be used ({error})") from error


def _private_directory(path: Path) -> None:
    """A library is code: only its owner may be able to put one there."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = path.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise KernelsUnavailableError(f"{path} can be written by others")


def _cached(cache_dir: Path, key: str) -> Path | None:
    for path in sorted(cache_dir.glob(f"{key}-*.so")):
        if path.stem == f"{key}-{_digest(path)}":
            return path
        path.unlink(missing_ok=True)
    return None


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


def _compile(plan: BuildPlan, cache_dir: Path, key: str) -> Path:
    flags = plan.flags()
    linked = [flag.removeprefix("-link:") for flag in flags if flag.startswith("-link:")]
    compiled = [flag for flag in flags if not flag.startswith("-link:")]
    if plan.headers is not None:
        compiled.append(f"-I{plan.headers}")
    units = [path for path in _source_files(plan.sources) if path.suffix == ".cpp"]
    with tempfile.TemporaryDirectory(dir=cache_dir, prefix="build-") as folder:
        objects = [str(Path(folder, f"{unit.stem}.o")) for unit in units]
        commands = [
            [plan.compiler, *compiled, "-c", str(unit), "-o", target]
            for unit, target in zip(units, objects, strict=True)
        ]
        with ThreadPoolExecutor() as compilers:
            list(compilers.map(lambda command: _run(command, plan.compile_timeout_s), commands))
        library = Path(folder, "library.so")
        link = [plan.compiler, "-shared", *objects, *linked, "-o", str(library)]
        _run(link, plan.compile_timeout_s)
        target = cache_dir / f"{key}-{_digest(library)}.so"
        library.rename(target)
    return target


def _run(command: list[str], timeout_s: float) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise KernelsUnavailableError(f"{command[0]} took longer than {timeout_s:.0f} s") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        first = next((line for line in lines if "error" in line), lines[0])
        raise KernelsUnavailableError(f"{command[0]} failed: {first}")


def _ask(*command: str) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_ASK_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise KernelsUnavailableError(f"{command[0]} does not run ({error})") from error
    return done.stdout


def _processor() -> str:
    """Model and instruction sets, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    first: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in wanted:
            first.setdefault(name.strip(), value.strip())
    return repr(sorted(first.items()))


def _source_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in (".cpp", ".h"))
