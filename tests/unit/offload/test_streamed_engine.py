"""Streamed weights give the tokens of transformers: every family, every ring, under pressure."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.base.env import default_cache_dir
from cluster.base.errors import (
    ConfigError,
    CorruptWeightsError,
    PenstockError,
    WeightStreamError,
)
from offload.budget import BudgetError
from offload.readers.engine import ReadEngine
from replicas.api import FinishReason, GenerationRequest, SamplingParams
from tests.support.in_process_engine import generate_pipelined, in_process_engine
from tests.support.offload_engine import (
    FaultyEngine,
    HeldEngine,
    offload_engine,
    offload_plan,
    unit_names,
    weights_of,
)
from tests.support.tiny_models import (
    TINY_NAMES,
    prompt_tokens,
    reference_greedy,
    tiny_model,
    write_checkpoint,
)

NUM_TOKENS = 10
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS)
READERS = ("aio", "direct", "buffered")


def requests_of(params: SamplingParams = GREEDY) -> list[GenerationRequest]:
    return [
        GenerationRequest(
            request_id=f"r{index}",
            prompt_token_ids=tuple(prompt_tokens(length, seed=index)),
            params=params,
        )
        for index, length in enumerate((1, 5, 23, 12))
    ]


def references(name: str) -> list[list[int]]:
    model = tiny_model(name)
    return [
        reference_greedy(model, list(request.prompt_token_ids), NUM_TOKENS)
        for request in requests_of()
    ]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("llama", tmp_path_factory.mktemp("checkpoint") / "llama")


@pytest.fixture(scope="module")
def llama_tokens() -> list[list[int]]:
    return references("llama")


@pytest.mark.parametrize("name", TINY_NAMES)
def test_every_family_streams_to_the_tokens_of_transformers(name: str, tmp_path: Path) -> None:
    path = write_checkpoint(name, tmp_path / name)
    engine = offload_engine(path, offload_plan(tmp_path / "disk"), max_step_tokens=7)
    assert [c.token_ids for c in engine.generate(requests_of())] == references(name)


@pytest.mark.parametrize(
    ("ring_slots", "depth"), [(1, 1), (2, 1), (2, 2), (3, 2), (3, 3), (4, 3), (9, 9)]
)
@pytest.mark.parametrize("resident", [(), ("embed", "norm"), ("layer.1", "head"), "all"])
def test_every_ring_and_every_residency(
    llama: Path, llama_tokens, tmp_path: Path, ring_slots, depth, resident
) -> None:
    names = tuple(unit_names(llama)) if resident == "all" else resident
    plan = offload_plan(
        llama.parent / "disk", ring_slots=ring_slots, prefetch_depth=depth, resident_units=names
    )
    engine = offload_engine(llama, plan)
    assert [c.token_ids for c in engine.generate(requests_of())] == llama_tokens


def test_units_that_stay_are_waited_for_when_they_are_used(llama: Path, llama_tokens) -> None:
    """Not before: an engine is there while all of its resident weights are still being read."""
    names = tuple(unit_names(llama))
    engines: list[HeldEngine] = []

    def wrap(inner: ReadEngine) -> ReadEngine:
        engines.append(HeldEngine(inner))
        return engines[-1]

    plan = offload_plan(llama.parent / "disk", resident_units=names)
    engine = in_process_engine(llama, weights_factory=weights_of(plan, wrap_engine=wrap))
    (held,) = engines
    assert held.num_ended == 0
    held.may_end.set()
    assert [c.token_ids for c in engine.generate(requests_of())] == llama_tokens
    assert held.num_ended == held.num_reads
    assert held.is_closed


@pytest.mark.parametrize("kind", ["error", "flip"])
def test_a_unit_that_stays_and_cannot_be_read_is_a_coded_error(llama: Path, kind: str) -> None:
    plan = offload_plan(llama.parent / "disk", resident_units=("layer.1",))
    factory = weights_of(plan, wrap_engine=lambda inner: FaultyEngine(inner, kind))
    engine = in_process_engine(llama, weights_factory=factory)
    with pytest.raises(CorruptWeightsError if kind == "flip" else WeightStreamError):
        engine.generate(requests_of())


@pytest.mark.parametrize("reader", READERS)
def test_every_reader(llama: Path, llama_tokens, reader: str) -> None:
    plan = offload_plan(llama.parent / "disk", reader=reader, verify="first")
    try:
        engine = offload_engine(llama, plan)
    except ConfigError as error:
        pytest.skip(f"the reader {reader} cannot be used here: {error}")
    assert [c.token_ids for c in engine.generate(requests_of())] == llama_tokens


@pytest.mark.parametrize(
    "limits",
    [
        {"num_blocks": 10, "max_step_tokens": 16},
        {"max_step_tokens": 3},
        {"max_running_requests": 2, "prefix_caching": False},
    ],
)
def test_batching_and_preemption_change_no_token(llama: Path, llama_tokens, limits) -> None:
    engine = offload_engine(llama, offload_plan(llama.parent / "disk"), **limits)
    completions = engine.generate(requests_of())
    assert [c.token_ids for c in completions] == llama_tokens
    assert (engine.stats.num_preemptions > 0) == ("num_blocks" in limits)


def test_sampled_streams_with_scores_equal_resident_ones(llama: Path) -> None:
    """Prompt scores ask for the head again and again, which the ring does not foresee."""
    params = SamplingParams(
        temperature=1.1, top_p=0.9, seed=7, max_tokens=NUM_TOKENS, n=2, prompt_logprobs=2
    )
    resident = in_process_engine(llama).generate(requests_of(params))
    plan = offload_plan(llama.parent / "disk")
    engines = [offload_engine(llama, plan, max_step_tokens=6) for _ in range(2)]
    for completions in (
        engines[0].generate(requests_of(params)),
        generate_pipelined(engines[1], requests_of(params)),
    ):
        assert [c.token_ids for c in completions] == [c.token_ids for c in resident]
        assert [c.prompt_logprobs for c in completions] == [c.prompt_logprobs for c in resident]


def test_an_aborted_request_leaves_the_others_alone(llama: Path, llama_tokens) -> None:
    engine = offload_engine(llama, offload_plan(llama.parent / "disk"), max_step_tokens=8)
    tokens: dict[str, list[int]] = {request.request_id: [] for request in requests_of()}
    for request in requests_of():
        engine.add(request)
    reasons = {}
    for number, delta in enumerate(engine.run()):
        tokens[delta.request_id] += delta.token_ids
        if delta.finish_reason is not None:
            reasons[delta.request_id] = delta.finish_reason
        if number == 3:
            engine.abort("r2")
    for index, name in enumerate(tokens):
        if name != "r2":
            assert tokens[name] == llama_tokens[index]
            assert reasons[name] is FinishReason.LENGTH
    assert len(tokens["r2"]) < NUM_TOKENS


def test_what_does_not_fit_is_refused_with_the_sum(llama: Path) -> None:
    plan = offload_plan(llama.parent / "disk", device_bytes=200_000, resident_units=("embed",))
    with pytest.raises(BudgetError, match=r"are needed: .*key/value cache .* ring of 3 slots"):
        offload_engine(llama, plan)


def test_settings_that_mean_nothing_are_refused(llama: Path) -> None:
    for changes, message in (
        ({"resident_units": ("layer.9",)}, "no weight units layer.9"),
        ({"verify": "never"}, "verify"),
        ({"precision": "int3"}, "precision"),
        ({"reader": "mmap"}, "no reader"),
    ):
        with pytest.raises(ConfigError, match=message):
            offload_engine(llama, offload_plan(llama.parent / "disk", **changes))


def faulty_engine(llama: Path, kind: str, at: int, **fields):
    plan = offload_plan(llama.parent / "disk", ring_slots=2, prefetch_depth=2)
    engines = []

    def wrap(inner):
        engines.append(FaultyEngine(inner, kind, at, **fields))
        return engines[-1]

    factory = weights_of(plan, wrap_engine=wrap)
    return in_process_engine(llama, weights_factory=factory), engines


@pytest.mark.parametrize("kind", ["error", "short", "flip"])
@pytest.mark.parametrize("at", [0, 4, 17])
def test_a_fault_that_stays_is_a_coded_error_and_never_a_token(llama, llama_tokens, kind, at):
    engine, _ = faulty_engine(llama, kind, at)
    for request in requests_of():
        engine.add(request)
    tokens: dict[str, list[int]] = {request.request_id: [] for request in requests_of()}
    expected = CorruptWeightsError if kind == "flip" else WeightStreamError

    def run() -> None:
        for delta in engine.run():
            tokens[delta.request_id] += delta.token_ids

    with pytest.raises(expected):
        run()
    for index, name in enumerate(tokens):
        assert tokens[name] == llama_tokens[index][: len(tokens[name])]


@pytest.mark.parametrize("kind", ["error", "short", "flip"])
def test_a_fault_that_passes_costs_one_more_read(llama, llama_tokens, kind) -> None:
    engine, engines = faulty_engine(llama, kind, 5, times=1)
    assert [c.token_ids for c in engine.generate(requests_of())] == llama_tokens
    assert engines[0].faulty == {}


def test_a_flipped_bit_on_the_disk_is_found_at_the_first_read(llama, tmp_path: Path) -> None:
    plan = offload_plan(tmp_path, verify="first")
    offload_engine(llama, plan)
    (store,) = tmp_path.glob("*.weights")
    data = bytearray(store.read_bytes())
    data[4096 + 1000] ^= 1
    store.write_bytes(data)

    def generate() -> None:
        offload_engine(llama, plan).generate(requests_of())

    with pytest.raises(PenstockError) as caught:
        generate()
    assert caught.value.code == "corrupt_weights"


def test_closing_twice_is_harmless(llama: Path) -> None:
    built = []
    factory = weights_of(offload_plan(llama.parent / "disk"))

    def remember(request):
        built.append(factory(request))
        return built[-1]

    in_process_engine(llama, weights_factory=remember).generate(requests_of())
    stats = built[0].stats
    assert stats.reader == "buffered"
    assert stats.ring.num_bytes > 0
    built[0].close()
    built[0].close()
    assert default_cache_dir().exists()
