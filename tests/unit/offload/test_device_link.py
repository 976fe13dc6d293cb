"""Disk, host and device as stages: nothing used too early or overwritten too soon, all at once."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.base.env import default_cache_dir
from cluster.base.errors import ConfigError, WeightStreamError
from offload.assembly import streamed_weights
from offload.budget import BudgetError
from offload.device_copier import DeviceCopier
from offload.device_link import DeviceLink
from offload.host_link import HostLink
from offload.layout import PackedTensor, Record, Store, StoredUnit, read_store
from offload.readers.choose import openers
from offload.ring import Ring
from offload.runtime import Runtime
from offload.schedule import build_schedule
from offload.staging import Staging
from replicas.api import GenerationRequest, SamplingParams
from tests.support.fake_streams import FakeDevice, TimedEngine
from tests.support.in_process_engine import in_process_engine
from tests.support.offload_engine import PLENTY, FaultyEngine, offload_plan
from tests.support.tiny_models import (
    prompt_tokens,
    reference_greedy,
    tiny_model,
    write_checkpoint,
)

NUM_TOKENS = 8
LAYERS = [f"layer.{number}" for number in range(7)]
SIZE = 16 * 4096
PASSES = 20


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("llama", tmp_path_factory.mktemp("checkpoint") / "llama")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Layers of equal size, each with a tensor of its own number."""
    path = tmp_path_factory.mktemp("store") / "layers"
    path.write_bytes(b"".join(bytes([1 + number]) * SIZE for number in range(len(LAYERS))))
    entry = PackedTensor(name="w", dtype="uint8", shape=(SIZE,), offset=0, num_bytes=SIZE)
    return Store(
        path=path,
        fingerprint="",
        model="",
        records=tuple(
            Record(offset=number * SIZE, num_bytes=SIZE, crc32=0, guards=b"")
            for number in range(len(LAYERS))
        ),
        units=tuple(
            StoredUnit(name=layer, record=number, tensors=(entry,))
            for number, layer in enumerate(LAYERS)
        ),
    )


def contents(unit: str) -> torch.Tensor:
    return torch.full((SIZE,), 1 + LAYERS.index(unit), dtype=torch.uint8)


@contextmanager
def two_stages(
    store: Store,
    device: FakeDevice,
    *,
    pinned: tuple[str, ...] = (),
    num_slots: int = 3,
    num_staging: int = 2,
    disk_bytes_per_s: float = 1e9,
    copier: type[DeviceCopier] = DeviceCopier,
) -> Iterator[tuple[DeviceLink, TimedEngine]]:
    engine = TimedEngine(
        openers(store.path, default_cache_dir())["buffered"](num_staging),
        device,
        disk_bytes_per_s,
    )
    host = HostLink(store, engine, [engine.allocate(SIZE) for _ in range(num_staging)], poison=True)
    link = DeviceLink(
        store,
        Staging(host, num_staging),
        [torch.empty(SIZE, dtype=torch.uint8) for _ in range(num_slots)],
        copier(device, num_slots, poison=True),
        pinned={unit: contents(unit) for unit in pinned},
        timeout_s=10.0,
    )
    with closing(link):
        yield link, engine


def compute_passes(
    device: FakeDevice, link: DeviceLink, *, slots: int, passes: int, seconds: float
) -> tuple[float, list[str]]:
    """The layers in turn, each computed in so many seconds; units whose bytes were wrong then."""
    wrong: list[str] = []
    ring = Ring(build_schedule(LAYERS, slots, slots), link)
    for unit in LAYERS * passes:
        weights = ring.acquire(unit)["w"]

        def look(unit: str = unit, weights: torch.Tensor = weights) -> None:
            if not torch.equal(weights, contents(unit)):
                wrong.append(unit)

        # Looked at when it begins and when it ends: the slot is its own in between.
        device.computing().work(look, seconds)
        device.computing().work(look)
        ring.release(unit)
    return device.finish(), wrong


