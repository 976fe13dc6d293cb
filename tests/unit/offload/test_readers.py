"""Every reader keeps the same promises; the choice among them never hangs and is said."""

from __future__ import annotations

import logging
import os
import threading
import time
from pathlib import Path

import pytest
import torch

from cluster.base.env import default_cache_dir
from cluster.base.errors import ConfigError, InternalError, WeightStreamError
from offload.host_memory import allocate_block, container_limit_bytes
from offload.readers import aio_build, buffered, choose
from offload.readers.buffered import BufferedEngine
from offload.readers.choose import READERS, choose_reader, measure, openers
from offload.readers.engine import ReadEngine, ReaderUnavailableError, ReadTimeoutError

SIZE = 5 * 2**20
PAGE = 4096


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "store.weights"
    path.write_bytes(os.urandom(SIZE))
    return path


@pytest.fixture(params=READERS)
def engine(request: pytest.FixtureRequest, file: Path):
    try:
        opened = openers(file, default_cache_dir())[request.param](3)
    except ReaderUnavailableError as error:
        pytest.skip(f"the reader {request.param} cannot be used here: {error}")
    yield opened
    opened.close()


def slots_of(engine: ReadEngine, size: int) -> list[torch.Tensor]:
    memory = engine.allocate(3 * size)
    assert memory.data_ptr() % PAGE == 0
    assert memory.dtype is torch.uint8
    return [memory[at * size : (at + 1) * size] for at in range(3)]


def test_reads_arrive_in_their_slots(engine: ReadEngine, file: Path) -> None:
    expected = file.read_bytes()
    size = 384 * 1024
    slots = slots_of(engine, size)
    offsets = [(7 * index * PAGE) % (SIZE - size) for index in range(40)]
    for index, offset in enumerate(offsets):
        engine.submit(index % 3, slots[index % 3][: size - (index % 5) * PAGE], offset)
        if index >= 2:
            check(engine, slots, offsets, index - 2, size, expected)
    check(engine, slots, offsets, len(offsets) - 2, size, expected)
    check(engine, slots, offsets, len(offsets) - 1, size, expected)


def check(engine, slots, offsets, index, size, expected) -> None:
    engine.wait(index % 3, 10.0)
    length = size - (index % 5) * PAGE
    got = bytes(slots[index % 3][:length].numpy().data)
    assert got == expected[offsets[index] : offsets[index] + length]


@pytest.mark.parametrize("name", READERS)
def test_an_expert_cache_has_more_slots_than_reads_are_under_way(name: str, file: Path) -> None:
    """A handle for each of hundreds of slots would be threads and kernel contexts for nothing."""
    try:
        engine = openers(file, default_cache_dir())[name](80)
    except ReaderUnavailableError as error:
        pytest.skip(f"the reader {name} cannot be used here: {error}")
    memory, expected = engine.allocate(80 * PAGE), file.read_bytes()
    for turn in (0, 80):
        for slot in range(80):
            engine.submit(slot, memory[slot * PAGE : (slot + 1) * PAGE], (turn + slot) * PAGE)
        for slot in reversed(range(80)):
            engine.wait(slot, 10.0)
        assert bytes(memory.numpy().data) == expected[turn * PAGE : (turn + 80) * PAGE]
    engine.close()


def test_waiting_twice_is_harmless_and_closing_drains(engine: ReadEngine) -> None:
    slots = slots_of(engine, 2**20)
    engine.submit(0, slots[0], 0)
    engine.wait(0, 10.0)
    engine.wait(0, 10.0)
    for slot, memory in enumerate(slots):
        engine.submit(slot, memory, slot * 2**20)
    engine.close()
    engine.close()


def test_a_file_that_became_shorter_is_an_error(engine: ReadEngine, file: Path) -> None:
    slots = slots_of(engine, 2**20)
    os.truncate(file, SIZE - 2**20)

    def read() -> None:
        engine.submit(0, slots[0], SIZE - 2**20)
        engine.wait(0, 10.0)

    with pytest.raises(WeightStreamError):
        read()


def test_memory_is_exact_aligned_and_zero() -> None:
    block = allocate_block(3 * PAGE)
    assert block.memory.numel() == 3 * PAGE
    assert not block.memory.any()
    big = allocate_block(5 * 2**20)
    assert big.memory.data_ptr() % 2**21 == 0
    assert not big.memory.any()


