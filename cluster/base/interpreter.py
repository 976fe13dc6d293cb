"""Settings of processes that many requests pass through: interpreter, turns on the CPU."""

from __future__ import annotations

import gc
import sys

from cluster.base.cpu_turns import ask_for_short_turns

_SWITCH_INTERVAL_S = 0.5e-3


def settle_for_serving() -> None:
    """To be called once a process has loaded what it serves with, by the thread that serves.

    What is there now stays: the garbage collector need not walk it again, which would hold up every
    stream. And a thread that wants to run gets its turn within half a millisecond, not five: a
    step of a small model takes one. On the CPU the calling thread, and those that it starts from
    now on, are let in soon when they wake: what each of them does is short and waited for.
    """
    gc.collect()
    gc.freeze()
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    ask_for_short_turns()
