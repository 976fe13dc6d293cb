"""Compiled kernels for tests, built once per machine into the user's cache."""

from __future__ import annotations

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
