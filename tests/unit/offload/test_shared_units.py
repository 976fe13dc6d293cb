"""Replicas of a node have one copy of the layers that stay; the kernel counts who uses it."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cluster.base.errors import CorruptWeightsError, WeightStreamError
from offload.layout import PackedTensor, Store, StoredUnit, read_store
from offload.shared_units import SharedUnits
from offload.store_writer import StoreWriter
from replicas.api import GenerationRequest, SamplingParams
from tests.support.offload_engine import offload_engine, offload_plan, unit_names
from tests.support.tiny_models import (
    prompt_tokens,
    reference_greedy,
    tiny_model,
    write_checkpoint,
)

MIB = 2**20
UNITS = ("a", "b", "c")
CHILD = """
import sys
from pathlib import Path
from offload.layout import read_store
from offload.shared_units import SharedUnits
store = read_store(Path(sys.argv[1]))
units = SharedUnits(store, ("a", "b", "c"), 20.0)
print(sum(units[name]["w"].double().sum().item() for name in units), flush=True)
for _ in sys.stdin:
    print(sum(units[name]["w"].double().sum().item() for name in units), flush=True)
"""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Three records of 4 MiB."""
    generator = np.random.default_rng(5)
    target = tmp_path / "x.weights"
    with StoreWriter(target) as writer:
        stored = []
        for number, name in enumerate(UNITS):
            writer.begin()
            values = generator.standard_normal(MIB).astype(np.float32)
            offset = writer.add(memoryview(values).cast("B"))
            writer.finish()
            entry = PackedTensor(
                name="w", dtype="float32", shape=(MIB,), offset=offset, num_bytes=4 * MIB
            )
            stored.append(StoredUnit(name=name, record=number, tensors=(entry,)))
        writer.commit(
            Store(
                path=target,
                fingerprint="f",
                model="m",
                records=writer.records,
                units=tuple(stored),
            )
        )
    return read_store(target)


def mapped_kib(pid: int, path: Path) -> dict[str, int]:
    """Rss and Pss (its share of pages that others map too) of a process's mappings of a file."""
    sums = {"Rss": 0, "Pss": 0}
    is_ours = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):  # locked pages are mappings of their own
            is_ours = line.endswith(str(path))
        elif is_ours and (found := re.match(r"(Rss|Pss): +(\d+) kB", line)):
            sums[found[1]] += int(found[2])
    return sums


def test_two_processes_have_one_copy_and_the_death_of_one_is_nothing_to_the_other(
    store: Store,
) -> None:
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, str(store.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    sums = [child.stdout.readline() for child in children]
    size_kib = store.total_bytes // 1024
    both = [mapped_kib(child.pid, store.path) for child in children]
    assert all(mapped["Rss"] >= size_kib for mapped in both)
    assert sum(mapped["Pss"] for mapped in both) <= 1.02 * both[0]["Rss"]
    children[0].send_signal(signal.SIGKILL)
    children[0].wait(10)
    children[1].stdin.write("again\n")
    children[1].stdin.flush()
    assert children[1].stdout.readline() == sums[1] == sums[0]
    assert mapped_kib(children[1].pid, store.path)["Pss"] >= 0.98 * size_kib
    children[1].stdin.close()
    assert children[1].wait(10) == 0
    assert [path.name for path in store.path.parent.iterdir()] == [store.path.name]


def test_a_spoilt_record_is_found_when_it_is_looked_up(store: Store) -> None:
    data = bytearray(store.path.read_bytes())
    data[store.record_of("b").offset + 70_000] ^= 1
    store.path.write_bytes(data)
    units = SharedUnits(store, UNITS, 20.0)
    assert units["a"]["w"].shape == (MIB,)
    with pytest.raises(CorruptWeightsError, match="not what was packed"):
        units["b"]
    with pytest.raises(KeyError):
        units["d"]
    units.close()
    units.close()


def test_a_file_that_is_gone_is_a_coded_error(store: Store) -> None:
    store.path.unlink()
    with pytest.raises(WeightStreamError, match="cannot be mapped"):
        SharedUnits(store, UNITS, 20.0)


@pytest.mark.parametrize("resident", [("embed", "layer.1"), "all"])
def test_engines_over_shared_units_give_the_tokens_of_transformers(
    tmp_path: Path, resident: object
) -> None:
    path = write_checkpoint("qwen3", tmp_path / "model")
    names = tuple(unit_names(path)) if resident == "all" else resident
    plan = offload_plan(tmp_path / "disk", resident_units=names, share_resident=True)
    engines = [offload_engine(path, plan) for _ in range(2)]
    prompt = prompt_tokens(23)
    request = GenerationRequest(
        request_id="r",
        prompt_token_ids=tuple(prompt),
        params=SamplingParams(temperature=0.0, max_tokens=10),
    )
    expected = reference_greedy(tiny_model("qwen3"), prompt, 10)
    for engine in engines:
        assert engine.generate([request])[0].token_ids == expected
