"""Experts that the host computes: the division is the best one, and tokens stay what they are."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.base.env import default_cache_dir
from cluster.base.plan import HostExpertsPlan
from offload.assembly import open_weights
from offload.expert_cache import ExpertCache
from offload.expert_division import ExpertWork, compute_s, divide, fetch_s, num_for_host
from offload.pack import StoreRequest, ensure_store
from offload.packers import NativePacker
from offload.placement import place_units
from offload.provider import StreamedWeights
from offload.readers.choose import openers
from offload.runtime import Runtime
from replicas.api import GenerationRequest, SamplingParams
from tests.support.fake_link import FakeLink
from tests.support.fake_streams import FakeDevice
from tests.support.in_process_engine import in_process_engine
from tests.support.offload_engine import offload_plan, unit_names

DEMO = Path(__file__).parents[3] / "examples" / "models" / "demo-moe"
COSTS = HostExpertsPlan(
    link_bytes_per_s=20e9, host_bytes_per_s=80e9, host_flops_per_s=400e9, call_s=2e-5
)
EXPERT = ExpertWork(unit="e", num_bytes=2 * 50_000_000, num_weights=50_000_000, row_bytes=24_000)


def works(rows: list[int]) -> list[ExpertWork]:
    return [replace(EXPERT, unit=f"e{index}", rows=count) for index, count in enumerate(rows)]


def end_s(all_works: list[ExpertWork], computed: set[str]) -> float:
    host = sum(compute_s(work, COSTS) for work in all_works if work.unit in computed)
    return max(host, sum(fetch_s(w, COSTS) for w in all_works if w.unit not in computed))


@given(st.lists(st.integers(1, 64), max_size=7))
def test_no_other_division_ends_sooner(rows: list[int]) -> None:
    given_works = works(rows)
    names = [work.unit for work in given_works]
    every = itertools.chain.from_iterable(
        itertools.combinations(names, count) for count in range(len(names) + 1)
    )
    best = min(end_s(given_works, set(chosen)) for chosen in every)
    assert end_s(given_works, set(divide(given_works, COSTS))) == pytest.approx(best)


def test_few_rows_are_computed_where_the_expert_lies_and_many_are_not() -> None:
    """100 MB: 5 ms over the link, 1.25 ms out of the host's memory, 0.25 ms for each row."""
    assert fetch_s(EXPERT, COSTS) == pytest.approx(5e-3)
    one = compute_s(replace(EXPERT, rows=1), COSTS)
    assert one == pytest.approx(1.25e-3 + 0.25e-3 + 24_000 / 20e9 + 2e-5)
    assert divide(works([1]), COSTS) == ["e0"]
    assert divide(works([64]), COSTS) == []
    assert divide(works([64, 1, 2]), COSTS) == ["e1", "e2"]
    far = replace(COSTS, host_bytes_per_s=1e9)
    assert divide(works([1, 1]), far) == []


class FakeHost:
    """Whatever is asked for and missing, the host computes."""

    def chosen(self, rows):
        return list(rows)

    def tensors(self, unit):
        return {"where": torch.tensor([-1])}


def test_what_the_host_computes_is_not_fetched_until_it_is_worth_a_slot() -> None:
    units = [f"layer.0.expert.{i}" for i in range(6)]
    link = FakeLink(dict.fromkeys(units, 100), bytes_per_s=1e9)
    cache = ExpertCache(units, 2, link, FakeHost())  # type: ignore[arg-type]

    def visit(*names: str) -> list[int]:
        order = cache.announce(names, [1] * len(names))
        for index in order:
            cache.acquire(names[index])
            cache.release(names[index])
        return order

    visit(*units[:2])  # empty slots: they are fetched
    assert (cache.num_misses, cache.num_on_host) == (2, 0)
    assert visit(units[3], units[0]) == [1, 0]
    assert (cache.num_hits, cache.num_on_host) == (1, 1)
    visit(units[3])
    visit(units[3])
    assert units[3] in link.held.values()
    assert link.stats.num_reads == 3


def two_tiers(disk: Path, costs: HostExpertsPlan, made: list[StreamedWeights]) -> Callable:
    """Streamed weights whose experts all lie in host memory, behind slots on a second stage."""

    def make(request):
        model = request.model
        store = ensure_store(
            StoreRequest(
                model_path=request.spec.model_path,
                units=model.units,
                dtype=request.spec.dtype,
                packer=NativePacker(model.kernels, getattr(torch, request.spec.dtype)),
                disk_path=str(disk),
            )
        )
        names = unit_names(DEMO)
        plan = offload_plan(
            disk,
            resident_units=tuple(name for name in names if ".expert." not in name),
            host_units=tuple(name for name in names if ".expert." in name),
            host_experts=costs,
            expert_slots=6,
        )
        device = FakeDevice(computes_at_once=True)
        runtime = Runtime(cache_dir=default_cache_dir(), poison=True, streams=lambda _: device)
        readers = openers(store.path, default_cache_dir())
        made.append(open_weights(store, place_units(store, plan), plan, runtime, request, readers))
        return made[-1]

    return make


@pytest.mark.parametrize("link", [1.0, 1e7, 1e15])
def test_tokens_are_those_of_a_resident_model_whoever_computes(link: float, tmp_path: Path) -> None:
    """A slow link leaves all to the host, a fast one nothing, one in between some of it."""
    costs = HostExpertsPlan(
        link_bytes_per_s=link, host_bytes_per_s=1e9, host_flops_per_s=1e9, call_s=0.0
    )
    requests = [
        GenerationRequest(
            request_id=f"r{index}",
            prompt_token_ids=tuple(range(4 + index, 9 + 3 * index)),
            params=SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True),
        )
        for index in range(3)
    ]
    made: list[StreamedWeights] = []
    engine = in_process_engine(DEMO, weights_factory=two_tiers(tmp_path, costs, made))
    tokens = [c.token_ids for c in engine.generate(requests)]
    assert tokens == [c.token_ids for c in in_process_engine(DEMO).generate(requests)]
    stats = made[0].stats
    assert (stats.num_experts_on_host == 0) == (link == 1e15)
    assert stats.num_expert_hits > 0
    assert stats.num_expert_misses > 0


@given(st.integers(0, 64), st.integers(1, 64))
def test_equal_experts_are_divided_in_closed_form(count: int, rows: int) -> None:
    work = replace(EXPERT, rows=rows)
    every = [replace(work, unit=f"e{index}") for index in range(count)]
    by_search = len(divide(every, COSTS))
    by_form = num_for_host(count, work, COSTS)
    times = [
        max(host * compute_s(work, COSTS), (count - host) * fetch_s(work, COSTS))
        for host in (by_search, by_form)
    ]
    assert times[0] == pytest.approx(times[1])
