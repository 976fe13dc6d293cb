"""Streamed replicas of several data-parallel groups: what a rank holds and reads, and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fake_checkpoints import TINY
from planned_models import LAPTOP, node, plan_model, refused

from cluster.base.plan import EngineKind, ModelPlan
from cluster.dist.topology import Topology
from cluster.planner.explain import explain
from offload.model_shape import model_shape
from offload.precision import Precision
from replicas.leader.seating import bundles, strategy
from replicas.models.hf_config import arch_from_hf

MIXTURE: dict[str, Any] = {
    **TINY,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 1024,
    "head_dim": 64,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "num_hidden_layers": 12,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 512,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}
ENTRY: dict[str, Any] = {
    "engine": "offload",
    "limits": {"max_context": 1024},
    "offload": {"device_memory": "400MiB"},
}
TWO_NODES = Topology(nodes=(node(4, 16), node(4, 16, name="n1")))


def planned(tmp_path: Path, dp: int, topology: Topology = LAPTOP, **model: Any) -> ModelPlan:
    entry = {**ENTRY, "parallel": {"dp": dp}, **model}
    (plan,) = plan_model(tmp_path, topology, MIXTURE, **entry).models
    return plan


@pytest.mark.parametrize("dp", [2, 4])
def test_groups_read_everything_but_their_experts_in_pieces(tmp_path: Path, dp: int) -> None:
    plan = planned(tmp_path, dp)
    assert plan.engine is EngineKind.OFFLOAD
    assert (plan.dp_size, plan.tp_size, plan.num_ranks) == (dp, 1, dp)
    assert plan.experts is not None
    assert plan.experts.experts_per_rank == (32 // dp,) * dp
    assert not plan.experts.survives
    assert plan.offload is not None
    assert plan.offload.num_sharing == dp
    assert plan.offload.micro_batch_tokens == 0
    assert not plan.offload.share_resident
    assert f"read in {dp} pieces" in plan.reasons["engine"]
    assert f"in each of {dp} groups" in plan.reasons["engine"]
    # Exchanges take part in steps of all groups: Ray has to place them where memory is shared.
    assert strategy(plan) == "STRICT_PACK"
    assert len(bundles(plan)) == dp + 1


def test_a_rank_counts_its_part_of_what_all_hold(tmp_path: Path) -> None:
    """Embedding and head stay, the ring is two or more layers: halves of each, and slots whole."""
    shape = model_shape(arch_from_hf(MIXTURE), 1, "float32")
    base = shape.layers[0].base.record_bytes(Precision.NATIVE)
    expert = shape.layers[0].largest_expert_bytes(Precision.NATIVE)
    for dp in (2, 4):
        plan = planned(tmp_path, dp, dtype="float32", offload={"device_memory": "600MiB"})
        offload = plan.offload
        assert offload is not None
        assert "embed" in offload.resident_units
        shared = shape.fixed_bytes + offload.ring_slots * base
        expected = shared / dp + offload.expert_slots * expert
        assert plan.memory.weights_bytes == pytest.approx(expected, abs=64 * 1024)


def test_the_disk_of_a_node_serves_all_its_groups(tmp_path: Path) -> None:
    """Each rank reads its piece of a layer, and the experts that its rows and others' ask for."""
    plan = planned(tmp_path, 4)
    assert plan.speed is not None
    assert plan.speed.rates["disk"] == pytest.approx(3e9 / 4)
    assert plan.speed.disk_bytes / plan.speed.rates["disk"] <= plan.speed.chosen.tpot_s
    tables = explain(plan_model(tmp_path, LAPTOP, MIXTURE, **ENTRY, parallel={"dp": 4}))
    (homes,) = [table for table in tables if "Where the weights" in table.title]
    assert "shared by 4 groups" in homes.rows[0][2]
    assert homes.rows[0][5].endswith("by each rank")


def test_groups_that_stream_are_on_one_node(tmp_path: Path) -> None:
    plan = planned(tmp_path, 4, TWO_NODES)
    assert len(set(plan.nodes)) == 1
    both = planned(tmp_path, 2, TWO_NODES, replicas=2)
    assert both.nodes == ("n0", "n0", "n1", "n1")


def test_experts_of_layers_that_stay_are_named_for_every_rank(tmp_path: Path) -> None:
    plan = planned(tmp_path, 2, offload={"device_memory": "1GiB", "resident": 2})
    assert plan.offload is not None
    named = [unit for unit in plan.offload.resident_units if unit.startswith("layer.1.expert.")]
    assert len(named) == MIXTURE["num_experts"]
    assert not [unit for unit in plan.offload.resident_units if unit.startswith("layer.2.expert")]


def test_slices_of_groups_are_read_in_pieces_too(tmp_path: Path) -> None:
    plan = planned(tmp_path, 2, Topology(nodes=(node(8, 32),)), parallel={"dp": 2, "tp": 2})
    assert (plan.dp_size, plan.tp_size) == (2, 2)
    assert plan.offload is not None
    assert plan.offload.num_sharing == 2
    assert plan.experts is not None
    assert plan.experts.experts_per_rank == (8,) * 4


@pytest.mark.parametrize(
    ("model", "param", "cause"),
    [
        ({"offload": {"micro_batch": 32}}, "offload.micro_batch", "different numbers of exchanges"),
        ({"offload": {"pack": False}}, "offload.pack", "pieces that it reads"),
        ({"offload": {"share_resident": "always"}}, "offload.share_resident", "in common anyway"),
        (
            {"offload": {"kv_home": "streamed", "host_memory": "1GiB"}},
            "offload.kv_home",
            "into micro-batches",
        ),
        ({"moe": {"balance": {"enabled": True}}}, "moe.balance.enabled", "cannot move"),
        ({"moe": {"failover": {"enabled": True}}}, "moe.failover.enabled", "cannot move"),
        ({"moe": {"failover": {"lost_groups": 1}}}, "moe.failover.lost_groups", "cannot move"),
        ({"parallel": {"dp": 2, "ep": 1}}, "parallel.ep", "ep is 1 with dp 2"),
        ({"parallel": {"ep": 2}}, "parallel.ep", "ep is 2, but engine is offload"),
        ({"offload": {"device_memory": "8MiB"}}, "offload.device_memory", "1/2 of a ring of 2 x"),
    ],
)
def test_what_groups_in_lockstep_cannot_have_is_refused(
    tmp_path: Path, model: dict[str, Any], param: str, cause: str
) -> None:
    entry = {**ENTRY, "parallel": {"dp": 2}, **model}
    error = refused(tmp_path, LAPTOP, MIXTURE, **entry)
    assert cause in error.cause
    assert error.param == f"models[0].{param}"


def test_a_dense_model_has_no_groups(tmp_path: Path) -> None:
    error = refused(tmp_path, LAPTOP, TINY, engine="offload", parallel={"dp": 2})
    assert "no experts" in error.cause
