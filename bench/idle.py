"""Waits until the machine is quiet: an engine that has just been measured may spin on for a while.

Compute threads of some runtimes poll for new work after a batch has ended, on the cores that the
next engine is about to be measured on.
"""

from __future__ import annotations

import time

import psutil

BUSY_CORES = 0.2
_SLICE_S = 0.25
_PATIENCE_S = 20.0


def wait_until_idle(patience_s: float = _PATIENCE_S) -> float:
    """Return when all processes together use less than a fifth of a core, or patience has run out.

    Returns:
        Cores in use at the end.
    """
    deadline_s = time.monotonic() + patience_s
    while True:
        cores = float(psutil.cpu_percent(_SLICE_S)) / 100 * (psutil.cpu_count() or 1)
        if cores < BUSY_CORES or time.monotonic() > deadline_s:
            return cores
