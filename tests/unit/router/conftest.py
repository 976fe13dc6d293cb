"""One tiny checkpoint for all gateway tests."""

from pathlib import Path

import pytest
from gateway_harness import write_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("gateway") / "tiny")
