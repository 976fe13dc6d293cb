"""Packed stores: what comes out is what went in, and a store is whole or not there."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import zlib
from pathlib import Path

import pytest
import torch

from cluster.base.errors import ConfigError, CorruptWeightsError
from cluster.dist.communicator import SingleRank
from offload import pack
from offload.layout import GUARD_BYTES, GUARD_STRIDE, PAGE_BYTES, Store, read_store
from offload.pack import StoreRequest, ensure_store
from offload.pack_model import pack_model
from offload.packers import NativePacker
from offload.record_sizes import record_bytes
from replicas.kernels.torch_ops import TORCH_KERNELS
from replicas.models.checkpoint import load_weights
from replicas.models.hf_config import arch_from_hf
from replicas.models.registry import build_model
from replicas.models.weight_units import weight_units
from tests.support.encoded_checkpoints import write_mxfp4
from tests.support.tiny_models import TINY_NAMES, tiny_configs, write_checkpoint

DTYPE = "float32"


def request_of(path: Path, disk: Path, **changes: object) -> StoreRequest:
    arch = arch_from_hf(tiny_configs()[path.name].to_dict())
    fields = {
        "model_path": str(path),
        "units": weight_units(arch, 0, 1),
        "dtype": DTYPE,
        "packer": NativePacker(TORCH_KERNELS, torch.float32),
        "disk_path": str(disk),
    }
    return StoreRequest(**(fields | changes))


def tensors_of(store: Store, name: str) -> dict[str, torch.Tensor]:
    record = store.record_of(name)
    data = store.path.read_bytes()[record.offset : record.offset + record.num_bytes]
    assert zlib.crc32(data) == record.crc32
    ends = [*range(GUARD_STRIDE, record.num_bytes + 1, GUARD_STRIDE), record.num_bytes]
    assert record.guards == b"".join(data[end - GUARD_BYTES : end] for end in ends)
    tensors = {}
    for tensor in store.by_name[name].tensors:
        dtype = getattr(torch, tensor.dtype)
        if tensor.offset < 0:
            tensors[tensor.name] = torch.empty(tensor.shape, dtype=dtype, device="meta")
            continue
        raw = bytearray(data[tensor.offset : tensor.offset + tensor.num_bytes])
        tensors[tensor.name] = torch.frombuffer(raw, dtype=dtype).view(tensor.shape)
    return tensors


@pytest.mark.parametrize("name", TINY_NAMES)
@pytest.mark.parametrize("kernels", ["off", "auto"])
def test_a_store_holds_what_the_loader_loads(name: str, kernels: str, tmp_path: Path) -> None:
    path = write_checkpoint(name, tmp_path / name)
    arch = arch_from_hf(tiny_configs()[name].to_dict())
    model = build_model(
        arch, SingleRank(), dtype=DTYPE, device="cpu", block_size=4, kernels=kernels
    )
    request = request_of(path, tmp_path / "disk", packer=NativePacker(model.kernels, torch.float32))
    seen: list[tuple[int, int]] = []
    store = ensure_store(request, lambda done, total: seen.append((done, total)))
    assert seen[-1][0] <= seen[-1][1]
    loaded = load_weights(path, model.units, dtype=DTYPE, device="cpu", kernels=model.kernels)
    for unit in model.units:
        tensors, expected = tensors_of(store, unit.name), loaded.acquire(unit.name)
        assert list(tensors) == list(expected)
        for key, tensor in expected.items():
            assert tensors[key].dtype == tensor.dtype
            assert tensors[key].is_meta == tensor.is_meta
            assert tensors[key].shape == tensor.shape
            assert tensor.is_meta or torch.equal(tensors[key], tensor)
        record = store.record_of(unit.name)
        assert record.offset % PAGE_BYTES == 0
        if store.by_name[unit.name].record == model.units.index(unit):
            assert record.num_bytes <= record_bytes(unit, DTYPE)
    changed = store.path.stat().st_mtime_ns
    assert ensure_store(request) == store
    assert store.path.stat().st_mtime_ns == changed


def test_tied_units_share_a_record(tmp_path: Path) -> None:
    tied = ensure_store(request_of(write_checkpoint("qwen3", tmp_path / "qwen3"), tmp_path))
    assert tied.by_name["head"].record == tied.by_name["embed"].record
    apart = ensure_store(request_of(write_checkpoint("llama", tmp_path / "llama"), tmp_path))
    assert len({unit.record for unit in apart.units}) == len(apart.units)


def test_long_records_have_a_guard_word_in_every_stride(tmp_path: Path) -> None:
    path = write_checkpoint("llama", tmp_path / "llama")
    store = ensure_store(request_of(path, tmp_path / "disk"))
    assert store.record_of("layer.0").num_bytes > GUARD_STRIDE
    tensors_of(store, "layer.0")


def test_whatever_the_bytes_depend_on_is_another_store(tmp_path: Path) -> None:
    path = write_checkpoint("llama", tmp_path / "llama")
    first = request_of(path, tmp_path)
    prints = {first.fingerprint(), request_of(path, tmp_path, dtype="bfloat16").fingerprint()}
    prints.add(request_of(path, tmp_path, rank=1, size=2).fingerprint())
    prints.add(request_of(path, tmp_path, units=first.units[:-1]).fingerprint())
    write_checkpoint("llama", path, seed=1)
    prints.add(first.fingerprint())
    assert len(prints) == 5
    assert first.fingerprint() in prints


@pytest.mark.parametrize("place", ["head", "index", "short", "empty", "version"])
def test_a_damaged_store_is_said_and_made_again(place: str, tmp_path: Path) -> None:
    request = request_of(write_checkpoint("gpt2", tmp_path / "gpt2"), tmp_path / "disk")
    store = ensure_store(request)
    whole = store.path.read_bytes()
    damaged = bytearray(whole)
    if place == "head":
        damaged[20] ^= 1
    elif place == "index":
        damaged[-5] ^= 1
    elif place == "version":
        damaged[8] ^= 7
    else:
        del damaged[len(damaged) // 2 if place == "short" else 0 :]
    store.path.write_bytes(damaged)
    with pytest.raises(CorruptWeightsError):
        read_store(store.path)
    assert ensure_store(request).path.read_bytes() == whole


def test_no_room_is_said_before_anything_is_written(tmp_path: Path, monkeypatch) -> None:
    request = request_of(write_checkpoint("gpt2", tmp_path / "gpt2"), tmp_path / "disk")
    monkeypatch.setattr(pack.os, "statvfs", lambda path: os.statvfs_result((1, 1, *[9] * 8)))
    with pytest.raises(ConfigError, match="left"):
        ensure_store(request)
    assert not list((tmp_path / "disk").glob("*.weights*"))


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    request = request_of(write_checkpoint("gpt2", tmp_path / "gpt2"), tmp_path / "disk")

    def full(writer: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pack.StoreWriter, "finish", full)
    with pytest.raises(ConfigError, match="No space left"):
        ensure_store(request)
    assert not list((tmp_path / "disk").glob("*.weights*"))


def pack_slowly(request: StoreRequest, started) -> None:
    def progress(done: int, total: int) -> None:
        started.set()
        time.sleep(0.05)

    ensure_store(request, progress)


def test_killed_in_the_middle_leaves_the_store_absent(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    request = request_of(write_checkpoint("gpt2", tmp_path / "gpt2"), disk)
    context = multiprocessing.get_context("fork")
    started = context.Event()
    child = context.Process(target=pack_slowly, args=(request, started))
    child.start()
    assert started.wait(30)
    os.kill(child.pid, signal.SIGKILL)
    child.join(30)
    assert child.exitcode == -signal.SIGKILL
    assert [path.suffix for path in disk.glob("*.weights*")] == [".part"]
    store = ensure_store(request)
    assert list(disk.glob("*.weights*")) == [store.path]
    tensors_of(store, "layer.0")


def test_two_packers_make_one_store(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    request = request_of(write_checkpoint("gpt2", tmp_path / "gpt2"), disk)
    context = multiprocessing.get_context("fork")
    children = [
        context.Process(target=pack_slowly, args=(request, context.Event())) for _ in range(2)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    assert len(list(disk.glob("*.weights*"))) == 1


def test_quantised_weights_are_packed_as_what_they_stand_for(tmp_path: Path) -> None:
    pair = write_mxfp4(tmp_path)
    stores = [
        pack_model(
            str(path), dtype="bfloat16", precision="native", disk_path=str(tmp_path / path.name)
        )
        for path in (pair.path, pair.plain)
    ]
    assert stores[0].path.name != stores[1].path.name
    for unit in stores[1].by_name:
        ours, expected = (tensors_of(store, unit) for store in stores)
        assert ours.keys() == expected.keys()
        for name, tensor in expected.items():
            assert tensor.is_meta or torch.equal(ours[name], tensor)
