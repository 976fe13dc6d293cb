"""What every test shares: one compute thread, repeatable hypothesis, no left-over processes."""

from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import psutil
import pytest

# Before anything imports torch, and inherited by every process a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# GPU kernels are tested on CPU tensors. Triton reads this when a kernel is defined.
os.environ.setdefault("TRITON_INTERPRET", "1")

hypothesis.settings.register_profile("ci", derandomize=True, deadline=None)
hypothesis.settings.register_profile("explore", max_examples=2000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

EXIT_GRACE_S = 10.0
# Helpers of the multiprocessing module: they live as long as the interpreter, by design.
INTERPRETER_HELPERS = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")


def pytest_addoption(parser: pytest.Parser) -> None:
    """How long the tests that go on for a while do."""
    parser.addoption(
        "--soak-s", type=float, default=20.0, help="seconds of random arrivals in soak tests"
    )


@pytest.fixture(scope="session", autouse=True)
def no_process_left_behind() -> Iterator[None]:
    """Fail the run when a process that a test started is still there at its end."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    yield
    children = [
        child
        for child in psutil.Process().children(recursive=True)
        if child.pid not in before and not _is_interpreter_helper(child)
    ]
    _, alive = psutil.wait_procs(children, timeout=EXIT_GRACE_S)
    left = [f"{child.pid}: {' '.join(child.cmdline())}" for child in alive if child.is_running()]
    assert not left, "processes left behind by tests:\n" + "\n".join(left)


def _is_interpreter_helper(process: psutil.Process) -> bool:
    try:
        command = " ".join(process.cmdline())
    except psutil.Error:
        return False
    return any(helper in command for helper in INTERPRETER_HELPERS)
