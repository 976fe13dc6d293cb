"""Expert-parallel replicas on GPUs: a device for each rank, memory on both sides, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from planned_models import GIB, GPU_BOX, node, plan_model, refused
from test_expert_parallel_plans import LIMITS, MIXTURE, planned

from cluster.base.plan import EngineKind
from cluster.dist.topology import Topology
from cluster.planner.explain import explain
from replicas.leader.seating import bundles, rank_bytes

PAIR = Topology(nodes=(node(8, 64, (24,) * 3, "a"), node(8, 64, (24,) * 4, "b")))


def test_each_rank_has_a_device_and_the_host_what_rows_pass_through(tmp_path: Path):
    plan = planned(tmp_path, GPU_BOX, parallel={"dp": 4}, dtype="float32")
    assert (plan.device, plan.engine) == ("cuda", EngineKind.EXPERT_PARALLEL)
    assert "1 replica of dp=4 x tp=1 needs 4 GPUs" in plan.reasons["device"]
    assert "no step with an exchange is captured" in plan.reasons["experts.exchange"]
    assert plan.num_threads == 1
    rows, dim = 4 * 64, 64
    sent_and_received = rows * dim * (2 * 4 + 2 * 4)
    routed = dim * 4 + 2 * 12
    assert plan.memory.host_bytes == sent_and_received + 1.25 * (rows * dim * 8 + rows * routed)
    assert rank_bytes(plan) == plan.memory.host_bytes
    leader, *ranks = bundles(plan)
    assert len(ranks) == 4
    assert all((each["GPU"], each["memory"]) == (1.0, rank_bytes(plan)) for each in ranks)
    assert "GPU" not in leader


def test_the_plan_shows_the_hosts_part(tmp_path: Path):
    plan = plan_model(tmp_path, GPU_BOX, MIXTURE, engine="auto", limits=LIMITS, parallel={"dp": 2})
    (memory,) = [table for table in explain(plan) if table.title == "Memory of each rank"]
    assert "of the host beside" in memory.rows[0][3]


def test_the_workspace_counts_the_products_of_all_pairs(tmp_path: Path):
    host = planned(tmp_path, GPU_BOX, parallel={"dp": 2}, device="cpu", dtype="float32").memory
    device = planned(tmp_path, GPU_BOX, parallel={"dp": 2}, dtype="float32").memory
    assert host.host_bytes == 0
    pairs = 2 * 64 * 2
    assert device.workspace_bytes - (768 << 20) > pairs * (64 + 96) * 4
    assert device.available_bytes > 70 * GIB


def test_groups_fill_a_node_before_they_begin_another(tmp_path: Path):
    assert planned(tmp_path, PAIR, parallel={"dp": 4}).nodes == ("b",) * 4
    assert planned(tmp_path, PAIR, parallel={"dp": 6}).nodes == ("b",) * 4 + ("a",) * 2
    two = planned(tmp_path, PAIR, parallel={"dp": 3}, replicas=2)
    assert two.nodes == ("b",) * 3 + ("a",) * 3


def test_too_few_devices_are_cpus_or_an_error(tmp_path: Path):
    assert planned(tmp_path, PAIR, parallel={"dp": 8}).device == "cpu"
    entry: dict[str, Any] = {"engine": "auto", "limits": LIMITS, "parallel": {"dp": 8}}
    error = refused(tmp_path, PAIR, MIXTURE, device="cuda", **entry)
    assert "dp=8 x tp=1 needs 8 GPUs" in error.cause
    assert "parallel.dp" in error.remedy


def test_groups_that_stream_stay_on_cpus(tmp_path: Path):
    entry: dict[str, Any] = {"engine": "offload", "parallel": {"dp": 2}, "limits": LIMITS}
    plan = planned(tmp_path, GPU_BOX, **entry)
    assert (plan.device, plan.engine) == ("cpu", EngineKind.OFFLOAD)
    assert "stream" in plan.reasons["device"]
    error = refused(tmp_path, GPU_BOX, MIXTURE, device="cuda", **entry)
    assert error.param == "models[0].device"
    assert error.remedy


def test_memory_that_is_short_on_either_side_is_refused(tmp_path: Path):
    entry: dict[str, Any] = {"engine": "auto", "parallel": {"dp": 2}, "device": "cuda"}
    large = {"max_context": 128, "max_step_tokens": 2**17}
    error = refused(
        tmp_path, Topology(nodes=(node(8, 2.5, (200, 200)),)), MIXTURE, limits=large, **entry
    )
    assert "host memory" in error.cause
    assert error.param == "models[0].limits.max_step_tokens"
    small = Topology(nodes=(node(8, 64, (1, 1)),))
    error = refused(tmp_path, small, MIXTURE, limits=large, **entry)
    assert "GPU memory" in error.cause
    assert error.param == "models[0].parallel.dp"
    assert "parallel.tp" not in error.remedy
