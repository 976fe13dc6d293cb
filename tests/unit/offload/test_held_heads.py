"""Beginnings of compressed records stay in memory: the same tokens, fewer bytes, every fault."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from cluster.base.errors import ConfigError, CorruptWeightsError, WeightStreamError
from cluster.base.plan import OffloadPlan
from offload.assembly import model_adapter
from offload.budget import Budget, BudgetError
from offload.held_heads import HeldHeads
from offload.layout import GUARD_STRIDE, Record, Store, read_store
from offload.placement import head_sizes, place_units
from offload.provider import StreamedWeights
from offload.readers.engine import ReadEngine
from offload.reservations import reserve
from replicas.api import SamplingParams
from replicas.engine.sync_engine import SyncEngine
from replicas.layers.weights import WeightProvider
from replicas.worker.assembly import WeightsRequest
from tests.support.fake_streams import FakeDevice
from tests.support.in_process_engine import in_process_engine
from tests.support.offload_engine import PLENTY, FaultyEngine, offload_plan, poisoned, weights_of
from tests.support.streamed_runs import requests_of_lengths
from tests.support.tiny_models import TINY_NAMES, write_checkpoint

DENSE = Path(__file__).parents[3] / "examples" / "models" / "demo-dense"
"""Its layers' records are twelve strides long, those of tiny models less than one."""
SHARES = (0.1, 0.5, 0.9)
GREEDY = SamplingParams(temperature=0.0, max_tokens=8)
REQUESTS = requests_of_lengths((1, 5, 23, 12), GREEDY)


@pytest.fixture(scope="module", autouse=True)
def _compiled(cpu_kernels: object) -> None:
    """Where there is no compiler, nothing is compressed."""


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("disk")


def held_plan(disk: Path, held_bytes: int, **changes: Any) -> OffloadPlan:
    fields = {"compression": "lossless", "held_bytes": held_bytes}
    return offload_plan(disk, **(fields | changes))


def engine_of(
    path: Path, plan: OffloadPlan, made: list[StreamedWeights] | None = None, **changes: Any
) -> SyncEngine:
    factory = weights_of(plan, **changes)

    def make(request: WeightsRequest) -> WeightProvider:
        weights = factory(request)
        assert isinstance(weights, StreamedWeights)
        if made is not None:
            made.append(weights)
        return weights

    return in_process_engine(
        path,
        weights_factory=make,
        adapt_model=model_adapter(plan, poisoned()),
        dtype="bfloat16",
    )


def tokens_of(engine: SyncEngine) -> list[list[int]]:
    return [completion.token_ids for completion in engine.generate(REQUESTS)]


def store_in(disk: Path) -> Store:
    (path,) = disk.glob("*.weights")
    return read_store(path)


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    return tokens_of(in_process_engine(DENSE, dtype="bfloat16"))


@pytest.fixture(scope="module")
def stored_bytes(disk: Path) -> int:
    """Of all records of the streamed model."""
    engine_of(DENSE, held_plan(disk, 0))
    return store_in(disk).total_bytes


@pytest.mark.parametrize("name", TINY_NAMES)
def test_every_family_with_its_records_held(name: str, tmp_path: Path) -> None:
    """All of each record: then only those are read again that do not get smaller."""
    path, made = write_checkpoint(name, tmp_path / name), list[StreamedWeights]()
    engine = engine_of(path, held_plan(tmp_path / "disk", PLENTY, ring_slots=2), made)
    assert tokens_of(engine) == tokens_of(in_process_engine(path, dtype="bfloat16"))
    before = made[0].stats.ring.num_bytes
    tokens_of(engine)
    records = [r for r in store_in(tmp_path / "disk").records if not r.compressed_from]
    read_again = made[0].stats.ring.num_bytes - before
    assert (read_again > 0) <= bool(records)
    assert read_again <= 100 * sum(record.num_bytes for record in records)


