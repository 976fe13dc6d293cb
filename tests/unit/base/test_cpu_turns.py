"""Short turns on the CPU, as far as this machine's kernel knows them."""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import threading
from collections.abc import Callable

import pytest

from cluster.base import cpu_turns
from cluster.base.cpu_turns import ask_for_short_turns

_Attributes = tuple[int, ...]


def _attributes() -> _Attributes:
    """The calling thread's policy, niceness and slice in nanoseconds."""
    buffer = ctypes.create_string_buffer(56)
    get_attributes = {"x86_64": 315, "aarch64": 275}[platform.machine()]
    assert ctypes.CDLL(None).syscall(get_attributes, 0, buffer, 56, 0) == 0
    fields = struct.unpack("=IIQiIQQQII", buffer.raw)
    return fields[1], fields[3], fields[5]


def _in_thread(work: Callable[[], None]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def test_a_thread_and_those_it_starts_get_short_turns_and_keep_policy_and_niceness() -> None:
    before = _attributes()
    seen: list[_Attributes] = []
    asked: list[bool] = []

    def serve() -> None:
        asked.append(ask_for_short_turns(0.2e-3))
        seen.append(_attributes())
        _in_thread(lambda: seen.append(_attributes()))

    _in_thread(serve)
    assert asked == [before[2] > 0]
    if asked[0]:
        assert seen == [(*before[:2], 200_000)] * 2
    assert _attributes() == before


@pytest.mark.parametrize(("platform_name", "machine"), [("darwin", "arm64"), ("linux", "riscv64")])
def test_elsewhere_nothing_is_asked(
    monkeypatch: pytest.MonkeyPatch, platform_name: str, machine: str
) -> None:
    monkeypatch.setattr(cpu_turns.sys, "platform", platform_name)
    monkeypatch.setattr(cpu_turns.platform, "machine", lambda: machine)
    assert not ask_for_short_turns()


def test_a_kernel_without_own_slices_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _FakeSystem(policy=os.SCHED_OTHER, runtime_ns=0)
    monkeypatch.setattr(cpu_turns.ctypes, "CDLL", lambda *_, **__: calls)
    assert not ask_for_short_turns()
    assert calls.num_calls == 1


def test_a_real_time_thread_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _FakeSystem(policy=os.SCHED_FIFO, runtime_ns=1_400_000)
    monkeypatch.setattr(cpu_turns.ctypes, "CDLL", lambda *_, **__: calls)
    assert not ask_for_short_turns()
    assert calls.num_calls == 1


def test_a_refusal_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _FakeSystem(policy=os.SCHED_OTHER, runtime_ns=1_400_000)
    monkeypatch.setattr(cpu_turns.ctypes, "CDLL", lambda *_, **__: calls)
    assert not ask_for_short_turns()
    assert calls.num_calls == 2


class _FakeSystem:
    """A C library whose kernel tells these attributes and lets nobody change any."""

    def __init__(self, *, policy: int, runtime_ns: int) -> None:
        self._answer = struct.pack("=IIQiIQQQII", 56, policy, 0, 0, 0, runtime_ns, 0, 0, 0, 0)
        self.num_calls = 0

    def syscall(self, number: int, pid: int, buffer: ctypes.Array[ctypes.c_char], *_: int) -> int:
        self.num_calls += 1
        if self.num_calls > 1:
            return -1
        buffer.raw = self._answer
        return 0
