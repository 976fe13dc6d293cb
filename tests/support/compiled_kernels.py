"""Compiled kernels for tests, built once per machine into the user's cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from cluster.base.env import default_cache_dir
from replicas.kernels.cpu_ops import CpuKernels
from replicas.kernels.select import select_kernels


@pytest.fixture(scope="session")
def cpu_kernels() -> CpuKernels:
    """The compiled kernels of this machine."""
    kernels = select_kernels("auto", torch.float32, "cpu", default_cache_dir() / "kernels")
    if not isinstance(kernels, CpuKernels):
        pytest.skip("there are no compiled kernels here: no C++ compiler, or it fails")
    return kernels


@contextmanager
def threads(count: int) -> Iterator[None]:
    """That many compute threads inside; one, as everywhere in tests, after it."""
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(1)