@pytest.mark.parametrize("pinned", [(), ("layer.1",), tuple(LAYERS)])
@pytest.mark.parametrize("seed", range(4))
def test_whatever_the_device_does_first_it_computes_on_the_right_bytes(
    store: Store, seed: int, pinned: tuple[str, ...]
) -> None:
    device = FakeDevice(seed=seed)
    with two_stages(store, device, pinned=pinned, num_staging=1 + seed % 3) as (link, _):
        _, wrong = compute_passes(device, link, slots=2 + seed % 2, passes=4, seconds=1e-3)
    assert wrong == []


class UsesAtOnce(DeviceCopier):
    def before_use(self, slot: int) -> None:
        """Forgets to wait for the copy."""


class CopiesAtOnce(DeviceCopier):
    def after_use(self, slot: int, memory: torch.Tensor) -> None:
        """Forgets to tell when the slot is free."""


class ReadsAtOnce(DeviceCopier):
    def copy(self, slot, target, source):
        super().copy(slot, target, source)
        return lambda: None


@pytest.mark.parametrize("careless", [UsesAtOnce, CopiesAtOnce, ReadsAtOnce])
def test_each_rule_of_the_copier_is_needed(store: Store, careless: type[DeviceCopier]) -> None:
    """Else the test above would prove nothing. Which seed shows it depends on threads, too."""

    def mistakes(seed: int) -> list[str]:
        device = FakeDevice(seed=seed)
        with two_stages(store, device, copier=careless) as (link, _):
            return compute_passes(device, link, slots=3, passes=4, seconds=1e-3)[1]

    assert any(mistakes(seed) for seed in range(100))


@pytest.mark.parametrize(
    ("disk", "link", "compute"), [(1.0, 0.2, 0.3), (0.2, 1.0, 0.3), (0.3, 0.2, 1.0), (1, 1, 1)]
)
def test_all_stages_overlap_and_with_one_slot_each_waits_for_the_copy(
    store: Store, disk: float, link: float, compute: float
) -> None:
    """Seconds of each stage for a layer; three slots take the longest of them. With one of each a
    copy has both of its ends to itself: the read and the computation are in turn with it."""
    for slots, expected in ((3, max(disk, link, compute)), (1, link + max(disk, compute))):
        device = FakeDevice(link_bytes_per_s=SIZE / link)
        stages = two_stages(
            store, device, num_slots=slots, num_staging=slots, disk_bytes_per_s=SIZE / disk
        )
        with stages as (staged, _):
            seconds, _ = compute_passes(device, staged, slots=slots, passes=PASSES, seconds=compute)
        layers = PASSES * len(LAYERS)
        fill = disk + link + compute
        assert expected * layers - fill <= seconds <= 1.02 * expected * layers + fill


def test_pinned_units_cost_the_link_only_and_leave_the_host_to_run_ahead(store: Store) -> None:
    device = FakeDevice(link_bytes_per_s=SIZE / 0.5)
    with two_stages(store, device, pinned=tuple(LAYERS)) as (link, engine):
        seconds, wrong = compute_passes(device, link, slots=3, passes=PASSES, seconds=0.1)
        assert device.thread_s <= seconds
        assert engine.busy_s == 0
        assert link.stats.num_reads == 0
        assert link.stats.num_bytes >= PASSES * (len(LAYERS) - 3) * SIZE
    assert wrong == []
    assert seconds / (PASSES * len(LAYERS) * 0.5) <= 1 / 0.95


def requests() -> list[GenerationRequest]:
    return [
        GenerationRequest(
            request_id=f"r{length}",
            prompt_token_ids=tuple(prompt_tokens(length)),
            params=SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS),
        )
        for length in (3, 19)
    ]


def staged_runtime(device: FakeDevice | None = None, **changes: Any) -> Runtime:
    """A CPU rank with the stages of a device; copies happen as late as they may."""
    late = device or FakeDevice(computes_at_once=True)
    return Runtime(cache_dir=default_cache_dir(), poison=True, streams=lambda _: late, **changes)


