"""Any cluster file on any machine: a plan that keeps its promises, or a ConfigError."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fake_checkpoints import LLAMA_3_8B, TINY, write_checkpoint
from hypothesis import event, given, settings
from hypothesis import strategies as st
from planned_models import rates_for_tests

from cluster.base.errors import ConfigError
from cluster.base.plan import ClusterPlan, ModelPlan
from cluster.base.spec import ClusterSpec
from cluster.dist.topology import Device, Node, Topology
from cluster.planner.explain import explain, explain_reasons
from cluster.planner.planner import make_plan

GIB = 2**30


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkpoints")
    write_checkpoint(root / "tiny", TINY)
    write_checkpoint(root / "large", LLAMA_3_8B)
    return root


def _model(name: str) -> st.SearchStrategy[dict[str, Any]]:
    auto = st.just("auto")
    return st.fixed_dictionaries(
        {
            "name": st.just(name),
            "path": st.sampled_from(["tiny", "tiny", "tiny", "large"]),
            "replicas": st.integers(1, 4),
            "parallel": st.fixed_dictionaries({"tp": st.sampled_from([1, 2, 4, 8])}),
            "device": st.sampled_from(["auto", "auto", "cpu", "cuda"]),
            "dtype": st.sampled_from(["auto", "float32", "bfloat16", "float16"]),
            "kv_cache": st.fixed_dictionaries(
                {
                    "memory": auto | st.integers(2**20, GIB // 4),
                    "block_size": st.sampled_from([1, 16, 100]),
                }
            ),
            "limits": st.fixed_dictionaries(
                {
                    "max_context": auto | st.integers(1, 600),
                    "max_running_requests": st.integers(1, 200),
                    "max_step_tokens": auto | st.integers(1, 4096),
                }
            ),
            "resources": st.fixed_dictionaries({"cpus_per_rank": auto | auto | st.floats(0.01, 2)}),
        }
    )


nodes = st.builds(
    lambda cores, memory, gpus, name: Node(
        node_id=name,
        host=name,
        cores=cores,
        memory_bytes=memory,
        devices=tuple(Device(index=i, kind="g", memory_bytes=size) for i, size in enumerate(gpus)),
    ),
    st.integers(1, 64),
    st.integers(8 * GIB, 512 * GIB),
    st.lists(st.sampled_from([16 * GIB, 80 * GIB]), max_size=8),
    st.sampled_from("abc"),
)
topologies = st.lists(nodes, min_size=1, max_size=3, unique_by=lambda node: node.host).map(
    lambda found: Topology(nodes=tuple(found))
)


@given(_model("a"), st.none() | _model("b"), topologies, st.integers(1, 3))
@settings(max_examples=150)
def test_plans_keep_their_promises(
    checkpoints: Path,
    first: dict[str, Any],
    second: dict[str, Any] | None,
    topology: Topology,
    gateways: int,
):
    spec = ClusterSpec.model_validate(
        {"gateway": {"replicas": gateways}, "models": [first] + ([second] if second else [])}
    )
    plan = _plan_or_refusal(spec, topology, checkpoints)
    if isinstance(plan, ConfigError):
        _check_refusal(plan)
        return
    event("planned")
    for model in plan.models:
        _check_model(model)
    _check_nodes(plan, topology)
    for table in explain(plan) + explain_reasons(plan):
        assert all(len(row) == len(table.columns) for row in table.rows)


def _plan_or_refusal(
    spec: ClusterSpec, topology: Topology, directory: Path
) -> ClusterPlan | ConfigError:
    try:
        return make_plan(spec, topology, directory=directory, rates=rates_for_tests)
    except ConfigError as error:
        return error


def _check_refusal(error: ConfigError) -> None:
    event("refused")
    assert error.param is not None
    assert error.param.startswith("models[")
    assert error.cause.endswith(".")
    assert error.remedy.endswith(".")


def _check_model(model: ModelPlan) -> None:
    assert model.memory.total_bytes <= model.memory.available_bytes
    assert model.memory.kv_bytes == model.kv.bytes_per_rank
    assert model.scheduler.max_context <= model.kv.num_blocks * model.kv.block_size
    assert model.scheduler.max_running_requests <= model.scheduler.max_step_tokens
    assert model.num_threads >= 1
    assert model.cpus_per_rank > 0
    assert len(model.nodes) == model.replicas
    assert all(model.reasons.values())


def _check_nodes(plan: ClusterPlan, topology: Topology) -> None:
    """Nothing is booked twice: CPUs, memory and GPUs of every node."""
    for index, node in enumerate(topology.nodes):
        cpus = plan.gateway.replicas * plan.gateway.cpus if index == 0 else 0.0
        gpus, held = 0.0, 0
        for model in plan.models:
            replicas = model.nodes.count(node.host)
            ranks = replicas * model.tp_size
            cpus += replicas * model.leader_cpus + ranks * model.cpus_per_rank
            gpus += ranks * model.gpus_per_rank
            held += ranks * model.memory.total_bytes if model.device == "cpu" else 0
        assert cpus <= node.cores + 1e-6
        assert gpus <= len(node.devices)
        assert held <= node.memory_bytes