@pytest.mark.parametrize(
    ("name", "text", "limit"),
    [
        ("memory.max", "max\n", None),
        ("memory.max", "1048576\n", 2**20),
        ("memory.limit_in_bytes", "9223372036854771712\n", None),
        ("memory.limit_in_bytes", "2097152\n", 2**21),
    ],
)
def test_container_limits_of_both_versions(tmp_path, name, text, limit) -> None:
    (tmp_path / name).write_text(text)
    assert container_limit_bytes(tmp_path) == limit
    assert container_limit_bytes(tmp_path / "nothing") is None


class StuckEngine:
    """A disk that never answers."""

    name = "stuck"

    def __init__(self, release: threading.Event) -> None:
        self._release = release

    def allocate(self, num_bytes: int) -> torch.Tensor:
        return allocate_block(num_bytes).memory

    def submit(self, slot: int, buffer: torch.Tensor, offset: int) -> None:
        return

    def wait(self, slot: int, timeout_s: float) -> None:
        self._release.wait(30.0)

    def close(self) -> None:
        return


def test_a_reader_that_hangs_costs_the_deadline(file: Path, caplog) -> None:
    release = threading.Event()
    engines = dict(openers(file, default_cache_dir())) | {
        "aio": lambda num_slots: StuckEngine(release),
        "direct": lambda num_slots: StuckEngine(release),
    }
    started_s = time.monotonic()
    with caplog.at_level(logging.INFO), pytest.raises(ConfigError, match="gave no answer"):
        choose_reader("aio", file, engines, timeout_s=0.3)
    assert time.monotonic() - started_s < 5.0
    release.set()


def test_what_is_missing_is_said_and_the_next_one_taken(file: Path, caplog) -> None:
    def missing(num_slots: int) -> ReadEngine:
        raise ReaderUnavailableError("it is not built")

    engines = dict(openers(file, default_cache_dir())) | {"aio": missing, "direct": missing}
    with caplog.at_level(logging.INFO):
        assert choose_reader("auto", file, engines) == "buffered"
    assert "not aio: it is not built; not direct: it is not built" in caplog.text
    with pytest.raises(ConfigError, match="it is not built"):
        choose_reader("direct", file, engines)
    with pytest.raises(ConfigError, match="no reader 'mmap'"):
        choose_reader("mmap", file, engines)


def test_a_preferred_reader_wins_unless_it_is_much_slower(file: Path, monkeypatch) -> None:
    engines = dict.fromkeys(READERS, lambda num_slots: StuckEngine(threading.Event()))
    rates = iter([85.0, 100.0, 70.0, 100.0])
    monkeypatch.setattr(choose, "measure", lambda engine, path: next(rates))
    assert choose_reader("auto", file, engines) == "aio"
    assert choose_reader("auto", file, engines) == "direct"


def test_measuring_counts_bytes_and_time(file: Path) -> None:
    engine = openers(file, default_cache_dir())["buffered"](2)
    ticks = iter([0.0, 2.0])
    assert measure(engine, file, lambda: next(ticks)) == SIZE / 2.0
    engine.close()


def test_a_slot_takes_one_read_at_a_time(file: Path) -> None:
    engine = openers(file, default_cache_dir())["buffered"](1)
    gate = threading.Event()
    engine._thread.submit(gate.wait, 10.0)
    memory = engine.allocate(PAGE)
    engine.submit(0, memory, 0)
    with pytest.raises(ReadTimeoutError):
        engine.wait(0, 0.01)
    with pytest.raises(InternalError, match="still being read"):
        engine.submit(0, memory, 0)
    gate.set()
    engine.wait(0, 10.0)
    engine.close()


def test_asynchronous_io_is_never_built_while_serving(tmp_path: Path) -> None:
    with pytest.raises(ReaderUnavailableError, match="make ops"):
        aio_build.find_ops(tmp_path)
    assert not list(tmp_path.iterdir())


def test_closing_does_not_wait_for_a_disk_that_hangs(file: Path, monkeypatch) -> None:
    let_go = threading.Event()
    monkeypatch.setattr(buffered, "_CLOSE_TIMEOUT_S", 0.05)
    monkeypatch.setattr(BufferedEngine, "_read", lambda *_: let_go.wait(20))
    engine = BufferedEngine(file, 1)
    engine.submit(0, engine.allocate(4096), 0)
    started_s = time.monotonic()
    engine.close()
    assert time.monotonic() - started_s < 5
    let_go.set()
