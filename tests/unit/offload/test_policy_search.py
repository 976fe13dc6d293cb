"""The search against brute force, the residency theorem and its budgets."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from offload_shapes import GB, machine, uniform_model

from offload.compression import Compression
from offload.cost_model import PassLoad, pass_time
from offload.model_shape import ModelShape
from offload.policy_search import Candidate, Found, Objective, search
from offload.precision import Precision
from offload.rates import Rates
from offload.search_space import Activations, Budgets, Choices, Demand, host_bytes_of

MODEL = uniform_model(40, 500_000_000, kv_bytes_per_token=1_000_000)
"""40 GB in 1 GB layers; a request of 1000 tokens takes 1 GB of cache."""
NATIVE_RING = Choices(ring_slots=(3,))


def found(
    device_gb: float,
    max_rows: int,
    objective: Objective = Objective.THROUGHPUT,
    choices: Choices = NATIVE_RING,
    rates: Rates | None = None,
    model: ModelShape = MODEL,
    on_cpu: bool = False,
) -> Found:
    result = search(
        model,
        rates or machine(),
        Budgets(
            device_bytes=int(device_gb * GB),
            workspace_bytes=0,
            host_bytes=0 if on_cpu else 100 * GB,
            host_holds_weights=not on_cpu,
        ),
        Demand(max_rows=max_rows, context_tokens=1000, max_context=1000),
        objective,
        choices,
    )
    assert result is not None
    return result


def test_unlimited_demand_streams_everything() -> None:
    """d/dR of BW (M - R) / k / (W - R) has the sign of M - W: with a model larger than the device
    every byte of memory serves throughput best as cache."""
    best = found(23, 10_000).best
    assert best.placement.resident_layers == 0
    assert best.rows == 20  # (23 - 3 ring) GB / 1 GB


def test_bounded_demand_gives_the_rest_to_resident_layers() -> None:
    """R* = M - k x demand - ring."""
    best = found(23, 8).best
    assert best.rows == 8
    assert best.placement.resident_layers == 23 - 3 - 8


@pytest.mark.parametrize(
    ("decode_gb", "held_gb"),
    [(20, 12), (8, 12), (5, 3), (4, 0)],
    ids=["disk", "even", "both", "core"],
)
def test_what_memory_is_left_holds_records_unless_decoding_decides(
    decode_gb: int, held_gb: int
) -> None:
    """12 GB beside ring and cache: 14.8 GB of records to read where they hold records, and all 40
    to decode; with 12 resident layers 18.8 and 28."""
    rates = replace(machine(), decode_bytes_per_s=decode_gb * GB, device_is_host=True)
    choices = replace(NATIVE_RING, compressions=(Compression.LOSSLESS,), may_hold=True)
    model = replace(MODEL, stored_share=0.67)
    best = found(23, 8, choices=choices, rates=rates, model=model, on_cpu=True).best.placement
    assert (best.held_bytes, best.resident_layers) == (held_gb * GB, 12 - held_gb)


def test_more_is_never_held_than_there_is() -> None:
    choices = replace(NATIVE_RING, compressions=(Compression.LOSSLESS,), may_hold=True)
    rates = replace(machine(), decode_bytes_per_s=100 * GB, device_is_host=True)
    model = replace(MODEL, stored_share=0.67)
    searched = found(41, 1, choices=choices, rates=rates, model=model, on_cpu=True)
    held = [point.placement.held_bytes for point in searched.frontier]
    assert max(held) <= 0.67 * 40 * GB


def test_latency_gives_all_but_one_request_to_resident_layers() -> None:
    best = found(23, 10_000, Objective.LATENCY).best
    assert best.placement.resident_layers == 23 - 3 - 1
    assert best.tpot_s == pytest.approx(21 / 10)


def test_a_compute_bound_replica_keeps_no_more_layers_than_help() -> None:
    best = found(30, 4, rates=machine(flops=1e9)).best
    assert best.placement.resident_layers == 0


def test_formats_are_chosen_only_among_those_allowed_and_when_they_pay() -> None:
    every = Choices(precisions=tuple(Precision), ring_slots=(3,))
    assert found(20, 4).best.placement.precision is Precision.NATIVE
    assert found(20, 4, choices=every).best.placement.precision is Precision.INT4
    slow = machine(dequant=1e9)
    assert found(20, 4, choices=every, rates=slow).best.placement.precision is Precision.NATIVE


def test_layers_go_to_host_memory_before_disk_and_staging_counts() -> None:
    budgets = Budgets(device_bytes=10 * GB, workspace_bytes=0, host_bytes=20 * GB)
    demand = Demand(max_rows=1, context_tokens=1000, max_context=1000)
    result = search(MODEL, machine(), budgets, demand, Objective.THROUGHPUT, NATIVE_RING)
    assert result is not None
    assert result.best.placement.host_layers == 17  # three of 20 GB stage what comes from disk
    assert result.best.host_bytes == 20 * GB


def test_a_step_is_cut_where_memory_serves_better_as_cache_or_weights() -> None:
    """A whole step takes 8 GB of the device, micro-batches of 64 tokens 1 GB."""
    cuts = (
        Activations(micro_batch_tokens=0, workspace_bytes=8 * GB),
        Activations(micro_batch_tokens=64, workspace_bytes=GB),
    )
    whole, cut = (
        found(23, 10_000, choices=replace(NATIVE_RING, activations=entries)).best
        for entries in (cuts[:1], cuts)
    )
    assert (whole.rows, whole.workspace_bytes) == (12, 8 * GB)
    assert (cut.rows, cut.workspace_bytes) == (19, GB)
    assert cut.placement.micro_batch_tokens == 64
    # Where nothing is gained the step stays whole.
    demand = found(23, 4, rates=machine(flops=1e9), choices=replace(NATIVE_RING, activations=cuts))
    assert demand.best.placement.micro_batch_tokens == 0


def test_no_room_for_one_request_is_no_plan() -> None:
    budgets = Budgets(device_bytes=4 * GB, workspace_bytes=GB, host_bytes=0)
    demand = Demand(max_rows=1, context_tokens=10, max_context=1000)
    assert search(MODEL, machine(), budgets, demand, Objective.THROUGHPUT, NATIVE_RING) is None


def test_the_frontier_falls_in_latency_as_it_falls_in_throughput() -> None:
    frontier = found(23, 64, choices=Choices()).frontier
    assert len(frontier) >= 3
    for slower, faster in zip(frontier[1:], frontier, strict=False):
        assert slower.tpot_s > faster.tpot_s
        assert slower.tokens_per_s > faster.tokens_per_s


@given(
    layers=st.integers(4, 12),
    device_gb=st.floats(2, 14),
    host_gb=st.sampled_from([0, 3, 30]),
    max_rows=st.integers(1, 40),
    context=st.integers(1, 3000),
    disk=st.floats(0.5, 20),
    flops=st.sampled_from([1e9, 1e11, 1e14]),
    objective=st.sampled_from(Objective),
)
def test_nothing_in_the_space_is_better_and_budgets_hold(
    layers: int,
    device_gb: float,
    host_gb: int,
    max_rows: int,
    context: int,
    disk: float,
    flops: float,
    objective: Objective,
) -> None:
    model = uniform_model(layers, 500_000_000, kv_bytes_per_token=10**6, fixed_bytes=GB // 2)
    rates = machine(disk=disk * GB, flops=flops)
    budgets = Budgets(
        device_bytes=int(device_gb * GB),
        workspace_bytes=GB // 10,
        host_bytes=host_gb * GB,
        host_holds_weights=host_gb > 0,
    )
    demand = Demand(max_rows=max_rows, context_tokens=context, max_context=1000)
    choices = Choices(precisions=tuple(Precision))
    result = search(model, rates, budgets, demand, objective, choices)
    if result is None:
        return
    for candidate in (result.best, *result.frontier):
        check_budgets(model, rates, budgets, demand, candidate)
    fastest, widest = result.frontier[0], result.frontier[-1]
    if objective is Objective.THROUGHPUT:
        assert result.best.tokens_per_s == pytest.approx(widest.tokens_per_s, rel=1e-3)
    else:
        assert result.best.tpot_s == pytest.approx(fastest.tpot_s, rel=1e-3)
    assert result.best.rows <= result.chunk_tokens


def check_budgets(
    model: ModelShape, rates: Rates, budgets: Budgets, demand: Demand, candidate: Candidate
) -> None:
    placement = candidate.placement
    used = candidate.device_bytes + candidate.kv_bytes + candidate.workspace_bytes
    assert used <= budgets.device_bytes
    assert candidate.device_bytes == placement.weight_bytes(model)
    host = host_bytes_of(model, placement) if budgets.host_holds_weights else 0
    assert host == candidate.host_bytes <= budgets.host_bytes
    assert candidate.rows <= candidate.max_rows <= demand.max_rows
    assert candidate.kv_bytes >= model.kv_bytes_per_token * max(
        demand.max_context, (candidate.rows - 1) * demand.context_tokens
    )
    load = PassLoad(rows=candidate.rows, context_tokens=demand.context_tokens)
    assert candidate.tpot_s == pass_time(model, placement, rates, load).total_s
