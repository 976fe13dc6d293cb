"""The process of one group: runs its cases and writes a line of JSON about each to a file.

A case that fails, or takes too long, is one line that says so; the next one goes on. What kills
the process costs the rest of its group and no other.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from bench.gpu.cases import Case, Facts, Lab, Setting
from replicas.worker.device import open_device, release_cached_memory

_PATIENCE = 3.0
"""A case may take so many times as long as expected, and no longer."""
_SHORTEST_LIMIT_S = 30.0


def run_cases(
    cases: Sequence[Case], setting: Setting, facts: Facts, file: Path, budget_s: float
) -> None:
    """Run them in order; those that would not fit into what is left of the budget are named.

    Args:
        file: takes the lines; what lies beside it is gone at the end of the run.
    """
    deadline_s = time.monotonic() + budget_s
    with file.open("a", encoding="utf-8") as lines:

        def write(**line: Any) -> None:
            lines.write(json.dumps(line) + "\n")
            lines.flush()

        device = open_device(setting.device, 0)
        lab = Lab(setting=setting, device=device, facts=dict(facts), scratch=file.parent)
        for case in cases:
            left_s = deadline_s - time.monotonic()
            if case.about_s > left_s and not setting.is_tiny:
                why = f"needs about {case.about_s:.0f} s, {max(0.0, left_s):.0f} s are left"
                write(case=case.name, skipped=why)
                continue
            write(case=case.name, begun=True)
            _run_case(case, lab, left_s, write)


def _run_case(case: Case, lab: Lab, left_s: float, write: Callable[..., None]) -> None:
    started_s = time.monotonic()
    limit_s = max(_SHORTEST_LIMIT_S, min(left_s, _PATIENCE * case.about_s))
    rows: list[dict[str, Any]] = []
    error = ""
    signal.signal(signal.SIGALRM, _out_of_time)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        # One by one: what was measured before an error is kept.
        rows.extend(dataclasses.asdict(row) for row in case.run(lab))
    except Exception:
        error = traceback.format_exc(limit=-8)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
    if error:
        # Frames of the failed case may hold gigabytes.
        lab.held.clear()
        gc.collect()
        release_cached_memory(lab.device)
    took_s = round(time.monotonic() - started_s, 1)
    write(case=case.name, rows=rows, facts=lab.facts, error=error, took_s=took_s)


def _out_of_time(number: int, frame: FrameType | None) -> None:
    raise TimeoutError("the case took too long")
