"""Compressed records give the tokens of resident weights: every family, every ring, every fault."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from cluster.base.errors import ConfigError, CorruptWeightsError, WeightStreamError
from cluster.base.plan import OffloadPlan
from offload.assembly import codec_of, model_adapter
from offload.layout import PAGE_BYTES, Store, read_store
from offload.pack_model import pack_model
from offload.placement import place_units
from offload.readers.engine import ReadEngine
from replicas.api import GenerationRequest, SamplingParams
from replicas.engine.sync_engine import SyncEngine
from tests.support.fake_streams import FakeDevice
from tests.support.in_process_engine import in_process_engine
from tests.support.offload_engine import (
    PLENTY,
    FaultyEngine,
    offload_plan,
    poisoned,
    unit_names,
    weights_of,
)
from tests.support.streamed_runs import requests_of_lengths
from tests.support.tiny_models import TINY_NAMES, write_checkpoint

EXAMPLES = Path(__file__).parents[3] / "examples" / "models"
GREEDY = SamplingParams(temperature=0.0, max_tokens=8)


@pytest.fixture(scope="module", autouse=True)
def _compiled(cpu_kernels: object) -> None:
    """Where there is no compiler, nothing is compressed."""


def lossless_plan(disk: Path, **changes: Any) -> OffloadPlan:
    return offload_plan(disk, **({"compression": "lossless"} | changes))


def streamed(path: Path, plan: OffloadPlan, limits: Any = None, **changes: Any) -> SyncEngine:
    return in_process_engine(
        path,
        weights_factory=weights_of(plan, **changes),
        adapt_model=model_adapter(plan, poisoned()),
        dtype="bfloat16",
        **(limits or {}),
    )


def tokens_of(engine: SyncEngine, requests: list[GenerationRequest]) -> list[list[int]]:
    return [completion.token_ids for completion in engine.generate(requests)]


def requests_of(params: SamplingParams = GREEDY) -> list[GenerationRequest]:
    return requests_of_lengths((1, 5, 23, 12), params)


def resident(path: Path, requests: list[GenerationRequest]) -> list[list[int]]:
    return tokens_of(in_process_engine(path, dtype="bfloat16"), requests)


def faulty(inner: ReadEngine, kind: str, at: int, **fields: Any) -> FaultyEngine:
    """As ever, but what is flipped is among the last weights: zeros may fill a record's middle."""
    return FaultyEngine(inner, kind, at, byte=-100, **fields)


def store_in(disk: Path) -> Store:
    (path,) = disk.glob("*.weights")
    return read_store(path)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("llama", tmp_path_factory.mktemp("checkpoint") / "llama")


@pytest.fixture(scope="module")
def llama_tokens(llama: Path) -> list[list[int]]:
    return resident(llama, requests_of())


@pytest.mark.parametrize("name", TINY_NAMES)
def test_every_family_streams_to_its_own_tokens(name: str, tmp_path: Path) -> None:
    path = write_checkpoint(name, tmp_path / name)
    engine = streamed(path, lossless_plan(tmp_path / "disk"), {"max_step_tokens": 7})
    assert tokens_of(engine, requests_of()) == resident(path, requests_of())
    assert store_in(tmp_path / "disk").is_compressed


@pytest.mark.parametrize("name", ["demo-dense", "demo-moe"])
def test_trained_models_take_two_thirds_and_answer_as_transformers_does(
    name: str, tmp_path: Path
) -> None:
    path, plan = EXAMPLES / name, lossless_plan(tmp_path)
    ours = tokens_of(streamed(path, plan), requests_of())
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    for request, tokens in zip(requests_of(), ours, strict=True):
        prompt = torch.tensor([request.prompt_token_ids])
        with torch.inference_mode():
            output = model.generate(prompt, do_sample=False, max_new_tokens=8, min_new_tokens=8)
        assert tokens == output[0, prompt.shape[1] :].tolist()
    records = store_in(tmp_path).records
    stored, used = (
        sum(sizes)
        for sizes in zip(*((each.num_bytes, each.image_bytes) for each in records), strict=True)
    )
    assert stored < 0.72 * used


@pytest.mark.parametrize(("ring_slots", "depth"), [(1, 1), (2, 2), (3, 3), (9, 9)])
@pytest.mark.parametrize("kept", [(), ("embed", "norm"), ("layer.1", "head"), "all"])
def test_every_ring_and_every_residency(
    llama: Path, llama_tokens, ring_slots: int, depth: int, kept: Any
) -> None:
    names = tuple(unit_names(llama)) if kept == "all" else kept
    plan = lossless_plan(
        llama.parent / "disk", ring_slots=ring_slots, prefetch_depth=depth, resident_units=names
    )
    assert tokens_of(streamed(llama, plan), requests_of()) == llama_tokens


@pytest.mark.parametrize("reader", ["aio", "direct", "buffered"])
def test_every_reader(llama: Path, llama_tokens, reader: str) -> None:
    plan = lossless_plan(llama.parent / "disk", reader=reader, verify="first")
    try:
        engine = streamed(llama, plan)
    except ConfigError as error:
        pytest.skip(f"the reader {reader} cannot be used here: {error}")
    assert tokens_of(engine, requests_of()) == llama_tokens


