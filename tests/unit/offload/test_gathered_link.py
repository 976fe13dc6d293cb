"""Ranks that read a piece each of every record, as threads over real stores and shared slots."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from cluster.base.env import default_cache_dir
from cluster.base.errors import CorruptWeightsError, InternalError, WeightStreamError
from offload.compression import RecordCodec
from offload.gathered_link import GatheredLink
from offload.host_link import HostLink, view
from offload.host_memory import allocate_block
from offload.layout import PAGE_BYTES, Store
from offload.lockstep_ring import LockstepRing
from offload.lossless_library import open_codec
from offload.pack import StoreRequest, ensure_store
from offload.packers import NativePacker
from offload.pieces import Piece, piece_bytes
from offload.placement import is_routed
from offload.precision import Precision
from offload.quant_kernels import QuantKernels, QuantPacker
from offload.readers.buffered import BufferedEngine
from offload.readers.engine import ReadEngine
from offload.record_check import RecordCheck
from offload.schedule import build_schedule
from replicas.kernels.torch_ops import TORCH_KERNELS
from replicas.models.hf_config import arch_from_hf
from replicas.models.weight_units import weight_units
from tests.support.offload_engine import FaultyEngine
from tests.support.thread_sharers import ThreadSharers, members, on_threads
from tests.support.tiny_models import tiny_configs, write_checkpoint

NAME, NUM_SLOTS = "qwen3_moe", 3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(NAME, tmp_path_factory.mktemp("checkpoint") / NAME)


def packed(path: Path, disk: Path, piece: Piece | None, kind: str = "native") -> Store:
    dtype = torch.bfloat16 if kind == "lossless" else torch.float32
    packer = NativePacker(TORCH_KERNELS, dtype)
    codec: RecordCodec | None = None
    if kind == "lossless":
        codec = open_codec(default_cache_dir() / "kernels")
    if kind in ("int8", "int4"):
        kernels = QuantKernels(TORCH_KERNELS, Precision(kind), default_cache_dir() / "kernels")
        packer = QuantPacker(kernels, dtype)
    arch = arch_from_hf(tiny_configs()[NAME].to_dict())
    return ensure_store(
        StoreRequest(
            model_path=str(path),
            units=weight_units(arch, 0, 1),
            dtype=str(dtype).removeprefix("torch."),
            packer=packer,
            disk_path=str(disk),
            codec=codec,
            piece=piece,
        )
    )


def gathered_units(store: Store) -> list[str]:
    return [unit.name for unit in store.units if not is_routed(unit.name)]


@contextmanager
def opened(
    store: Store,
    slots: list[torch.Tensor],
    sharers: ThreadSharers,
    wrap: Callable[[ReadEngine], ReadEngine] = lambda engine: engine,
) -> Iterator[GatheredLink]:
    engine = wrap(BufferedEngine(store.path, len(slots)))
    codec = open_codec(default_cache_dir() / "kernels") if store.is_compressed else None
    check = RecordCheck(store, "always")
    pieces = HostLink(store, engine, slots, check=check, codec=codec, timeout_s=20.0)
    link = GatheredLink(store, pieces, slots, sharers, poison=True)
    try:
        yield link
    finally:
        link.close()


def shared_slots(store: Store, num_slots: int = NUM_SLOTS) -> list[torch.Tensor]:
    slot_bytes = max(store.record_of(unit).used_bytes for unit in gathered_units(store))
    return list(torch.split(allocate_block(num_slots * slot_bytes).memory, slot_bytes))


@pytest.mark.parametrize("kind", ["native", "lossless", "int8", "int4"])
@pytest.mark.parametrize("count", [2, 4])
def test_every_rank_sees_the_whole_records(
    count: int, kind: str, checkpoint: Path, tmp_path: Path, cpu_kernels: object
) -> None:
    """At paces of their own, with units left out, in slots that are spoilt between two units."""
    whole = packed(checkpoint, tmp_path, None, "native" if kind == "lossless" else kind)
    if kind == "lossless":
        whole = packed(checkpoint, tmp_path / "bf16", None, kind)
    stores = [packed(checkpoint, tmp_path, Piece(rank, count), kind) for rank in range(count)]
    units, slots, sharers = gathered_units(whole), shared_slots(stores[0]), members(count)
    schedule = build_schedule(units, NUM_SLOTS, 2, gathers=True)
    expected = whole_tensors(whole)

    def serve(rank: int) -> None:
        rng = random.Random(rank)
        with opened(stores[rank], slots, sharers[rank]) as link:
            ring = LockstepRing(schedule, link)
            for _ in range(6):
                for unit in units:
                    if rng.random() < 0.2:
                        continue
                    tensors = ring.acquire(unit)
                    time.sleep(rng.choice((0.0, 0.0, 0.002)))
                    for name, tensor in expected[unit].items():
                        assert tensor.is_meta or torch.equal(tensors[name], tensor), (unit, name)
                    ring.release(unit)
                ring.end_pass()

    assert on_threads(count, serve) == [None] * count


def whole_tensors(store: Store) -> dict[str, dict[str, torch.Tensor]]:
    """Each unit's tensors, read plainly; decoded where the records are compressed."""
    codec = open_codec(default_cache_dir() / "kernels") if store.is_compressed else None
    found = {}
    for unit in gathered_units(store):
        record = store.record_of(unit)
        image = torch.zeros(record.image_bytes, dtype=torch.uint8)
        data = store.path.read_bytes()[record.offset : record.offset + record.num_bytes]
        image[record.image_bytes - record.num_bytes :] = torch.frombuffer(
            bytearray(data), dtype=torch.uint8
        )
        if record.compressed_from:
            assert codec is not None
            codec.decode(image, record.num_bytes)
        found[unit] = {entry.name: view(image, entry) for entry in store.by_name[unit].tensors}
    return found


@pytest.mark.parametrize("count", [2, 4, 7])
def test_a_rank_stores_and_reads_its_nth_part(count: int, checkpoint: Path, tmp_path: Path) -> None:
    whole = packed(checkpoint, tmp_path, None)
    stores = [packed(checkpoint, tmp_path, Piece(rank, count)) for rank in range(count)]
    for unit in whole.units:
        size = whole.record_of(unit.name).num_bytes
        parts = [store.record_of(unit.name) for store in stores]
        if is_routed(unit.name):
            assert {(part.num_bytes, part.piece_of) for part in parts} == {(size, 0)}
            continue
        assert sum(part.num_bytes for part in parts) == size
        assert max(part.num_bytes for part in parts) == piece_bytes(size, count)
        assert {part.used_bytes for part in parts} == {size}
        assert max(part.num_bytes for part in parts) - size / count < PAGE_BYTES
    assert len({store.fingerprint for store in [whole, *stores]}) == count + 1


@pytest.mark.parametrize(
    ("kind", "code"), [("error", "weight_stream"), ("short", "weight_stream"), ("flip", "corrupt")]
)
@pytest.mark.parametrize("at", [0, 4, 11])
def test_a_read_that_fails_at_one_rank_ends_all_with_a_coded_error(
    kind: str, code: str, at: int, checkpoint: Path, tmp_path: Path
) -> None:
    stores = [packed(checkpoint, tmp_path, Piece(rank, 3)) for rank in range(3)]
    units, slots, sharers = gathered_units(stores[0]), shared_slots(stores[0]), members(3)
    schedule = build_schedule(units, NUM_SLOTS, 2, gathers=True)

    def serve(rank: int) -> None:
        def wrap(engine: ReadEngine) -> ReadEngine:
            return FaultyEngine(engine, kind, at=at) if rank == 1 else engine

        with opened(stores[rank], slots, sharers[rank], wrap) as link:
            ring = LockstepRing(schedule, link)
            for _ in range(6):
                for unit in units:
                    ring.acquire(unit)
                    ring.release(unit)
                ring.end_pass()

    errors = on_threads(3, serve)
    wanted = CorruptWeightsError if code == "corrupt" else WeightStreamError
    assert [type(error) for error in errors] == [wanted] * 3
    for rank in (0, 2):
        assert "rank 1 (node here) could not read its piece" in str(errors[rank])


def test_one_bad_read_is_read_again(checkpoint: Path, tmp_path: Path) -> None:
    stores = [packed(checkpoint, tmp_path, Piece(rank, 2)) for rank in range(2)]
    units, slots, sharers = gathered_units(stores[0]), shared_slots(stores[0]), members(2)
    schedule = build_schedule(units, NUM_SLOTS, 2, gathers=True)

    def serve(rank: int) -> int:
        def wrap(engine: ReadEngine) -> ReadEngine:
            return FaultyEngine(engine, "flip", at=2, times=1) if rank else engine

        with opened(stores[rank], slots, sharers[rank], wrap) as link:
            ring = LockstepRing(schedule, link)
            for unit in units:
                ring.acquire(unit)
                ring.release(unit)
            ring.end_pass()
            return link.stats.num_retries

    assert on_threads(2, serve) == [0, 1]


def test_nothing_is_used_before_it_is_gathered(checkpoint: Path, tmp_path: Path) -> None:
    store = packed(checkpoint, tmp_path, Piece(0, 2))
    with opened(store, shared_slots(store), members(2)[0]) as link:
        link.submit("embed", 0)
        with pytest.raises(InternalError, match="before its pieces"):
            link.wait("embed", 0)
        with pytest.raises(InternalError, match="a slot of embed"):
            link.gather("layer.0", 0)