def test_it_is_the_answer_of_transformers(disk: Path, stored_bytes: int) -> None:
    ours = tokens_of(engine_of(DENSE, held_plan(disk, stored_bytes // 2)))
    model = transformers.AutoModelForCausalLM.from_pretrained(DENSE, dtype=torch.bfloat16)
    for request, tokens in zip(REQUESTS, ours, strict=True):
        prompt = torch.tensor([request.prompt_token_ids])
        with torch.inference_mode():
            output = model.generate(prompt, do_sample=False, max_new_tokens=8, min_new_tokens=8)
        assert tokens == output[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("verify", ["first", "always"])
@pytest.mark.parametrize("ring_slots", [1, 2, 3, 9])
@pytest.mark.parametrize("share", SHARES)
def test_parts_of_records_in_every_ring(
    disk: Path, stored_bytes: int, expected, share: float, ring_slots: int, verify: str
) -> None:
    plan = held_plan(
        disk,
        int(share * stored_bytes),
        ring_slots=ring_slots,
        prefetch_depth=ring_slots,
        verify=verify,
    )
    assert tokens_of(engine_of(DENSE, plan)) == expected


@pytest.mark.parametrize("reader", ["aio", "direct"])
def test_every_reader(disk: Path, stored_bytes: int, expected, reader: str) -> None:
    plan = held_plan(disk, stored_bytes // 2, reader=reader, verify="first")
    try:
        engine = engine_of(DENSE, plan)
    except ConfigError as error:
        pytest.skip(f"the reader {reader} cannot be used here: {error}")
    assert tokens_of(engine) == expected


def test_what_is_held_is_not_read_again(disk: Path, stored_bytes: int) -> None:
    made: list[StreamedWeights] = []
    plan = held_plan(disk, stored_bytes // 2, resident_units=("embed", "norm", "head"))
    engine = engine_of(DENSE, plan, made)
    placement = place_units(store_in(disk), plan)
    streamed = sum(store_in(disk).record_of(unit).num_bytes for unit in placement.ring)
    assert 0.4 * stored_bytes < placement.held_bytes <= stored_bytes // 2
    tokens_of(engine)
    before = made[0].stats.ring
    bytes_before, reads_before = before.num_bytes, before.num_reads
    tokens_of(engine)
    after = made[0].stats.ring
    passes = (after.num_reads - reads_before) / len(placement.ring)
    assert after.num_bytes - bytes_before == pytest.approx(
        passes * (streamed - placement.held_bytes), rel=0.02
    )


@pytest.mark.parametrize("verify", ["first", "always"])
@pytest.mark.parametrize(("kind", "byte"), [("error", 0), ("short", 0), ("flip", -5000)])
@pytest.mark.parametrize("at", [0, 6, 13])
def test_a_read_that_fails_once_costs_one_more(
    disk: Path, stored_bytes: int, expected, kind: str, byte: int, at: int, verify: str
) -> None:
    def wrap(inner: ReadEngine) -> ReadEngine:
        return FaultyEngine(inner, kind, at, times=1, byte=byte)

    plan = held_plan(disk, stored_bytes // 2, verify=verify, resident_units=("embed", "head"))
    made: list[StreamedWeights] = []
    assert tokens_of(engine_of(DENSE, plan, made, wrap_engine=wrap)) == expected
    assert made[0].stats.ring.num_retries == 1


@pytest.mark.parametrize("kind", ["error", "short", "flip"])
def test_a_fault_that_stays_is_a_coded_error(
    disk: Path, stored_bytes: int, expected, kind: str
) -> None:
    def wrap(inner: ReadEngine) -> ReadEngine:
        return FaultyEngine(inner, kind, 9, byte=-5000)

    plan = held_plan(disk, stored_bytes // 2, verify="first")
    with pytest.raises(CorruptWeightsError if kind == "flip" else WeightStreamError):
        tokens_of(engine_of(DENSE, plan, wrap_engine=wrap))


def test_a_bit_that_flips_in_memory_is_found_and_read_again(
    disk: Path, stored_bytes: int, expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[torch.Tensor] = []
    keep = HeldHeads.keep

    def spoilt(self: HeldHeads, record: Record, stored: torch.Tensor) -> None:
        keep(self, record, stored)
        head = self.of(record)
        assert head is not None
        if not kept:
            head[GUARD_STRIDE - 1000] ^= 1
        kept.append(head)

    monkeypatch.setattr(HeldHeads, "keep", spoilt)
    made: list[StreamedWeights] = []
    plan = held_plan(disk, stored_bytes // 2, verify="first", resident_units=("embed", "head"))
    assert tokens_of(engine_of(DENSE, plan, made)) == expected
    assert made[0].stats.ring.num_retries == 1
    assert len(kept) == len(place_units(store_in(disk), plan).head_bytes) + 1


def test_shares_are_whole_strides_and_within_the_bytes() -> None:
    records = [
        Record(
            offset=4096 * (1 + 100 * number),
            num_bytes=size * GUARD_STRIDE + 4096,
            crc32=0,
            guards=b"",
            compressed_from=size * 2 * GUARD_STRIDE if number else 0,
        )
        for number, size in enumerate((7, 40, 10))
    ]
    total = sum(record.num_bytes for record in records[1:])
    for held in (0, GUARD_STRIDE - 1, 20 * GUARD_STRIDE, total - 1):
        sizes = head_sizes(records, held)
        assert sum(sizes.values()) <= held
        assert records[0].offset not in sizes
        assert all(size and size % GUARD_STRIDE == 0 for size in sizes.values())
    assert len(head_sizes(records, 20 * GUARD_STRIDE)) == 2
    assert sum(head_sizes(records, total).values()) == total


def test_it_is_reserved_and_refused_where_it_cannot_be(disk: Path, stored_bytes: int) -> None:
    plan = held_plan(disk, stored_bytes // 2)
    placement = place_units(store_in(disk), plan)
    needed = placement.ring_room.device_bytes + placement.held_bytes
    reserve(Budget("device_memory", needed), placement, plan)
    with pytest.raises(BudgetError, match="beginnings of compressed records"):
        reserve(Budget("device_memory", needed - 1), placement, plan)
    with pytest.raises(ConfigError, match="not compressed"):
        engine_of(DENSE, offload_plan(disk, held_bytes=1))
    with pytest.raises(ConfigError, match="on a device"):
        engine_of(DENSE, held_plan(disk, 1), streams=lambda _: FakeDevice(computes_at_once=True))
    with pytest.raises(ConfigError, match="read together"):
        engine_of(DENSE, held_plan(disk, 1, num_sharing=2))
