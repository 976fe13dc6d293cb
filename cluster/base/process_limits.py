"""Limits of this process that the system sets low and lets it raise."""

from __future__ import annotations

import resource


def raise_open_files() -> int:
    """Allow as many open files as the hard limit does; returns how many.

    The soft limit is often 1,024, for the sake of `select`; every client connection is a file.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard
