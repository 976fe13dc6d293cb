"""Plans of mixture-of-experts models: layouts, memory, places over nodes, and every refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fake_checkpoints import TINY
from planned_models import GIB, GPU_BOX, LAPTOP, node, plan_model, refused

from cluster.base.plan import EngineKind, ModelPlan
from cluster.dist.topology import Topology
from cluster.planner.explain import explain

MIXTURE: dict[str, Any] = {
    **TINY,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 10,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 96,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "head_dim": 8,
}
LIMITS = {"max_context": 128, "max_step_tokens": 64}


def planned(tmp_path: Path, topology: Topology = LAPTOP, **model: Any) -> ModelPlan:
    entry = {"engine": "auto", "limits": LIMITS, **model}
    (plan,) = plan_model(tmp_path, topology, MIXTURE, **entry).models
    return plan


def test_groups_share_the_experts_and_each_has_its_own_cache(tmp_path: Path):
    plan = planned(tmp_path, parallel={"dp": 2, "tp": 2})
    assert plan.engine is EngineKind.EXPERT_PARALLEL
    assert (plan.dp_size, plan.tp_size, plan.num_ranks) == (2, 2, 4)
    assert plan.experts is not None
    assert plan.experts.experts_per_rank == (3, 3, 2, 2)
    assert "dp x tp = 2 x 2" in plan.reasons["engine"]
    # Every running request of every group at full context.
    assert plan.kv.num_blocks == 64 * 128 // 16
    (table,) = [table for table in explain(_cluster(tmp_path)) if "Expert" in table.title]
    row = (
        "m",
        "2 x 2 = 4",
        "2 x 3 + 2 x 2",
        "auto",
        "exact, fp32 back",
        "1 group: 511KiB for 3 more",
    )
    assert table.rows[0] == row


def _cluster(tmp_path: Path):
    layout = {"dp": 2, "tp": 2}
    return plan_model(tmp_path, LAPTOP, MIXTURE, engine="auto", limits=LIMITS, parallel=layout)


def test_weights_of_a_rank_are_its_experts_and_its_share_of_the_rest(tmp_path: Path):
    expert_bytes = 3 * 64 * 96 * 4
    sliced = planned(tmp_path).memory.weights_bytes
    spread = planned(tmp_path, parallel={"dp": 4}).memory.weights_bytes
    # Two layers of ten experts; the fullest of four ranks holds three of each.
    assert sliced - spread == 2 * (10 - 3) * expert_bytes


def test_room_for_a_lost_groups_experts_is_memory_and_where_there_is_little_is_not_kept(
    tmp_path: Path,
):
    expert_bytes = (3 * 64 * 96 + 2 * 96 + 64) * 4
    off = planned(tmp_path, parallel={"dp": 2}, moe={"failover": {"enabled": False}})
    assert off.experts is not None
    assert (off.experts.survives, off.experts.spare_bytes) == (False, 0)
    open_ = planned(tmp_path, parallel={"dp": 2})
    assert open_.experts is not None
    assert (open_.experts.survives, open_.experts.lost_groups, open_.experts.spare_slots) == (
        True,
        1,
        5,
    )
    # The other half of both layers' ten experts, and the one that is being read.
    assert open_.experts.spare_bytes == (2 * 5 + 1) * expert_bytes
    grown = open_.memory.workspace_bytes - off.memory.workspace_bytes
    assert grown == open_.experts.spare_bytes
    assert "fit twice" in open_.reasons["experts.lost_groups"]
    copies = planned(tmp_path, parallel={"dp": 2}, moe={"redundant_experts": 5})
    assert copies.experts is not None
    assert copies.experts.spare_slots == 0


def test_where_memory_is_short_only_copies_save_a_replica(tmp_path: Path):
    need = planned(tmp_path, parallel={"dp": 2}, kv_cache={"memory": "1MiB"}).memory
    # Nine tenths of the node, less Ray's gibibyte and two front processes, for two ranks.
    usable = 2 * need.total_bytes + (1 << 30) + (512 << 20)
    small = Topology(nodes=(node(2, usable / 0.9 / GIB + 1e-6),))
    plan = planned(tmp_path, small, parallel={"dp": 2}, kv_cache={"memory": "1MiB"})
    assert plan.experts is not None
    assert (plan.experts.survives, plan.experts.lost_groups) == (True, 0)
    assert "does not hold twice" in plan.reasons["experts.lost_groups"]
    asked = planned(
        tmp_path,
        small,
        parallel={"dp": 2},
        kv_cache={"memory": "1MiB"},
        moe={"failover": {"lost_groups": 1}},
    )
    assert asked.experts is not None
    assert asked.experts.lost_groups == 1


@pytest.mark.parametrize(
    ("dp", "failover", "says"),
    [
        (2, {"lost_groups": 2}, "none would be left"),
        (1, {"lost_groups": 1}, "none would be left"),
        (2, {"enabled": False, "lost_groups": 1}, "failover is not enabled"),
    ],
)
def test_room_that_can_be_of_no_use_is_refused(tmp_path: Path, dp: int, failover, says: str):
    error = refused(
        tmp_path,
        LAPTOP,
        MIXTURE,
        engine="expert_parallel",
        parallel={"dp": dp, "tp": 2},
        moe={"failover": failover},
        limits=LIMITS,
    )
    assert says in error.cause
    assert error.param == "models[0].moe.failover.lost_groups"
    assert error.remedy


def test_copies_and_experts_on_their_way_are_memory(tmp_path: Path):
    expert_bytes = 3 * 64 * 96 * 4
    alone = {"failover": {"enabled": False}}
    plain = planned(tmp_path, parallel={"dp": 4}, moe=alone)
    copies = planned(tmp_path, parallel={"dp": 4}, moe={"redundant_experts": 2})
    assert copies.experts is not None
    assert copies.experts.experts_per_rank == (5, 5, 4, 4)
    assert copies.experts.balance_interval_s is None
    assert copies.memory.weights_bytes - plain.memory.weights_bytes == 2 * 2 * expert_bytes
    balance = {"enabled": True, "interval": "5s", "max_moves": 3}
    moving = planned(tmp_path, parallel={"dp": 4}, moe={"balance": balance, **alone})
    assert moving.experts is not None
    assert (moving.experts.num_redundant, moving.experts.max_moves) == (1, 3)
    assert moving.experts.balance_interval_s == 5.0
    grown = moving.memory.workspace_bytes - plain.memory.workspace_bytes
    assert 3 * expert_bytes < grown < 5 * expert_bytes


@pytest.mark.parametrize(
    ("moe", "word"),
    [
        ({"redundant_experts": 9}, "only 8"),
        ({"redundant_experts": 0, "balance": {"enabled": True}}, "no rank has room"),
    ],
)
def test_copies_that_cannot_be_are_refused(tmp_path: Path, moe, word):
    entry = {"engine": "auto", "limits": LIMITS, "parallel": {"dp": 4}, "moe": moe}
    error = refused(tmp_path, LAPTOP, MIXTURE, **entry)
    assert error.param == "models[0].moe.redundant_experts"
    assert word in error.cause


def test_workspace_counts_the_rows_of_all_ranks(tmp_path: Path):
    one = planned(tmp_path).memory.workspace_bytes
    two = planned(tmp_path, parallel={"dp": 2}).memory.workspace_bytes
    assert two - one >= 2 * 64 * 64 * 4 * 4


@pytest.mark.parametrize(
    ("parallel", "engine", "kind"),
    [
        ({"tp": 2}, "auto", "tensor_parallel"),
        ({"tp": 2, "ep": 1}, "tensor_parallel", "tensor_parallel"),
        ({"tp": 2, "ep": 2}, "auto", "expert_parallel"),
        ({"tp": 2}, "expert_parallel", "expert_parallel"),
        ({"dp": 2}, "auto", "expert_parallel"),
        ({"dp": 2, "tp": 2, "ep": 4}, "auto", "expert_parallel"),
    ],
)
def test_the_kind_of_engine_follows_the_layout(tmp_path: Path, parallel, engine, kind):
    assert planned(tmp_path, parallel=parallel, engine=engine).engine.value == kind


@pytest.mark.parametrize(
    ("model", "param", "cause"),
    [
        ({"parallel": {"dp": 2, "ep": 1}}, "parallel.ep", "ep is 1 with dp 2"),
        ({"parallel": {"dp": 2, "tp": 2, "ep": 2}}, "parallel.ep", "dp x tp = 2 x 2 = 4 ranks"),
        ({"parallel": {"dp": 3, "tp": 4}}, "parallel", "12 ranks, but no layer has more than 10"),
        ({"engine": "expert_parallel"}, "engine", "1 rank(s) with ep 1 share no experts"),
        (
            {"engine": "tensor_parallel", "parallel": {"dp": 2}},
            "parallel.dp",
            "dp is 2, but engine is tensor_parallel",
        ),
        ({"device": "cuda", "parallel": {"dp": 2, "tp": 2}}, "device", "meet in NCCL"),
        ({"parallel": {"dp": 2, "tp": 3}}, "parallel.tp", "8 attention heads are not divisible"),
        ({"moe": {"exchange": "flat"}}, "moe", "not expert-parallel"),
    ],
)
def test_layouts_that_cannot_work_are_refused_with_the_arithmetic(
    tmp_path: Path, model, param, cause
):
    error = refused(tmp_path, LAPTOP, MIXTURE, **{"engine": "auto", **model})
    assert error.param == f"models[0].{param}"
    assert cause in error.cause
    assert error.remedy


def test_a_budget_for_links_that_nobody_measures_is_refused(tmp_path: Path):
    moe = {"exchange": "flat", "probe_budget": "2s"}
    error = refused(tmp_path, LAPTOP, MIXTURE, engine="auto", parallel={"dp": 2}, moe=moe)
    assert error.param == "models[0].moe.probe_budget"
    plan = planned(tmp_path, LAPTOP, parallel={"dp": 2}, moe={"probe_budget": "2s"})
    assert plan.experts is not None
    assert plan.experts.probe_s == 2.0


@pytest.mark.parametrize(
    ("model", "param"),
    [
        ({"parallel": {"dp": 2}}, "parallel.dp"),
        ({"parallel": {"ep": 2, "tp": 2}}, "parallel.ep"),
        ({"engine": "expert_parallel", "parallel": {"tp": 2}}, "engine"),
    ],
)
def test_a_dense_model_has_no_experts_to_share(tmp_path: Path, model, param):
    error = refused(tmp_path, LAPTOP, TINY, **{"engine": "auto", **model})
    assert error.param == f"models[0].{param}"
    assert "no experts" in error.cause


def test_split_groups_stay_on_cpus_and_say_why(tmp_path: Path):
    plan = planned(tmp_path, GPU_BOX, parallel={"dp": 2, "tp": 2})
    assert plan.device == "cpu"
    assert "NCCL" in plan.reasons["device"]


def test_groups_fill_few_nodes_up_to_a_rank_per_core(tmp_path: Path):
    nodes = tuple(node(4, 32, name=f"n{index}") for index in range(3))
    plan = planned(tmp_path, Topology(nodes=nodes), parallel={"dp": 3, "tp": 2})
    assert plan.nodes == ("n0", "n0", "n1")
    # No node has cores left: memory alone decides.
    crowded = planned(tmp_path, Topology(nodes=nodes[:1]), parallel={"dp": 4, "tp": 2})
    assert crowded.nodes == ("n0",) * 4


def test_groups_go_where_the_cpus_are_that_the_file_asks_for(tmp_path: Path):
    nodes = Topology(nodes=tuple(node(4, 32, name=f"n{index}") for index in range(3)))
    plan = planned(tmp_path, nodes, parallel={"dp": 3}, resources={"cpus_per_rank": 1.5})
    assert plan.nodes == ("n0", "n0", "n1")
    apart = planned(tmp_path, nodes, parallel={"dp": 3}, resources={"cpus_per_rank": 3})
    assert apart.nodes == ("n0", "n1", "n2")
    # Half a CPU each: more ranks than cores where the file says so.
    close = planned(tmp_path, nodes, parallel={"dp": 6}, resources={"cpus_per_rank": 0.5})
    assert close.nodes == ("n0",) * 6
    error = refused(
        tmp_path,
        nodes,
        MIXTURE,
        engine="auto",
        limits=LIMITS,
        parallel={"dp": 4},
        resources={"cpus_per_rank": 3},
    )
    assert error.param == "models[0].resources.cpus_per_rank"


def test_a_replica_that_no_nodes_hold_together_is_refused(tmp_path: Path):
    nodes = tuple(node(4, 2.3, name=f"n{index}") for index in range(2))
    error = refused(
        tmp_path,
        Topology(nodes=nodes),
        MIXTURE,
        engine="auto",
        parallel={"dp": 4},
        limits=LIMITS,
        kv_cache={"memory": GIB // 2},
    )
    assert "4 ranks x (weights" in error.cause
    assert "the nodes have" in error.cause
    assert "kv_cache.memory" in error.remedy


def test_a_streamed_mixture_gets_slots_for_its_experts(tmp_path: Path):
    plan = planned(tmp_path, engine="offload", offload={"device_memory": "8MiB"})
    assert plan.engine is EngineKind.OFFLOAD
    assert plan.offload is not None
    # As many as there are, since they fit; experts are never resident units.
    assert plan.offload.expert_slots == 2 * MIXTURE["num_experts"]
    assert not [unit for unit in plan.offload.resident_units if ".expert." in unit]
    assert "20 of 20 experts in slots" in plan.reasons["engine"]
