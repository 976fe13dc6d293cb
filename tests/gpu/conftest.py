"""Tests on a real GPU; `pytest -m gpu` runs them alone. Elsewhere they say why they do not run."""

from __future__ import annotations

import os

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "gpu":
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
            elif os.environ.get("TRITON_INTERPRET") == "1":
                reason = "needs compiled kernels: run it with TRITON_INTERPRET=0"
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def cuda() -> torch.device:
    """The device, ready."""
    from replicas.worker.device import open_device

    return open_device("cuda", 0)
