"""How soon a thread that wakes gets its turn on a CPU that another thread is using.

Linux (EEVDF, from 6.12 on) lets a thread that asks for short slices in at once where one with
longer slices runs; else it waits for the rest of that slice, milliseconds long. It gets no larger
share of the CPU for that, and no privilege is needed.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import struct
import sys

log = logging.getLogger(__name__)

SHORTEST_TURN_S = 0.1e-3
"""The kernel's own bound for what a thread may ask."""

# size, policy, flags, nice, priority, runtime, deadline, period, least and most utilisation: struct
# sched_attr of sched_setattr(2). Of ordinary threads the runtime is the slice, in nanoseconds.
_ATTRIBUTES = struct.Struct("=IIQiIQQQII")
_POLICY, _RUNTIME = 1, 5
_ORDINARY = (os.SCHED_OTHER, os.SCHED_BATCH) if sys.platform == "linux" else ()
_CALLS = {"x86_64": (314, 315), "aarch64": (274, 275)}
"""Numbers of sched_setattr and sched_getattr by machine; the C library has no names for them."""


def ask_for_short_turns(turn_s: float = SHORTEST_TURN_S) -> bool:
    """Ask for slices of this length for the calling thread.

    For threads that others wait for and that have little to do each time they wake. Policy and
    niceness stay as they are; a thread of a real-time policy is left alone.

    Args:
        turn_s: seconds.

    Returns:
        Whether the kernel will go by it; otherwise nothing has changed.
    """
    if sys.platform != "linux" or platform.machine() not in _CALLS:
        return False
    set_attributes, get_attributes = _CALLS[platform.machine()]
    system = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(_ATTRIBUTES.size)
    if system.syscall(get_attributes, 0, buffer, _ATTRIBUTES.size, 0):
        log.debug("sched_getattr: %s", os.strerror(ctypes.get_errno()))
        return False
    fields = list(_ATTRIBUTES.unpack(buffer.raw))
    # A kernel that has slices of one's own says which one this thread has.
    if fields[_POLICY] not in _ORDINARY or not fields[_RUNTIME]:
        return False
    fields[_RUNTIME] = round(turn_s * 1e9)
    buffer.raw = _ATTRIBUTES.pack(*fields)
    if system.syscall(set_attributes, 0, buffer, 0):
        log.debug("sched_setattr: %s", os.strerror(ctypes.get_errno()))
        return False
    return True
