"""Tiny checkpoints, written once for the whole package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support.compiled_kernels import cpu_kernels
from tests.support.tiny_models import write_checkpoint

__all__ = ["cpu_kernels"]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Directory of a variant's checkpoint, by name."""
    root = tmp_path_factory.mktemp("checkpoints")

    def directory(name: str) -> Path:
        path = root / name
        return path if path.exists() else write_checkpoint(name, path)

    return directory
