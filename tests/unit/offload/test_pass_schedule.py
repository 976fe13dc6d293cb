"""Passes over micro-batches are safe for every shape, and the checker catches what is not."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from offload.pass_check import check_pass
from offload.pass_schedule import PassOpKind, build_pass
from offload.schedule_check import ScheduleError


@st.composite
def passes(draw: st.DrawFn) -> tuple[int, tuple[bool, ...], int]:
    joins = (False, *draw(st.lists(st.booleans(), max_size=5)))
    return draw(st.integers(1, 5)), joins, draw(st.integers(0, 4))


@given(passes())
def test_every_pass_is_safe_and_loads_each_layer_once(shape) -> None:
    num_layers, joins, num_windows = shape
    ops = build_pass(*shape)
    check_pass(ops, *shape, window_bytes=8, budget_bytes=8 * num_windows)
    taken = [op.layer for op in ops if op.kind is PassOpKind.TAKE]
    assert taken == list(range(num_layers))
    computed = [(op.layer, op.part) for op in ops if op.kind is PassOpKind.COMPUTE]
    assert computed == [(layer, part) for layer in range(num_layers) for part in range(len(joins))]
    loads = sum(op.kind is PassOpKind.LOAD_KV for op in ops)
    assert loads == (len(computed) if num_windows else 0)
    if num_windows:
        with pytest.raises(ScheduleError, match="exceed"):
            check_pass(ops, *shape, window_bytes=8, budget_bytes=8 * num_windows - 1)


@given(passes(), st.data())
def test_a_damaged_pass_is_refused(shape, data) -> None:
    ops = list(build_pass(*shape))
    at = data.draw(st.integers(0, len(ops) - 1))
    damage = data.draw(st.sampled_from(["drop", "twice", "layer", "part", "window", "earlier"]))
    op = ops[at]
    if damage == "drop":
        del ops[at]
    elif damage == "twice":
        ops.insert(at, op)
    elif damage == "layer":
        ops[at] = dataclasses.replace(op, layer=op.layer + 1)
    elif damage == "part":
        assume(op.part >= 0)
        ops[at] = dataclasses.replace(op, part=op.part + 1)
    elif damage == "window":
        assume(op.window >= 0 and shape[2] > 1)
        ops[at] = dataclasses.replace(op, window=(op.window + 1) % shape[2])
    else:
        assume(op.kind is PassOpKind.COMPUTE and shape[2])
        ops.insert(at - 1, ops.pop(at))
        assume(ops[at].window == op.window)
    with pytest.raises(ScheduleError):
        check_pass(ops, *shape, window_bytes=1, budget_bytes=shape[2])


def test_windows_are_loaded_ahead_across_layers_and_never_before_what_they_need_is_stored() -> None:
    ops = build_pass(2, (False, True, False), 2)
    kinds = [(op.kind, op.layer, op.part) for op in ops]
    load, compute, store = PassOpKind.LOAD_KV, PassOpKind.COMPUTE, PassOpKind.STORE_KV
    # Part 1 goes on with a request of part 0: loaded after its store. Part 2 and the next layer's
    # part 0 are not held up by that.
    assert kinds.index((store, 0, 0)) < kinds.index((load, 0, 1)) < kinds.index((compute, 0, 1))
    assert kinds.index((load, 0, 2)) < kinds.index((compute, 0, 1))
    assert kinds.index((load, 1, 0)) < kinds.index((compute, 0, 2))


def test_what_is_no_pass() -> None:
    for shape in ((0, (False,), 1), (1, (), 1), (1, (False,), -1)):
        with pytest.raises(ValueError, match="no pass"):
            build_pass(*shape)
