"""Plans: golden numbers, every decision and its reason, every refusal and its remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_checkpoints import LLAMA_3_8B, TINY, write_checkpoint
from planned_models import BIG_CPU, GIB, GPU_BOX, LAPTOP, node, plan_model

from cluster.base.errors import ConfigError
from cluster.base.plan import ClusterPlan, from_json, to_json
from cluster.base.spec import ClusterSpec
from cluster.dist.topology import Topology
from cluster.planner.explain import explain_reasons
from cluster.planner.hub import Hub
from cluster.planner.packing import RankNeed, empty_loads, least_loaded
from cluster.planner.planner import make_plan


def test_kernels_are_the_users_or_say_what_auto_means(tmp_path: Path):
    wanted = {"kernels": "torch", "attention_backend": "torch_ref"}
    (asked,) = plan_model(tmp_path, LAPTOP, **wanted).models
    assert (asked.kernels, asked.attention_backend) == ("torch", "torch_ref")
    assert "kernels" not in asked.reasons
    (plain,) = plan_model(tmp_path, LAPTOP).models
    assert (plain.kernels, plain.attention_backend) == ("auto", "auto")
    assert "compiled on each rank's node" in plain.reasons["kernels"]
    assert "cpu_paged" in plain.reasons["attention_backend"]


@pytest.mark.parametrize(
    "wanted",
    [
        {"kernels": "torch", "attention_backend": "torch_ref"},
        {"kernels": "native", "attention_backend": "cpu_paged"},
        {},
    ],
)
def test_the_plan_table_shows_what_computes(tmp_path: Path, wanted: dict[str, str]) -> None:
    plan = plan_model(tmp_path, LAPTOP, **wanted)
    tables = {table.title: table.rows for table in explain_reasons(plan)}
    shown = {row[1]: row[2] for row in tables["Limits"] if row[0] == plan.models[0].name}
    assert shown["kernels"] == wanted.get("kernels", "auto")
    assert shown["attention backend"] == wanted.get("attention_backend", "auto")
    decided = {row[1] for row in tables["Decisions"]} & {"kernels", "attention_backend"}
    assert decided == (set() if wanted else {"kernels", "attention_backend"})


def test_fp8_halves_the_weights_of_a_gpu_rank(tmp_path: Path):
    plain, fp8 = (
        plan_model(tmp_path, GPU_BOX, LLAMA_3_8B, device="cuda", quantization=name).models[0]
        for name in ("none", "fp8")
    )
    assert (plain.quantization, fp8.quantization) == ("none", "fp8")
    # All but the embedding table, which is read by rows.
    assert 0.5 < fp8.memory.weights_bytes / plain.memory.weights_bytes < 0.6
    assert fp8.kv.num_blocks > plain.kv.num_blocks


def test_golden_llama_3_8b_on_one_gpu(tmp_path: Path):
    (model,) = plan_model(tmp_path, GPU_BOX, LLAMA_3_8B).models
    assert model.memory.weights_bytes == 8_030_261_248 * 2
    assert (model.device, model.dtype, model.gpus_per_rank) == ("cuda", "bfloat16", 1.0)
    assert model.kv.bytes_per_rank // (model.kv.num_blocks * model.kv.block_size) == 131_072
    assert model.scheduler.max_context == 8192
    assert model.memory.available_bytes == int(80 * GIB * 0.92)
    assert 0 <= model.memory.available_bytes - model.memory.total_bytes < 16 * 131_072
    assert model.eos_token_ids == (128001,)
    assert model.path == str(tmp_path / "ckpt")
    assert model.source == "ckpt"


def test_golden_llama_3_8b_split_in_four(tmp_path: Path):
    (model,) = plan_model(tmp_path, GPU_BOX, LLAMA_3_8B, parallel={"tp": 4}).models
    norms = (2 * 32 + 1) * 4096
    assert model.memory.weights_bytes == ((8_030_261_248 - norms) // 4 + norms) * 2
    assert model.kv.bytes_per_rank == model.kv.num_blocks * 16 * 131_072 // 4


def test_a_gpu_cache_takes_what_is_left(tmp_path: Path):
    small = Topology(nodes=(node(8, 64, (24,)),))
    (model,) = plan_model(tmp_path, small, LLAMA_3_8B).models
    left = model.memory.available_bytes - model.memory.total_bytes
    assert 0 <= left < 16 * 131_072
    assert "left for the cache" in model.reasons["kv.num_blocks"]


def test_a_small_model_on_a_laptop(tmp_path: Path):
    plan = plan_model(tmp_path, LAPTOP, parallel={"tp": 2})
    (model,) = plan.models
    assert (model.device, model.dtype, model.num_threads) == ("cpu", "float32", 1)
    assert "exact" in model.reasons["dtype"]
    assert model.reasons["device"] == "no GPU was found"
    assert model.kv.num_blocks == 64 * 512 // 16
    assert model.scheduler.max_context == 512
    reserved = (
        2 * model.cpus_per_rank + model.leader_cpus + plan.gateway.replicas * plan.gateway.cpus
    )
    assert reserved <= 2 + 1e-9
    assert model.cpus_per_rank == pytest.approx(0.9)
    assert model.nodes == ("n0",)
    assert model.eos_token_ids == (1, 2)
    assert plan.warnings == ()


def test_what_the_user_wrote_has_no_reason(tmp_path: Path):
    (model,) = plan_model(
        tmp_path,
        BIG_CPU,
        engine="tensor_parallel",
        device="cpu",
        dtype="bfloat16",
        kernels="native",
        attention_backend="cpu_paged",
        kv_cache={"memory": "1MiB"},
        limits={"max_context": 100},
        resources={"threads_per_rank": 3, "cpus_per_rank": 2.5},
    ).models
    assert model.reasons == {}
    assert (model.dtype, model.num_threads, model.cpus_per_rank) == ("bfloat16", 3, 2.5)
    token_bytes = 2 * 2 * 4 * 8 * 2
    assert model.kv.num_blocks == 2**20 // (16 * token_bytes)
    assert model.scheduler.max_context == 100


def test_float32_only_when_it_fits_comfortably(tmp_path: Path):
    (model,) = plan_model(tmp_path, BIG_CPU, LLAMA_3_8B).models
    assert model.dtype == "float32"
    (model,) = plan_model(tmp_path, Topology(nodes=(node(8, 64),)), LLAMA_3_8B).models
    assert model.dtype == "bfloat16"
    assert "more than 40%" in model.reasons["dtype"]


def test_auto_devices_leave_gpus_to_those_that_insist(tmp_path: Path):
    write_checkpoint(tmp_path / "ckpt")
    entry = {"path": "ckpt", "parallel": {"tp": 2}}
    spec = ClusterSpec.model_validate(
        {"models": [{"name": "a", **entry}, {"name": "b", **entry, "device": "cuda"}]}
    )
    topology = Topology(nodes=(node(8, 64, (24, 24, 24)),))
    first, second = make_plan(spec, topology, directory=tmp_path).models
    assert (first.device, second.device) == ("cpu", "cuda")
    assert "1 not taken" in first.reasons["device"]
    assert "device" not in second.reasons


def test_replicas_spread_over_nodes_and_stay_whole(tmp_path: Path):
    nodes = Topology(nodes=(node(4, 16, name="a"), node(4, 16, name="b")))
    (model,) = plan_model(tmp_path, nodes, replicas=4, parallel={"tp": 2}).models
    assert sorted(model.nodes) == ["a", "a", "b", "b"]
    assert model.num_threads == 1
    gpus = Topology(nodes=(node(8, 64, (24, 24, 24), "a"), node(8, 64, (24, 24, 24), "b")))
    (model,) = plan_model(tmp_path, gpus, replicas=2, parallel={"tp": 2}).models
    assert (model.device, sorted(model.nodes)) == ("cuda", ["a", "b"])
    (model,) = plan_model(tmp_path, gpus, replicas=3, parallel={"tp": 2}).models
    assert model.device == "cpu"


def test_a_node_without_memory_is_passed_over(tmp_path: Path):
    nodes = Topology(nodes=(node(64, 2, name="poor"), node(2, 64, name="rich")))
    (model,) = plan_model(tmp_path, nodes, replicas=2).models
    assert model.nodes == ("rich", "rich")


def test_many_ranks_on_few_cores_still_fit_and_are_warned_of(tmp_path: Path):
    plan = plan_model(tmp_path, LAPTOP, replicas=4, parallel={"tp": 2})
    (model,) = plan.models
    total = 8 * model.cpus_per_rank + 4 * model.leader_cpus + plan.gateway.cpus
    assert total <= 2 + 1e-9
    assert any("8 CPU ranks share 2 cores" in warning for warning in plan.warnings)


def test_gateway_limits_follow_the_models(tmp_path: Path):
    write_checkpoint(tmp_path / "ckpt")
    spec = ClusterSpec.model_validate(
        {
            "gateway": {"replicas": 2, "host": "0.0.0.0"},
            "models": [{"name": "m", "path": "ckpt", "replicas": 3}],
        }
    )
    plan = make_plan(spec, LAPTOP, directory=tmp_path)
    assert plan.gateway.limits.max_active_requests == 3 * (64 + 256) // 2
    assert plan.gateway.limits.max_prompt_tokens_waiting == 8 * 512
    assert plan.gateway.limits.max_message_bytes == 4 * 2**20
    assert plan.gateway.limits.max_stop_strings == 4
    assert any("set gateway.api_keys_file" in warning for warning in plan.warnings)


def test_running_requests_cannot_exceed_step_tokens(tmp_path: Path):
    plan = plan_model(tmp_path, LAPTOP, limits={"max_step_tokens": 16})
    assert plan.models[0].scheduler.max_running_requests == 16
    assert any("lowered to 16" in warning for warning in plan.warnings)


def test_a_long_context_is_capped_by_the_cache(tmp_path: Path):
    (model,) = plan_model(tmp_path, LAPTOP, kv_cache={"memory": "128KiB"}, dtype="float32").models
    assert model.scheduler.max_context == 256
    assert "fewer than the model's 512" in model.reasons["scheduler.max_context"]


def test_a_model_without_end_token_is_warned_of(tmp_path: Path):
    plan = plan_model(tmp_path, LAPTOP, {**TINY, "eos_token_id": None})
    assert any("no end-of-text token" in warning for warning in plan.warnings)


def test_plan_crosses_json(tmp_path: Path):
    plan = plan_model(tmp_path, LAPTOP, replicas=2)
    assert from_json(ClusterPlan, to_json(plan)) == plan


def test_equal_inputs_give_equal_plans(tmp_path: Path):
    assert plan_model(tmp_path, GPU_BOX, replicas=3) == plan_model(tmp_path, GPU_BOX, replicas=3)


def test_repositories_come_from_the_hub(tmp_path: Path):
    directory = write_checkpoint(tmp_path / "snapshot")
    spec = ClusterSpec.model_validate(
        {"models": [{"name": "m", "repo": "org/m", "revision": "v1"}]}
    )
    hub = Hub(download=lambda repo, revision, local: directory)
    (model,) = make_plan(spec, LAPTOP, hub=hub).models
    assert (model.path, model.source) == (str(directory), "org/m@v1")


def test_nodes_without_cpus_take_nothing(tmp_path: Path):
    head, worker = node(0, 64, (80,), name="head"), node(4, 16, name="worker")
    plan = plan_model(tmp_path, Topology(nodes=(head, worker)), replicas=2)
    assert plan.models[0].nodes == ("worker", "worker")
    assert (plan.models[0].device, plan.gateway.cpus) == ("cpu", 0.1)
    with pytest.raises(ConfigError, match="No node"):
        plan_model(tmp_path, Topology(nodes=(head,)))


def test_decoded_weights_are_counted_and_explained(tmp_path: Path):
    section = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    plain = plan_model(tmp_path, LAPTOP, TINY, dtype="bfloat16").models[0]
    model = plan_model(
        tmp_path, LAPTOP, {**TINY, "quantization_config": section}, dtype="bfloat16"
    ).models[0]
    assert model.memory == plain.memory
    assert "memory.weights_bytes" not in plain.reasons
    assert model.reasons["memory.weights_bytes"] == (
        "38B stored in all; fp8 weights are decoded while loading and held in bfloat16"
    )


def test_a_rank_goes_where_the_cpus_are_that_its_file_asks_for():
    topology = Topology(nodes=(node(8, 64, name="taken"), node(4, 64, name="free")))
    loads = empty_loads(topology, num_gateways=1)
    loads[0].add_replica(0, 1, RankNeed(num_bytes=GIB, cpus=7.5))
    # Both nodes would have a rank for four cores; the first one has no three CPUs left.
    assert least_loaded(loads, 1, [RankNeed(num_bytes=GIB)] * 2) == 0
    assert least_loaded(loads, 1, [RankNeed(num_bytes=GIB, cpus=3)] * 2) == 1
    # Where nobody has them, memory decides and the reservation is refused with its arithmetic.
    assert least_loaded(loads, 1, [RankNeed(num_bytes=GIB, cpus=5)] * 2) == 0
