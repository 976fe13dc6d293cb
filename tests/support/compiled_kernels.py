"""Compiled kernels for tests: each variant is built once per machine, into the user's cache.

`python -m tests.support.compiled_kernels` builds all of them ahead, so that no test's time limit
has to hold for a compiler; `make test` does that first.
"""

from __future__ import annotations

import dataclasses
import functools
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from cluster.base.env import default_cache_dir
from replicas.kernels.build import (
    BuildPlan,
    KernelsUnavailableError,
    build_library,
    find_compiler,
)
from replicas.kernels.cpu_ops import CpuKernels
from replicas.kernels.loader import CpuLibrary
from replicas.kernels.select import select_kernels

AHEAD_TIMEOUT_S = 1800.0
LEVELS = {"x86-64": "sse2", "x86-64-v3": "avx2", "x86-64-v4": "avx512bw"}
"""Instruction sets that x86-64 processors share, and the flag of a processor that has each."""


def cache() -> Path:
    """Where the libraries are."""
    return default_cache_dir() / "kernels"


@pytest.fixture(scope="session")
def cpu_kernels() -> CpuKernels:
    """The compiled kernels of this machine."""
    kernels = select_kernels("auto", torch.float32, "cpu", cache())
    if not isinstance(kernels, CpuKernels):
        pytest.skip("there are no compiled kernels here: no C++ compiler, or it fails")
    return kernels


@functools.cache
def lesser_library(march: str = "native") -> CpuLibrary:
    """Kernels for less than this processor: without matrix tiles, or for a shared level only.

    Skips the test where this processor has not even that.
    """
    if march != "native" and not has_level(march):
        pytest.skip(f"this processor has no {march}")
    return CpuLibrary(build_library(_plan(march), cache()))


def has_level(march: str) -> bool:
    """Whether this processor runs code for a level of x86-64."""
    is_x86 = platform.machine() == "x86_64"
    return is_x86 and LEVELS[march] in Path("/proc/cpuinfo").read_text()


@contextmanager
def threads(count: int) -> Iterator[None]:
    """That many compute threads inside; one, as everywhere in tests, after it."""
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(1)


def _plan(march: str) -> BuildPlan:
    # The flag is one of x86-64 compilers; code for a level has no tiles anyhow.
    without_tiles = platform.machine() == "x86_64"
    return BuildPlan(compiler=find_compiler(), march=march, without_tiles=without_tiles)


def main() -> int:
    """Build every variant that tests load."""
    try:
        plans = [BuildPlan(compiler=find_compiler()), _plan("native")]
        plans += [_plan(march) for march in LEVELS if has_level(march)]
        for plan in plans:
            build_library(dataclasses.replace(plan, compile_timeout_s=AHEAD_TIMEOUT_S), cache())
    except KernelsUnavailableError as error:
        sys.stderr.write(f"tests go without compiled kernels: {error}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
