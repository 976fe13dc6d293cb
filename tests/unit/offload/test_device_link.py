"""Two stages instead of one: the same tokens, the same faults, host memory as a tier."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cluster.base.env import default_cache_dir
from cluster.base.errors import WeightStreamError
from offload.device_link import DeviceLink, HostCopier
from offload.host_link import HostLink
from offload.layout import Store
from offload.pack import NativePacker, StoreRequest, ensure_store
from offload.provider import StreamedWeights
from offload.readers.choose import openers
from offload.ring import Ring
from offload.schedule import build_schedule
from replicas.api import GenerationRequest, SamplingParams
from replicas.layers.weights import WeightProvider
from replicas.worker.assembly import WeightsRequest
from tests.support.in_process_engine import in_process_engine
from tests.support.offload_engine import FaultyEngine
from tests.support.tiny_models import (
    prompt_tokens,
    reference_greedy,
    tiny_model,
    write_checkpoint,
)

NUM_TOKENS = 8


class CountingCopier(HostCopier):
    """Asserts the order of its calls for every slot."""

    def __init__(self) -> None:
        self.in_use: set[int] = set()
        self.num_copies = 0

    def copy(self, slot: int, target: torch.Tensor, source: torch.Tensor) -> None:
        assert slot not in self.in_use
        self.num_copies += 1
        super().copy(slot, target, source)

    def before_use(self, slot: int) -> None:
        self.in_use.add(slot)

    def after_use(self, slot: int) -> None:
        self.in_use.discard(slot)


def store_of(request: WeightsRequest, disk: Path) -> Store:
    return ensure_store(
        StoreRequest(
            model_path=request.spec.model_path,
            units=request.model.units,
            dtype="float32",
            packer=NativePacker(request.model.kernels, torch.float32),
            disk_path=str(disk),
        )
    )


def two_stages(
    disk: Path, pinned: tuple[str, ...], copier: HostCopier, kind: str = "", at: int = 0
):
    """A factory of streamed weights with host and device slots."""

    def make(request: WeightsRequest) -> WeightProvider:
        store = store_of(request, disk)
        units = [unit.name for unit in store.units]
        engine = openers(store.path, default_cache_dir())["buffered"](3)
        if kind:
            engine = FaultyEngine(engine, kind, at)
        size = max(record.num_bytes for record in store.records)
        staging = [engine.allocate(size) for _ in range(3)]
        data = bytearray(store.path.read_bytes())
        records = {unit: store.record_of(unit) for unit in pinned}
        link = DeviceLink(
            store,
            HostLink(store, engine, staging, poison=True, timeout_s=10.0),
            [torch.empty(size, dtype=torch.uint8) for _ in range(3)],
            copier,
            pinned={
                unit: torch.frombuffer(
                    data, dtype=torch.uint8, offset=record.offset, count=record.num_bytes
                )
                for unit, record in records.items()
            },
            timeout_s=10.0,
        )
        ring = Ring(build_schedule(units, 3, 3), link)
        return StreamedWeights({}, ring, None, reader="two stages", on_close=link.close)

    return make


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("llama", tmp_path_factory.mktemp("checkpoint") / "llama")


def requests() -> list[GenerationRequest]:
    return [
        GenerationRequest(
            request_id=f"r{length}",
            prompt_token_ids=tuple(prompt_tokens(length)),
            params=SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS),
        )
        for length in (3, 19)
    ]


@pytest.mark.parametrize("pinned", [(), ("layer.1", "head"), ("embed", "layer.0", "layer.2")])
def test_the_tokens_of_transformers(llama: Path, pinned: tuple[str, ...]) -> None:
    copier = CountingCopier()
    engine = in_process_engine(
        llama, weights_factory=two_stages(llama.parent, pinned, copier), max_step_tokens=7
    )
    model = tiny_model("llama")
    for request, completion in zip(requests(), engine.generate(requests()), strict=True):
        prompt = list(request.prompt_token_ids)
        assert completion.token_ids == reference_greedy(model, prompt, NUM_TOKENS)
    assert copier.num_copies > 0


def test_a_fault_on_the_other_thread_reaches_the_step(llama: Path) -> None:
    factory = two_stages(llama.parent, (), CountingCopier(), "error", 7)
    engine = in_process_engine(llama, weights_factory=factory)
    with pytest.raises(WeightStreamError, match="Input/output"):
        engine.generate(requests())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_stage_that_died_is_an_error_and_no_wait_for_ever(llama: Path) -> None:
    links = []

    class Dying(CountingCopier):
        def wait_copied(self, slot: int) -> None:
            if self.num_copies > 8:
                raise SystemExit

    factory = two_stages(llama.parent, (), Dying())

    def remember(request: WeightsRequest) -> WeightProvider:
        weights = factory(request)
        links.append(weights._ring._link)
        links[0]._timeout_s = 0.5
        return weights

    engine = in_process_engine(llama, weights_factory=remember)
    with pytest.raises(WeightStreamError):
        engine.generate(requests())
    assert not links[0]._thread.is_alive()
