"""Models that are streamed: when, how, at what predicted speed, and every refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fake_checkpoints import LLAMA_3_8B, TINY, write_checkpoint
from planned_models import GIB, LAPTOP, node, plan_model, rates_for_tests, refused

from cluster.base.amount_text import size_text
from cluster.base.plan import (
    ClusterPlan,
    EngineKind,
    ModelPlan,
    OverflowPlan,
    SpeculationPlan,
    from_json,
    to_json,
)
from cluster.base.spec import ClusterSpec
from cluster.dist.topology import Topology
from cluster.planner.explain import explain, explain_reasons
from cluster.planner.planner import make_plan
from offload.homes import Placement
from offload.model_shape import model_shape
from replicas.models.hf_config import arch_from_hf


def streamed(tmp_path: Path, topology: Topology = LAPTOP, **model: Any) -> ModelPlan:
    entry = {"engine": "offload", "limits": {"max_context": 2048}, **model}
    (plan,) = plan_model(tmp_path, topology, LLAMA_3_8B, **entry).models
    return plan


def test_auto_streams_a_model_that_does_not_fit_and_says_so(tmp_path: Path) -> None:
    plan = plan_model(tmp_path, LAPTOP, LLAMA_3_8B, engine="auto", limits={"max_context": 2048})
    (model,) = plan.models
    assert model.engine is EngineKind.OFFLOAD
    assert model.dtype == "bfloat16"
    assert "do not fit the machine" in model.reasons["engine"]
    assert "on disk" in model.reasons["engine"]
    assert any("offload replica" in warning for warning in plan.warnings)
    assert model.offload is not None
    assert model.speed is not None


def test_auto_holds_a_model_that_fits(tmp_path: Path) -> None:
    plan = plan_model(tmp_path, node_of(64), LLAMA_3_8B, engine="auto", dtype="bfloat16")
    assert plan.models[0].engine is EngineKind.TENSOR_PARALLEL
    assert plan.models[0].offload is None


def node_of(gib: float, cores: int = 16) -> Topology:
    return Topology(nodes=(node(cores, gib),))


def test_auto_takes_device_memory_as_the_size_to_stream_above(tmp_path: Path) -> None:
    asked = {"engine": "auto", "offload": {"device_memory": "4GiB"}, "dtype": "bfloat16"}
    plan = plan_model(tmp_path, node_of(64), LLAMA_3_8B, **asked, limits={"max_context": 2048})
    assert plan.models[0].engine is EngineKind.OFFLOAD
    assert plan.models[0].offload.device_bytes == 4 * GIB
    plan = plan_model(tmp_path, node_of(64), TINY, engine="auto", offload={})
    assert plan.models[0].engine is EngineKind.TENSOR_PARALLEL
    assert any("section has no effect" in warning for warning in plan.warnings)


def test_asked_for_although_it_fits_is_a_warning_with_both_speeds(tmp_path: Path) -> None:
    plan = plan_model(tmp_path, node_of(64), TINY, engine="offload")
    assert plan.models[0].engine is EngineKind.OFFLOAD
    assert any("although the model fits" in w and "tokens/s" in w for w in plan.warnings)


@pytest.mark.parametrize("precision", ["native", "int8", "int4"])
@pytest.mark.parametrize("objective", ["throughput", "latency"])
def test_what_a_rank_holds_fits_its_budget(tmp_path: Path, precision: str, objective: str) -> None:
    asked = {"device_memory": "6GiB", "precision": precision, "objective": objective}
    model = streamed(tmp_path, offload=asked)
    offload, shape = model.offload, model_shape(arch_from_hf(LLAMA_3_8B), 1, "bfloat16")
    resident = [name for name in offload.resident_units if name.startswith("layer.")]
    placement = Placement(
        resident_layers=len(resident),
        host_layers=0,
        fixed_resident="head" in offload.resident_units,
        precision=offload.precision,
        ring_slots=offload.ring_slots,
    )
    assert placement.weight_bytes(shape) == model.memory.weights_bytes
    held = model.memory.weights_bytes + model.kv.bytes_per_rank + offload.workspace_bytes
    assert held <= offload.device_bytes == 6 * GIB
    assert model.kv.num_blocks * model.kv.block_size >= 2048
    assert resident == [f"layer.{index}" for index in range(len(resident))]
    assert offload.host_units == ()
    assert offload.prefetch_depth == offload.ring_slots


def test_latency_keeps_more_layers_and_is_faster_alone(tmp_path: Path) -> None:
    plans = {
        objective: streamed(tmp_path, offload={"device_memory": "10GiB", "objective": objective})
        for objective in ("throughput", "latency")
    }
    speeds = {objective: plan.speed for objective, plan in plans.items()}
    assert speeds["latency"].disk_bytes < speeds["throughput"].disk_bytes
    assert speeds["latency"].chosen.tpot_s < speeds["throughput"].chosen.tpot_s
    assert speeds["throughput"].chosen.tokens_per_s > speeds["latency"].chosen.tokens_per_s


def test_the_step_is_the_balance_batch_unless_the_user_says(tmp_path: Path) -> None:
    model = streamed(tmp_path, offload={"device_memory": "8GiB"})
    assert "hides" in model.reasons["scheduler.max_step_tokens"]
    asked = streamed(
        tmp_path,
        offload={"device_memory": "8GiB"},
        limits={"max_context": 2048, "max_step_tokens": 48},
    )
    assert asked.scheduler.max_step_tokens == 48
    assert "scheduler.max_step_tokens" not in asked.reasons


def test_the_step_timeout_leaves_room_for_a_slow_disk(tmp_path: Path) -> None:
    model = streamed(tmp_path, offload={"device_memory": "6GiB"})
    assert model.scheduler.step_timeout_s >= 10 * model.speed.chosen.tpot_s
    assert "longest step" in model.reasons["scheduler.step_timeout_s"]


def test_settings_reach_the_plan(tmp_path: Path) -> None:
    asked = {
        "device_memory": "12GiB",
        "disk_path": "stores",
        "precision": "int8",
        "ring_slots": 4,
        "resident": 5,
    }
    offload = streamed(tmp_path, offload=asked).offload
    assert offload.disk_path == str(tmp_path / "stores")
    at_home = streamed(tmp_path, offload={"disk_path": "~/stores"}).offload
    assert at_home.disk_path == str(Path.home() / "stores")
    assert (offload.precision, offload.ring_slots) == ("int8", 4)
    assert sum(name.startswith("layer.") for name in offload.resident_units) == 5


@pytest.mark.parametrize(
    ("model", "param", "told"),
    [
        ({"offload": {"device_memory": "900GiB"}}, "offload.device_memory", "are left for it"),
        ({"offload": {"device_memory": "1GiB"}}, "offload.device_memory", "asked ring of 2"),
        ({"kv_cache": {"memory": "8MiB"}}, "kv_cache.memory", "one request of 2048 tokens takes"),
        ({"offload": {"resident": 32}}, "offload.resident", "0 are left to stream"),
        ({"offload": {"resident": 30, "ring_slots": 3}}, "offload.ring_slots", "3 slots"),
    ],
)
def test_refusals_show_the_arithmetic(
    tmp_path: Path, model: dict[str, Any], param: str, told: str
) -> None:
    entry = {"engine": "offload", "limits": {"max_context": 2048}, **model}
    error = refused(tmp_path, LAPTOP, LLAMA_3_8B, **entry)
    assert error.param == f"models[0].{param}"
    assert told in error.cause
    assert error.remedy


def test_the_remedy_of_a_small_budget_works(tmp_path: Path) -> None:
    entry = {"engine": "offload", "limits": {"max_context": 2048}, "dtype": "bfloat16"}
    small = refused(tmp_path, LAPTOP, LLAMA_3_8B, **entry, offload={"device_memory": "1GiB"})
    size = small.remedy.split("device_memory to ")[1].split(",")[0]
    enough = float(size.removesuffix("GiB")) * 1.01
    plan_model(
        tmp_path,
        LAPTOP,
        LLAMA_3_8B,
        **entry,
        offload={"device_memory": f"{enough:.4f}GiB"},
    )


def test_neither_whole_nor_streamed_tells_both(tmp_path: Path) -> None:
    error = refused(tmp_path, node_of(2.8), LLAMA_3_8B, engine="auto", limits={"max_context": 2048})
    assert "Not enough memory" in error.cause
    assert "Streaming the weights fails too" in error.cause


def test_an_automatic_budget_leaves_other_models_their_memory(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "ckpt", LLAMA_3_8B)
    write_checkpoint(tmp_path / "tiny", TINY)
    streamed_model = {"name": "a", "path": "ckpt", "engine": "offload"}
    spec = ClusterSpec.model_validate(
        {"models": [streamed_model, {"name": "b", "path": "tiny", "dtype": "float32"}]}
    )
    plan: ClusterPlan = make_plan(spec, LAPTOP, directory=tmp_path, rates=rates_for_tests)
    assert [model.name for model in plan.models] == ["a", "b"]
    used = sum(model.memory.total_bytes for model in plan.models)
    assert used < 16 * GIB, size_text(used)


def test_a_streamed_plan_travels_as_json_and_explains_itself(tmp_path: Path) -> None:
    plan = plan_model(tmp_path, LAPTOP, LLAMA_3_8B, engine="offload")
    assert from_json(ClusterPlan, to_json(plan)) == plan
    tables = {table.title: table for table in explain(plan) + explain_reasons(plan)}
    speed = tables["Predicted speed of streamed models"]
    assert speed.rows[0][0] == "m"
    homes = tables["Where the weights of streamed models are"]
    assert "GiB" in " ".join(homes.rows[0])
    frontier = tables["Batch against speed: m"]
    assert len(frontier.rows) == len(plan.models[0].speed.frontier)


def test_drafts_are_made_where_weights_are_streamed_unless_told_otherwise(tmp_path: Path) -> None:
    budget = {"offload": {"device_memory": "6GiB"}}
    model = streamed(tmp_path, **budget)
    assert model.scheduler.speculation == SpeculationPlan(num_tokens=16, min_ngram=2, max_ngram=4)
    assert "a few tokens more" in model.reasons["scheduler.speculation"]
    off = streamed(tmp_path, **budget, speculation={"method": "none"})
    assert off.scheduler.speculation is None
    assert "scheduler.speculation" not in off.reasons
    (resident,) = plan_model(tmp_path, node_of(64), TINY).models
    assert resident.scheduler.speculation is None
    asked = {"num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 1}
    (resident,) = plan_model(tmp_path, node_of(64), TINY, speculation=asked).models
    assert resident.scheduler.speculation == SpeculationPlan(num_tokens=3, min_ngram=1, max_ngram=1)


def test_a_model_overflows_to_a_streamed_entry_of_its_checkpoint(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "ckpt", TINY)
    resident = {
        "name": "m",
        "path": "ckpt",
        "engine": "tensor_parallel",
        "limits": {"max_context": 64, "max_waiting_requests": 7},
    }
    streamed = {"name": "long", "path": "ckpt", "engine": "offload", "dtype": "bfloat16"}

    def plan(**overflow: Any) -> ClusterPlan:
        entry = {**resident, "overflow": {"to": "long", **overflow}}
        spec = ClusterSpec.model_validate({"models": [entry, streamed]})
        return make_plan(spec, node_of(8), directory=tmp_path, rates=rates_for_tests)

    made = plan()
    assert made.models[0].overflow == OverflowPlan(model="long", waiting=7)
    assert made.models[1].overflow is None
    assert any("computes in float32, and its overflow" in text for text in made.warnings)
    assert not any("it only helps" in text for text in made.warnings)
    assert plan(waiting=2).models[0].overflow == OverflowPlan(model="long", waiting=2)
    streamed["limits"] = {"max_context": 64}
    assert any("64 tokens per request, no more" in text for text in plan().warnings)
