"""Replicas on one node have their resident layers in common: counted once, shown, never assumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fake_checkpoints import LLAMA_3_8B
from planned_models import GIB, node, plan_model, refused

from cluster.base.plan import ModelPlan
from cluster.dist.topology import Topology
from cluster.planner.explain import explain
from cluster.planner.memory import FRONT_PROCESS_BYTES, cpu_budget_bytes

BOX = Topology(nodes=(node(8, 24),))


def planned(tmp_path: Path, topology: Topology = BOX, **offload: Any) -> ModelPlan:
    entry = {
        "engine": "offload",
        "limits": {"max_context": 2048, "max_running_requests": 8},
        "replicas": 2,
        "offload": {"objective": "latency", **offload},
    }
    (plan,) = plan_model(tmp_path, topology, LLAMA_3_8B, **entry).models
    return plan


def test_two_replicas_share_and_so_keep_more_than_half_of_the_node_each(tmp_path: Path) -> None:
    apart = planned(tmp_path, share_resident="never")
    shared = planned(tmp_path)
    assert not apart.offload.share_resident
    assert apart.memory.shared_bytes == 0
    assert shared.offload.share_resident
    assert shared.memory.shared_bytes > 1.2 * apart.memory.weights_bytes
    assert len(shared.offload.resident_units) > len(apart.offload.resident_units)
    on_node = 2 * (shared.memory.total_bytes + FRONT_PROCESS_BYTES) - shared.memory.shared_bytes
    assert on_node <= cpu_budget_bytes(BOX.nodes[0], 1)
    held = shared.memory.weights_bytes + shared.memory.kv_bytes + shared.offload.workspace_bytes
    assert held <= shared.offload.device_bytes


def test_a_budget_that_fits_only_once_is_taken_by_two_that_share(tmp_path: Path) -> None:
    asked = {"device_memory": "14GiB"}
    plan = planned(tmp_path, **asked)
    assert plan.offload.device_bytes == 14 * GIB
    assert plan.replicas == 2
    entry = {"engine": "offload", "replicas": 2, "limits": {"max_context": 2048}}
    error = refused(
        tmp_path, BOX, LLAMA_3_8B, **entry, offload={**asked, "share_resident": "never"}
    )
    assert error.param == "models[0].offload.device_memory"


def test_more_than_even_sharing_can_hold_is_refused_with_the_sum(tmp_path: Path) -> None:
    entry = {"engine": "offload", "replicas": 3, "limits": {"max_context": 2048}}
    error = refused(
        tmp_path,
        BOX,
        LLAMA_3_8B,
        **entry,
        kv_cache={"memory": "6GiB"},
        offload={"device_memory": "18GiB", "objective": "latency"},
    )
    assert "but for what is shared" in error.cause
    assert error.param == "models[0].replicas"


@pytest.mark.parametrize(("choice", "replicas", "shares"), [
    ("auto", 1, False), ("always", 1, True), ("never", 2, False), ("auto", 2, True),
])  # fmt: skip
def test_who_shares(tmp_path: Path, choice: str, replicas: int, shares: bool) -> None:
    entry = {"engine": "offload", "replicas": replicas, "limits": {"max_context": 2048}}
    asked = {"share_resident": choice, "objective": "latency"}
    plan = plan_model(tmp_path, BOX, LLAMA_3_8B, **entry, offload=asked)
    (model,) = plan.models
    assert model.offload.share_resident is shares
    assert (model.memory.shared_bytes > 0) is shares
    cells = [cell for table in explain(plan) for row in table.rows for cell in row]
    assert any("of it once per node" in cell for cell in cells) is shares
    assert ("once for all replicas" in model.reasons["engine"]) is shares


def test_replicas_on_nodes_of_their_own_share_nothing(tmp_path: Path) -> None:
    two = Topology(nodes=(node(8, 24), node(8, 24, name="n1")))
    plan = planned(tmp_path, two)
    assert not plan.offload.share_resident


def test_without_packing_nothing_is_shared_and_the_plan_says_that_it_is_slower(
    tmp_path: Path,
) -> None:
    plan = planned(tmp_path, pack=False)
    assert not plan.offload.is_packed
    assert not plan.offload.share_resident
    assert "straight from the checkpoint's files it is slower" in plan.reasons["engine"]
    for key, value in (("share_resident", "always"), ("precision", "int8")):
        error = refused(
            tmp_path, BOX, LLAMA_3_8B, engine="offload", offload={"pack": False, key: value}
        )
        assert error.param == f"models[0].offload.{key}"
