"""Engines that take turns, and the rows that come of it.

A B A B: a machine that drifts hits all of them. The first round warms everybody and does not count.
An engine that fails keeps its row, with the reason in the place of the number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from bench.idle import wait_until_idle
from bench.peers.protocol import Engine, PeerError
from bench.report import Row, Samples, compared, measured, not_measured

Opened = TypeVar("Opened")
Sample = TypeVar("Sample")


@dataclass(slots=True, kw_only=True)
class Contender(Generic[Opened]):
    """One engine in one comparison: open, or the reason why it is not."""

    name: str
    opened: Opened | None
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns(Generic[Sample]):
    """What each engine did in each round that counts, ours first."""

    samples: Mapping[str, Sequence[Sample]]
    reasons: Mapping[str, str] = field(default_factory=dict)
    """Why an engine has no samples."""

    def rows(
        self,
        case: str,
        metric: tuple[str, str],
        read: Callable[[Sample], float],
        target: float | None,
    ) -> list[Row]:
        """One row against each of the others.

        Args:
            metric: its name and its unit; of milliseconds less is better.
        """
        ours, *others = self.samples
        row = measured(case, *metric, _values(self.samples[ours], read))
        if not others:
            return [row]
        return [self._row(row, other, read, target) for other in others]

    def _row(
        self, row: Row, other: str, read: Callable[[Sample], float], target: float | None
    ) -> Row:
        if reason := self.reasons.get(other):
            return not_measured(row, other, reason, target=target)
        theirs = _values(self.samples[other], read)
        return compared(row, other, theirs, target=target, lower_is_better=row.unit == "ms")


def open_all(
    engines: Sequence[Engine],
    *,
    online: bool,
    opening: Callable[[Engine], AbstractContextManager[Opened]],
    stack: ExitStack,
) -> list[Contender[Opened]]:
    """Every engine that can be opened here; the others with their reason.

    Raises:
        PeerError: the first engine, ours, does not open.
    """
    contenders: list[Contender[Opened]] = []
    for engine in engines:
        if reason := engine.why_not(online=online):
            contenders.append(Contender(name=engine.name, opened=None, reason=reason))
            continue
        print(f"  starting {engine.name} ...", flush=True)
        try:
            opened = stack.enter_context(opening(engine))
            contenders.append(Contender(name=engine.name, opened=opened))
        except PeerError as error:
            if not contenders:
                raise
            print(f"  {engine.name} does not run: {error}", flush=True)
            contenders.append(Contender(name=engine.name, opened=None, reason=str(error)))
    return contenders


def take_turns(
    contenders: Sequence[Contender[Opened]],
    run: Callable[[Opened, int], Sample],
    show: Callable[[Sample], str],
    repeats: int,
    settle: Callable[[], object] = wait_until_idle,
) -> Turns[Sample]:
    """`repeats` rounds after one that warms up; `run` gets the engine and the round's number.

    Args:
        settle: called before each turn: nobody is measured beside another's idle threads.

    Raises:
        PeerError: the first engine, ours, failed.
    """
    samples: dict[str, list[Sample]] = {contender.name: [] for contender in contenders}
    reasons = {contender.name: contender.reason for contender in contenders if contender.reason}
    for round_number in range(repeats + 1):
        for name, opened in _running(contenders, reasons):
            settle()
            try:
                sample = run(opened, round_number)
            except PeerError as error:
                if name == contenders[0].name:
                    raise
                reasons[name] = str(error)
                continue
            print(f"  round {round_number} of {repeats}, {name}: {show(sample)}", flush=True)
            if round_number:
                samples[name].append(sample)
    return Turns(samples=samples, reasons=reasons)


def _running(
    contenders: Sequence[Contender[Opened]], reasons: Mapping[str, str]
) -> Iterator[tuple[str, Opened]]:
    for contender in contenders:
        if contender.opened is not None and contender.name not in reasons:
            yield contender.name, contender.opened


def _values(samples: Sequence[Sample], read: Callable[[Sample], float]) -> Samples:
    return Samples(values=tuple(read(sample) for sample in samples))
