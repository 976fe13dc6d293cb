"""Models that are streamed to GPUs: what lives on which tier, how fast, and every refusal."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_checkpoints import LLAMA_3_8B
from planned_models import GIB, node, plan_model, rates_for_tests, refused

from cluster.base.errors import ConfigError
from cluster.base.plan import ClusterPlan, EngineKind, ModelPlan
from cluster.dist.topology import Topology
from cluster.planner.explain import explain
from offload.machine_rates import RatesRequest
from offload.model_shape import model_shape
from offload.rates import GemmPoint, Rates
from replicas.leader.seating import rank_bytes
from replicas.models.hf_config import arch_from_hf

SMALL_GPU = Topology(nodes=(node(16, 64, (12,)),))
"""16 GB of weights, 12 GiB of device."""
SHAPE = model_shape(arch_from_hf(LLAMA_3_8B), 1, "bfloat16")
LAYER = SHAPE.layers[0].base.native_bytes


def planned(tmp_path: Path, topology: Topology = SMALL_GPU, **model: Any) -> ClusterPlan:
    rates = model.pop("rates", gpu_rates)
    entry = {"engine": "offload", "limits": {"max_context": 2048}, "device": "cuda", **model}
    return plan_model(tmp_path, topology, LLAMA_3_8B, rates=rates, **entry)


def gpu_rates(request: RatesRequest) -> Rates:
    """20 GB/s from host to device, 3 GB/s from disk; the device computes faster than that."""
    points = (GemmPoint(tokens=1, flops_per_s=2e12), GemmPoint(tokens=64, flops_per_s=1e14))
    return replace(
        rates_for_tests(request),
        memory_bytes_per_s=2e12,
        gemm=points,
        int8_gemm=points,
        int4_gemm=points,
    )


def streamed(tmp_path: Path, topology: Topology = SMALL_GPU, **model: Any) -> ModelPlan:
    return planned(tmp_path, topology, **model).models[0]


def test_auto_streams_what_the_gpu_does_not_hold_from_host_memory(tmp_path: Path) -> None:
    model = streamed(tmp_path, engine="auto", device="auto")
    assert model.engine is EngineKind.OFFLOAD
    assert model.device == "cuda"
    assert model.gpus_per_rank == 1.0
    assert model.memory.total_bytes <= 12 * GIB
    offload = model.offload
    held = [name for name in offload.resident_units if name.startswith("layer")]
    on_host = [name for name in offload.host_units if name.startswith("layer")]
    assert len(held) + len(on_host) == 32
    assert offload.kv_home == "device"
    assert "in host memory" in model.reasons["engine"]
    assert "disk" not in model.reasons["engine"]
    # All of it on the link, nothing on the disk; 20 GB/s between host and device.
    assert (model.speed.disk_bytes, model.speed.host_bytes) == (0, len(on_host) * LAYER)
    assert model.speed.chosen.tpot_s >= model.speed.host_bytes / 20e9


def test_the_host_budget_is_what_is_used_and_is_booked_on_the_node(tmp_path: Path) -> None:
    model = streamed(tmp_path)
    assert model.offload.host_bytes == model.memory.host_bytes == rank_bytes(model)
    layers = [name for name in model.offload.host_units if name.startswith("layer")]
    others = SHAPE.fixed_bytes if "embed" in model.offload.host_units else 0
    assert model.memory.host_bytes == len(layers) * LAYER + others
    asked = streamed(tmp_path, offload={"host_memory": "30GiB"})
    assert asked.offload.host_bytes == 30 * GIB


def test_what_host_memory_does_not_hold_comes_from_disk_through_staging(tmp_path: Path) -> None:
    asked = {"device_memory": "8GiB", "host_memory": "6GiB", "ring_slots": 3, "resident": 4}
    plan = planned(tmp_path, offload=asked)
    (model,) = plan.models
    on_host = len(model.offload.host_units)
    assert on_host == (6 * GIB - 3 * LAYER) // LAYER
    assert model.memory.host_bytes == (on_host + 3) * LAYER
    assert model.speed.disk_bytes == (32 - 4 - on_host) * LAYER
    assert f"4 on the device, {on_host} in host memory" in model.reasons["engine"]
    tables = {table.title: table for table in explain(plan)}
    (row,) = tables["Where the weights of streamed models are"].rows
    assert row[3].startswith(f"{on_host} layers: 5.")


def test_a_wider_link_is_a_faster_plan(tmp_path: Path) -> None:
    def wide(request: RatesRequest) -> Rates:
        assert (request.device, request.device_kind) == ("cuda", "GPU")
        return replace(gpu_rates(request), link_bytes_per_s=60e9)

    limits = {"max_context": 2048, "max_running_requests": 4}
    slow, fast = (streamed(tmp_path, rates=rates, limits=limits) for rates in (gpu_rates, wide))
    assert slow.speed.chosen.bound == "host to device link"
    assert fast.speed.chosen.tpot_s == pytest.approx(slow.speed.chosen.tpot_s / 3, rel=0.05)


def test_ranks_of_a_split_model_share_the_nodes_memory(tmp_path: Path) -> None:
    box = Topology(nodes=(node(16, 24, (6, 6)),))
    model = streamed(tmp_path, box, parallel={"tp": 2})
    assert model.tp_size == 2
    assert 2 * model.memory.host_bytes <= 24 * GIB
    assert model.memory.total_bytes <= 6 * GIB


@pytest.mark.parametrize(
    ("offload", "param", "told"),
    [
        ({"kv_home": "host"}, "offload.kv_home", "have their cache there"),
        ({"kv_home": "streamed", "host_memory": "8GiB"}, "offload.kv_home", "is for weights"),
        ({"share_resident": "always"}, "offload.share_resident", "each GPU's own memory"),
        ({"device_memory": "20GiB"}, "offload.device_memory", "20GiB is asked for each rank, and"),
        ({"host_memory": "900GiB"}, "offload.host_memory", "900GiB is asked for each rank, and"),
        ({"host_memory": "100MiB"}, "offload.host_memory", "Too little host memory to stream"),
        ({"device_memory": "1GiB"}, "offload.device_memory", "Too little device memory"),
    ],
)
def test_refusals_show_the_arithmetic(
    tmp_path: Path, offload: dict[str, Any], param: str, told: str
) -> None:
    entry = {"engine": "offload", "limits": {"max_context": 2048}, "device": "cuda"}
    error = refused(tmp_path, SMALL_GPU, LLAMA_3_8B, **entry, offload=offload)
    assert error.param == f"models[0].{param}"
    assert told in error.cause


def test_too_little_host_memory_names_what_is_enough(tmp_path: Path) -> None:
    entry = {"engine": "offload", "limits": {"max_context": 2048}, "device": "cuda"}
    error = refused(tmp_path, SMALL_GPU, LLAMA_3_8B, **entry, offload={"host_memory": "100MiB"})
    enough = error.remedy.removeprefix("Raise offload.host_memory to ").removesuffix(".")
    model = streamed(tmp_path, offload={"host_memory": f"{1.01 * float(enough[:-3]):.0f}MiB"})
    assert "on disk" in model.reasons["engine"]


MIXTURE = {
    **LLAMA_3_8B,
    "architectures": ["MixtralForCausalLM"],
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.0,
}
BIG_BOX = Topology(nodes=(node(32, 256, (24,)),))


def mixture(tmp_path: Path, config: Any = MIXTURE, **model: Any) -> ModelPlan:
    limits = {"max_context": 2048, "max_running_requests": 1}
    entry: dict[str, Any] = {"engine": "offload", "limits": limits, "device": "cuda"}
    return plan_model(tmp_path, BIG_BOX, config, **{**entry, "rates": beside, **model}).models[0]


def beside(request: RatesRequest) -> Rates:
    """Host cores that read their memory four times as fast as the link gives it."""
    return replace(
        gpu_rates(request),
        host_memory_bytes_per_s=80e9,
        host_flops_per_s=1e12,
        disk_bytes_per_s=1e9,
    )


def test_the_host_computes_experts_where_that_is_predicted_to_be_sooner(tmp_path: Path) -> None:
    model = mixture(tmp_path)
    costs = model.offload.host_experts
    assert costs is not None
    assert (costs.link_bytes_per_s, costs.host_bytes_per_s) == (20e9, 80e9)
    assert "computed by the host's cores" in model.reasons["engine"]
    assert model.num_threads > 1
    never = mixture(tmp_path, offload={"host_experts": "never"})
    assert never.offload.host_experts is None
    assert never.num_threads == 1
    assert model.speed.chosen.tpot_s < 0.6 * never.speed.chosen.tpot_s
    assert model.speed.host_bytes < never.speed.host_bytes


def test_slow_cores_compute_none_unless_told(tmp_path: Path) -> None:
    def slow(request: RatesRequest) -> Rates:
        return replace(beside(request), host_memory_bytes_per_s=1e8, host_flops_per_s=1e8)

    assert mixture(tmp_path, rates=slow).offload.host_experts is None
    told = mixture(tmp_path, rates=slow, offload={"host_experts": "always"})
    assert told.offload.host_experts is not None


@pytest.mark.parametrize(
    ("config", "device", "precision", "told"),
    [
        (LLAMA_3_8B, "cuda", "native", "the model is dense"),
        (MIXTURE, "cpu", "native", "the ranks run on the CPU"),
        (MIXTURE, "cuda", "int4", "int4 codes are computed with on the GPU only"),
    ],
)
def test_host_experts_that_cannot_be_are_refused(
    tmp_path: Path, config: Any, device: str, precision: str, told: str
) -> None:
    asked = {"host_experts": "always", "precision": precision}
    with pytest.raises(ConfigError, match=told) as caught:
        mixture(tmp_path, config, device=device, offload=asked)
    assert caught.value.param == "models[0].offload.host_experts"
