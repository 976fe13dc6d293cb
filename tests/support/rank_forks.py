"""Where tests start rank processes: forks of one server that has loaded torch and our ranks once.

A process that imports torch and transformers anew takes seconds of a core, a fork milliseconds. The
server imports these modules and runs nothing of them, so a rank begins as clean as in a fresh
interpreter.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

# The first use starts the server; later ones find it as it is, so all ask for the same.
_PRELOAD = [
    "replicas.worker.worker",
    "tests.support.exchange_ranks",
    "tests.support.lockstep_ranks",
    "tests.support.rank_processes",
    "tests.support.rank_scenarios",
]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(_PRELOAD)


def start_rank(
    target: Callable[..., None], *arguments: Any, log: Path | None = None
) -> ForkServerProcess:
    """Begin a process that ends with this one.

    Args:
        target: a function of a module.
        log: where what it prints goes; None: where this process prints.
    """
    process = CONTEXT.Process(target=_run, args=(target, arguments, log), daemon=True)
    process.start()
    return process


def _run(target: Callable[..., None], arguments: tuple[Any, ...], log: Path | None) -> None:
    if log is not None:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(file, stream)
    target(*arguments)
