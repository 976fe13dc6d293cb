"""Models that transformers computes: when, in which tier, and what is refused by name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from fake_checkpoints import TINY, write_checkpoint
from planned_models import GPU_BOX, LAPTOP, rates_for_tests

from cluster.base.errors import ConfigError
from cluster.base.plan import ClusterPlan, EngineKind, ModelPlan, from_json, to_json
from cluster.base.quantities import Size
from cluster.base.spec import ClusterSpec
from cluster.base.zero3_plan import ForeignModel
from cluster.dist.topology import Topology
from cluster.planner.explain import explain, explain_reasons
from cluster.planner.planner import make_plan
from tests.support.zero3_engine import FOREIGN

PHI = {**TINY, "architectures": ["PhiForCausalLM"], "model_type": "phi"}
MIB = 2**20


def plan_of(
    tmp_path: Path,
    config: Any = PHI,
    topology: Topology = LAPTOP,
    foreign: ForeignModel = FOREIGN,
    **model: Any,
) -> ClusterPlan:
    write_checkpoint(tmp_path / "ckpt", config)
    entry = {"name": "m", "path": "ckpt", **model}
    spec = ClusterSpec.model_validate({"models": [entry]})
    return make_plan(
        spec, topology, directory=tmp_path, rates=rates_for_tests, inspect=lambda _: foreign
    )


def refusal(tmp_path: Path, **model: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        plan_of(tmp_path, **model)
    return caught.value


def model_of(plan: ClusterPlan) -> ModelPlan:
    (model,) = plan.models
    return model


def test_an_unknown_architecture_is_refused_with_the_remedy(tmp_path: Path) -> None:
    error = refusal(tmp_path)
    assert "PhiForCausalLM is not supported" in error.cause
    assert "offload.provider: auto" in error.remedy
    assert error.param == "models[0].path"


@pytest.mark.parametrize("engine", ["auto", "offload"])
def test_auto_takes_it_where_the_user_allows_and_says_so(tmp_path: Path, engine: str) -> None:
    plan = plan_of(tmp_path, engine=engine, offload={"provider": "auto"})
    model = model_of(plan)
    assert model.engine is EngineKind.OFFLOAD
    assert model.zero3 is not None
    assert model.offload is None
    assert model.zero3.tier == "memory"
    assert "no model code here; PhiForCausalLM" in model.reasons["engine"]
    assert any("transformers' own code" in warning for warning in plan.warnings)
    assert model.scheduler.speculation is not None
    assert from_json(ClusterPlan, to_json(plan)) == plan
    shown = [cell for table in explain(plan) + explain_reasons(plan) for row in table.rows
             for cell in row]  # fmt: skip
    assert "1418 M" in shown


def test_auto_streams_what_is_known(tmp_path: Path) -> None:
    model = model_of(plan_of(tmp_path, TINY, engine="offload", offload={"provider": "auto"}))
    assert model.zero3 is None
    assert model.offload is not None


def test_a_known_architecture_may_be_given_to_it(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, TINY, engine="offload", offload={"provider": "deepspeed-zero3"})
    assert model_of(plan).zero3 is not None
    assert "no model code" not in model_of(plan).reasons["engine"]


def test_what_a_rank_holds_fits_its_budget(tmp_path: Path) -> None:
    for budget, tier in (("6GiB", "memory"), ("2500MiB", "disk")):
        asked = {"provider": "auto", "device_memory": budget, "disk_path": "disk"}
        model = model_of(plan_of(tmp_path, engine="offload", offload=asked))
        held = model.memory.weights_bytes + model.memory.kv_bytes + model.memory.workspace_bytes
        process = 608 * MIB
        assert held - process <= Size(1, 2**50).parse(budget)
        assert model.zero3.tier == tier
        assert model.zero3.disk_path == str(tmp_path / "disk")
        assert model.zero3.max_query_columns == model.scheduler.max_step_tokens
        assert model.zero3.max_context_columns >= model.scheduler.max_context
        weights = FOREIGN.num_values * 2
        assert (model.memory.weights_bytes > weights) == (tier == "memory")
    assert model.kv.bytes_per_rank == (
        model.kv.num_blocks * model.kv.block_size * FOREIGN.kv_values_per_token * 2
    )


def test_too_little_memory_is_refused_with_the_sum_that_works(tmp_path: Path) -> None:
    asked: dict[str, Any] = {"provider": "auto", "device_memory": "500MiB"}
    error = refusal(tmp_path, engine="offload", offload=asked)
    assert "read buffers" in error.cause
    assert error.param == "models[0].offload.device_memory"
    enough = error.remedy.split("to ", 1)[1].split(",")[0]
    asked["device_memory"] = int(Size(1, 2**50).parse(enough) * 1.01)
    plan_of(tmp_path, engine="offload", offload=asked)


def test_a_long_step_is_waited_for(tmp_path: Path) -> None:
    model = model_of(plan_of(tmp_path, engine="offload", offload={"provider": "auto"}))
    assert model.scheduler.step_timeout_s == 144
    assert "slow disk" in model.reasons["scheduler.step_timeout_s"]


def test_float16_is_computed_in_float32(tmp_path: Path) -> None:
    half = dataclasses.replace(FOREIGN, dtype="float16")
    model = model_of(
        plan_of(tmp_path, foreign=half, engine="offload", offload={"provider": "auto"})
    )
    assert model.dtype == "float32"
    assert "float16" in model.reasons["dtype"]


@pytest.mark.parametrize(
    ("key", "entry"),
    [
        ("parallel.tp", {"parallel": {"tp": 2}}),
        ("parallel.dp", {"parallel": {"dp": 2}}),
        ("device", {"device": "cuda"}),
        ("dtype", {"dtype": "float16"}),
        ("quantization", {"quantization": "fp8"}),
        ("kernels", {"kernels": "torch"}),
        ("kernels", {"kernels": "native"}),
        ("attention_backend", {"attention_backend": "torch_ref"}),
        ("offload.precision", {"offload": {"provider": "auto", "precision": "int8"}}),
        ("offload.ring_slots", {"offload": {"provider": "auto", "ring_slots": 2}}),
        ("offload.resident", {"offload": {"provider": "auto", "resident": 1}}),
        ("offload.objective", {"offload": {"provider": "auto", "objective": "latency"}}),
    ],
)
def test_settings_without_effect_are_refused(tmp_path: Path, key: str, entry: Any) -> None:
    error = refusal(
        tmp_path,
        topology=GPU_BOX,
        **{"engine": "offload", "offload": {"provider": "auto"}, **entry},
    )
    assert error.param == f"models[0].{key}"


def test_on_a_machine_with_gpus_it_runs_on_the_cpu(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, topology=GPU_BOX, engine="offload", offload={"provider": "auto"})
    assert model_of(plan).device == "cpu"
    assert "served on the CPU" in model_of(plan).reasons["device"]
