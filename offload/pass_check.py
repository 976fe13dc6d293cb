"""Proves a pass safe by running it on layers and windows that only remember. Pure.

Checked: every layer is taken once and given back, every micro-batch computes every layer once and
in order, nothing computes without its layer or its window, no window is loaded over what it holds,
what was written is stored before a micro-batch loads it, and the windows fit the budget.
"""

from __future__ import annotations

from collections.abc import Sequence

from offload.pass_schedule import PassOp, PassOpKind
from offload.schedule_check import ScheduleError


def check_pass(
    ops: Sequence[PassOp],
    num_layers: int,
    joins: Sequence[bool],
    num_windows: int,
    *,
    window_bytes: int = 0,
    budget_bytes: int = 0,
) -> None:
    """Raise `ScheduleError` unless the operations are a safe and complete pass.

    Args:
        joins, num_windows: as in `build_pass`.
        window_bytes: what one window takes.
        budget_bytes: what the windows may take together.
    """
    if num_windows * window_bytes > budget_bytes:
        raise ScheduleError(
            f"{num_windows} windows of {window_bytes} bytes exceed {budget_bytes} bytes"
        )
    state = _Pass(num_layers, joins, num_windows)
    for op in ops:
        state.apply(op)
    state.end()


class _Pass:
    def __init__(self, num_layers: int, joins: Sequence[bool], num_windows: int) -> None:
        self._num_layers = num_layers
        self._joins = joins
        self._windows: list[tuple[int, int] | None] = [None] * num_windows
        self._taken: int | None = None
        self._num_taken = 0
        self._computed: set[tuple[int, int]] = set()
        self._stored: set[tuple[int, int]] = set()

    def apply(self, op: PassOp) -> None:
        match op.kind:
            case PassOpKind.TAKE:
                self._take(op)
            case PassOpKind.LOAD_KV:
                self._load(op)
            case PassOpKind.COMPUTE:
                self._compute(op)
            case PassOpKind.STORE_KV:
                self._store(op)
            case PassOpKind.GIVE:
                self._give(op)

    def end(self) -> None:
        if self._taken is not None or self._num_taken != self._num_layers:
            raise ScheduleError(f"{self._num_taken} of {self._num_layers} layers are done")
        if any(held is not None for held in self._windows):
            raise ScheduleError("a window still holds what was not stored")

    def _take(self, op: PassOp) -> None:
        if self._taken is not None:
            raise ScheduleError(f"{op}: layer {self._taken} is still taken")
        if op.layer != self._num_taken or op.layer >= self._num_layers:
            raise ScheduleError(f"{op}: layer {self._num_taken} comes next")
        self._taken = op.layer
        self._num_taken += 1

    def _give(self, op: PassOp) -> None:
        if self._taken != op.layer:
            raise ScheduleError(f"{op}: layer {self._taken} is taken")
        missing = [p for p in range(len(self._joins)) if (op.layer, p) not in self._computed]
        if missing:
            raise ScheduleError(f"{op}: micro-batches {missing} have not computed it")
        self._taken = None

    def _load(self, op: PassOp) -> None:
        self._check_part(op)
        self._check_window(op, None)
        before = (op.layer, op.part - 1)
        if self._joins[op.part] and before not in self._stored:
            raise ScheduleError(f"{op}: what {before} writes is not stored yet")
        if (op.layer, op.part) in self._computed:
            raise ScheduleError(f"{op}: it has computed already")
        self._windows[op.window] = (op.layer, op.part)

    def _compute(self, op: PassOp) -> None:
        turn = (op.layer, op.part)
        self._check_part(op)
        if self._taken != op.layer:
            raise ScheduleError(f"{op}: layer {self._taken} is taken")
        if turn in self._computed:
            raise ScheduleError(f"{op}: computed twice")
        if op.layer and (op.layer - 1, op.part) not in self._computed:
            raise ScheduleError(f"{op}: its input is not computed")
        if self._joins[op.part] and (op.layer, op.part - 1) not in self._computed:
            raise ScheduleError(f"{op}: the request's earlier rows are not computed")
        if self._windows:
            self._check_window(op, turn)
        self._computed.add(turn)

    def _store(self, op: PassOp) -> None:
        turn = (op.layer, op.part)
        self._check_part(op)
        self._check_window(op, turn)
        if turn not in self._computed:
            raise ScheduleError(f"{op}: nothing was written")
        self._windows[op.window] = None
        self._stored.add(turn)

    def _check_part(self, op: PassOp) -> None:
        if not (0 <= op.part < len(self._joins) and 0 <= op.layer < self._num_layers):
            raise ScheduleError(f"{op}: there is no such micro-batch or layer")

    def _check_window(self, op: PassOp, held: tuple[int, int] | None) -> None:
        if not 0 <= op.window < len(self._windows):
            raise ScheduleError(f"{op}: there is no such window")
        if self._windows[op.window] != held:
            raise ScheduleError(f"{op}: the window holds {self._windows[op.window]}")