def test_sampled_runs_and_a_second_stage(llama: Path, llama_tokens) -> None:
    params = SamplingParams(temperature=1.1, top_p=0.9, seed=7, max_tokens=8, n=2)
    plan = lossless_plan(llama.parent / "disk", resident_units=("embed",))
    engine = streamed(llama, plan, {"max_step_tokens": 6})
    assert tokens_of(engine, requests_of(params)) == resident(llama, requests_of(params))
    device = FakeDevice(computes_at_once=True)
    plan = lossless_plan(
        llama.parent / "disk", resident_units=("embed",), host_units=("layer.1",), host_bytes=PLENTY
    )
    staged = streamed(llama, plan, streams=lambda _: device)
    assert tokens_of(staged, requests_of()) == llama_tokens


@pytest.mark.parametrize("slots", [2, 5])
def test_experts_through_few_slots(slots: int, tmp_path: Path) -> None:
    path = write_checkpoint("qwen3_moe", tmp_path / "qwen3_moe")
    engine = streamed(path, lossless_plan(tmp_path / "disk", expert_slots=slots))
    assert tokens_of(engine, requests_of()) == resident(path, requests_of())


@pytest.mark.parametrize("verify", ["first", "always"])
@pytest.mark.parametrize("kind", ["error", "short", "flip"])
@pytest.mark.parametrize("at", [0, 4, 17])
def test_a_fault_that_stays_is_a_coded_error_and_never_a_token(
    llama: Path, llama_tokens, kind: str, at: int, verify: str
) -> None:
    """A flipped bit also where the checksum was looked at before: the codec's own sums find it."""
    plan = lossless_plan(llama.parent / "disk", ring_slots=2, prefetch_depth=2, verify=verify)
    engine = streamed(llama, plan, wrap_engine=lambda inner: faulty(inner, kind, at))
    tokens: dict[str, list[int]] = {request.request_id: [] for request in requests_of()}
    for request in requests_of():
        engine.add(request)

    def run() -> None:
        for delta in engine.run():
            tokens[delta.request_id] += delta.token_ids

    with pytest.raises(CorruptWeightsError if kind == "flip" else WeightStreamError):
        run()
    for index, name in enumerate(tokens):
        assert tokens[name] == llama_tokens[index][: len(tokens[name])]


@pytest.mark.parametrize("kind", ["error", "short", "flip"])
def test_a_fault_that_passes_costs_one_more_read(llama: Path, llama_tokens, kind: str) -> None:
    plan = lossless_plan(llama.parent / "disk", verify="first")
    made: list[FaultyEngine] = []

    def wrap(inner: Any) -> FaultyEngine:
        made.append(faulty(inner, kind, 5, times=1))
        return made[-1]

    assert tokens_of(streamed(llama, plan, wrap_engine=wrap), requests_of()) == llama_tokens
    assert made[0].faulty == {}


def test_memory_is_counted_as_it_is_used(llama: Path) -> None:
    """The ring's slots hold what records decode to, and nothing beside them."""
    plan = lossless_plan(llama.parent / "disk", resident_units=("embed",))
    streamed(llama, plan)
    plain = offload_plan(llama.parent / "plain", resident_units=("embed",))
    streamed(llama, plain)
    compressed, raw = store_in(llama.parent / "disk"), store_in(llama.parent / "plain")
    assert compressed.total_bytes < 0.8 * raw.total_bytes
    assert place_units(compressed, plan) == place_units(raw, plain)
    assert [r.image_bytes for r in compressed.records] == [r.num_bytes for r in raw.records]
    assert all(record.num_bytes % PAGE_BYTES == 0 for record in compressed.records)


@pytest.mark.parametrize("rank", [0, 1])
def test_shards_of_tensor_parallel_ranks(llama: Path, tmp_path: Path, rank: int) -> None:
    store = pack_model(
        str(llama),
        dtype="bfloat16",
        precision="native",
        compression="lossless",
        disk_path=str(tmp_path),
        rank=rank,
        size=2,
    )
    assert store.is_compressed


def test_what_cannot_be_compressed_is_refused(llama: Path, tmp_path: Path) -> None:
    for changes, message in (
        ({"compression": "zip"}, "compression 'zip' is not known"),
        ({"is_packed": False}, "nor compressed"),
        ({"share_resident": True, "resident_units": ("embed",)}, "cannot be shared"),
    ):
        with pytest.raises(ConfigError, match=message):
            streamed(llama, lossless_plan(tmp_path, **changes))
    with pytest.raises(ConfigError, match="only native bfloat16"):
        codec_of(lossless_plan(tmp_path, precision="int8"), "bfloat16", tmp_path)
    with pytest.raises(ConfigError, match="float32"):
        in_process_engine(llama, weights_factory=weights_of(lossless_plan(tmp_path)))