@pytest.mark.parametrize(
    ("resident", "host"),
    [
        ((), ()),
        ((), ("layer.1", "head")),
        (("embed", "norm", "layer.0"), ("layer.1",)),
        (("embed", "norm", "head"), ("layer.0", "layer.1", "layer.2")),
    ],
)
def test_the_tokens_of_transformers(
    llama: Path, resident: tuple[str, ...], host: tuple[str, ...]
) -> None:
    plan = offload_plan(
        llama.parent / "store", resident_units=resident, host_units=host, host_bytes=PLENTY
    )
    engine = in_process_engine(
        llama, weights_factory=streamed_weights(plan, staged_runtime()), max_step_tokens=7
    )
    model = tiny_model("llama")
    for request, completion in zip(requests(), engine.generate(requests()), strict=True):
        prompt = list(request.prompt_token_ids)
        assert completion.token_ids == reference_greedy(model, prompt, NUM_TOKENS)


def test_what_the_host_holds_is_reserved_to_the_byte(llama: Path) -> None:
    """Units at home there and a few staging slots; at least what the largest that stays needs."""
    folder = llama.parent / "store"
    in_process_engine(llama, weights_factory=streamed_weights(offload_plan(folder)))
    store = read_store(next(folder.glob("*.weights")))
    sizes = {unit.name: store.record_of(unit.name).num_bytes for unit in store.units}
    ends, layers = ("embed", "norm", "head"), ("layer.0", "layer.1", "layer.2")
    cases: list[tuple[int, dict[str, Any], str]] = [
        (
            3 * sizes["layer.0"],
            {"resident_units": ends, "host_units": ("layer.0",), "ring_slots": 2},
            "2 staging slots for layers",
        ),
        (
            max(sizes.values()),
            {"resident_units": (*layers, "embed", "head"), "host_units": ("norm",)},
            "loading resident weights",
        ),
    ]
    for need, fields, told in cases:
        enough = streamed_weights(offload_plan(folder, host_bytes=need, **fields), staged_runtime())
        in_process_engine(llama, weights_factory=enough).generate(requests())
        short = streamed_weights(
            offload_plan(folder, host_bytes=need - 1, **fields), staged_runtime()
        )
        with pytest.raises(BudgetError, match=told):
            in_process_engine(llama, weights_factory=short)


def test_one_memory_has_no_second_tier(llama: Path) -> None:
    plan = offload_plan(llama.parent / "store", host_units=("layer.0",), host_bytes=PLENTY)
    with pytest.raises(ConfigError, match="one memory"):
        in_process_engine(llama, weights_factory=streamed_weights(plan))


def test_a_fault_on_the_other_thread_reaches_the_step(llama: Path) -> None:
    runtime = staged_runtime(wrap_engine=lambda engine: FaultyEngine(engine, "error", 7))
    factory = streamed_weights(offload_plan(llama.parent / "store", host_bytes=PLENTY), runtime)
    engine = in_process_engine(llama, weights_factory=factory)
    with pytest.raises(WeightStreamError, match="Input/output"):
        engine.generate(requests())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_stage_that_died_is_an_error_and_no_wait_for_ever(llama: Path) -> None:
    device = FakeDevice(computes_at_once=True)
    numbers = itertools.count()
    new_queue = device.new_queue

    def dying_queue() -> Any:
        queue = new_queue()
        copy = queue.copy

        def dying(target: torch.Tensor, source: torch.Tensor) -> None:
            if next(numbers) > 8:
                raise SystemExit
            copy(target, source)

        queue.copy = dying
        return queue

    device.new_queue = dying_queue
    plan = offload_plan(llama.parent / "store", host_bytes=PLENTY, read_timeout_s=0.5)
    engine = in_process_engine(
        llama, weights_factory=streamed_weights(plan, staged_runtime(device))
    )
    with pytest.raises(WeightStreamError):
        engine.generate(requests())
