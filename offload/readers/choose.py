"""Which reader a rank uses: each one that works is measured on the store itself, under a deadline.

Going without the best one is never an error; the log says which was chosen and why not the others.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from cluster.base.errors import ConfigError, PenstockError
from offload.layout import PAGE_BYTES
from offload.readers.aio import AioEngine
from offload.readers.buffered import BufferedEngine
from offload.readers.direct import DirectEngine
from offload.readers.engine import ReadEngine, ReaderUnavailableError

READERS = ("aio", "direct", "buffered")
"""In the order of preference: by the processor time that they take."""
PROBE_TIMEOUT_S = 10.0
_PROBE_BYTES = 128 * 2**20
_PROBE_PIECE_BYTES = 16 * 2**20
# A preferred reader may be this much slower than the fastest: its threads leave cores to compute.
_GOOD_ENOUGH = 0.8
_log = logging.getLogger(__name__)

OpenEngine = Callable[[int], ReadEngine]
"""Number of slots -> engine."""


def openers(path: Path, cache_dir: Path) -> Mapping[str, OpenEngine]:
    """How each reader of `READERS` is opened on the store at `path`."""
    return {
        "aio": lambda num_slots: AioEngine(path, num_slots, cache_dir),
        "direct": lambda num_slots: DirectEngine(path, num_slots, cache_dir / "kernels"),
        "buffered": lambda num_slots: BufferedEngine(path, num_slots),
    }


def choose_reader(
    requested: str,
    path: Path,
    engines: Mapping[str, OpenEngine],
    *,
    timeout_s: float = PROBE_TIMEOUT_S,
) -> str:
    """The name of the reader to use.

    Args:
        requested: `auto`, or a name of `READERS`, which is then taken if it works.
        timeout_s: for all measurements together.

    Raises:
        ConfigError: an unknown name, or the one asked for does not work here.
    """
    if requested not in ("auto", *READERS):
        raise ConfigError(
            f"There is no reader {requested!r}.",
            f"Use auto or one of {', '.join(READERS)}.",
            param="reader",
        )
    deadline_s = time.monotonic() + timeout_s
    rates: dict[str, float] = {}
    reasons: dict[str, str] = {}
    for name in READERS if requested == "auto" else (requested,):
        left_s = deadline_s - time.monotonic()
        # The page cache would win a race that it has run before; it is for who has nothing else.
        if name == "buffered" and rates and requested == "auto":
            break
        try:
            rates[name] = _measure_within(engines[name], path, left_s)
        except (ReaderUnavailableError, PenstockError) as error:
            reasons[name] = str(error)
    without = "; ".join(f"not {name}: {reason}" for name, reason in reasons.items())
    if not rates:
        raise ConfigError(f"The packed weights cannot be read: {without}.", param="reader")
    best = max(rates.values())
    chosen = next(name for name, rate in rates.items() if rate >= _GOOD_ENOUGH * best)
    measured = ", ".join(f"{name} {rate / 1e9:.2f} GB/s" for name, rate in rates.items())
    _log.info("weights are read by %s (%s)%s", chosen, measured, f"; {without}" if without else "")
    return chosen


def measure(engine: ReadEngine, path: Path, clock: Callable[[], float] = time.monotonic) -> float:
    """Bytes per second of two reads in flight, spread over the file; warms up first.

    Spread, because what was read a moment ago comes faster from a cache below the disk.

    Raises:
        WeightStreamError: a read failed.
        ReaderUnavailableError: the engine has no memory to give.
    """
    piece = min(_PROBE_PIECE_BYTES, path.stat().st_size // PAGE_BYTES * PAGE_BYTES)
    size = path.stat().st_size
    count = max(1, min(_PROBE_BYTES, size) // piece)
    stride = (size - piece) // count // PAGE_BYTES * PAGE_BYTES
    memory = engine.allocate(2 * piece)
    buffers = [memory[:piece], memory[piece:]]
    engine.submit(0, buffers[0], 0)
    engine.wait(0, PROBE_TIMEOUT_S)
    started_s = clock()
    for index in range(count):
        engine.submit(index % 2, buffers[index % 2], (count - index) * stride)
        if index:
            engine.wait((index - 1) % 2, PROBE_TIMEOUT_S)
    engine.wait((count - 1) % 2, PROBE_TIMEOUT_S)
    return count * piece / max(1e-9, clock() - started_s)


def _measure_within(open_engine: OpenEngine, path: Path, timeout_s: float) -> float:
    """`measure` on a thread of its own: a disk that hangs costs the deadline and no more."""
    outcome: list[float | Exception] = []

    def work() -> None:
        try:
            engine = open_engine(2)
            try:
                outcome.append(measure(engine, path))
            finally:
                engine.close()
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=work, name="reader-probe", daemon=True)
    thread.start()
    thread.join(max(0.0, timeout_s))
    if not outcome:
        raise ReaderUnavailableError(f"it gave no answer within {timeout_s:.1f} s")
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]
