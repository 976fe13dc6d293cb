"""A mixture that is planned for less memory than it needs, and runs in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.base.env import default_cache_dir
from cluster.base.plan import ModelPlan
from cluster.base.spec import ClusterSpec
from cluster.dist.topology import Node, Topology
from cluster.planner.planner import make_plan
from offload.assembly import kernel_adapter, streamed_weights
from offload.provider import StreamedWeights
from offload.runtime import Runtime
from replicas.api import GenerationRequest, SamplingParams
from tests.support.in_process_engine import in_process_engine
from tests.unit.offload.offload_shapes import machine

MODEL = Path(__file__).parents[3] / "examples" / "models" / "demo-moe"
KIB = 1024


def planned(tmp_path: Path, kib: int) -> ModelPlan:
    entry = {
        "name": "m",
        "path": str(MODEL),
        "engine": "offload",
        "dtype": "float32",
        "offload": {"device_memory": kib * KIB, "disk_path": "packed"},
        "kv_cache": {"memory": 1536 * KIB},
        "limits": {"max_context": 128, "max_step_tokens": 64, "step_timeout": "10s"},
    }
    spec = ClusterSpec.model_validate({"models": [entry]})
    node = Node(node_id="n", host="n", cores=2, memory_bytes=2**34, devices=())
    plan = make_plan(spec, Topology(nodes=(node,)), directory=tmp_path, rates=lambda _: machine())
    return plan.models[0]


@pytest.mark.parametrize("kib", [11_000, 13_000, 17_000])
def test_a_planned_mixture_runs_in_its_budget_with_the_tokens_of_a_resident_one(
    tmp_path: Path, kib: int
) -> None:
    plan = planned(tmp_path, kib).offload
    assert plan is not None
    assert 3 <= plan.expert_slots <= 24
    assert plan.read_timeout_s >= 8.0
    made: list[StreamedWeights] = []

    def factory(request):
        # Reserves all of it from the budget first, and refuses what does not fit.
        weights = streamed_weights(plan, Runtime(cache_dir=default_cache_dir(), poison=True))(
            request
        )
        made.append(weights)
        return weights

    requests = [
        GenerationRequest(
            request_id=f"r{index}",
            prompt_token_ids=tuple(range(10, 10 + 3 * index + 1)),
            params=SamplingParams(temperature=0.0, max_tokens=12),
        )
        for index in range(3)
    ]
    streamed = in_process_engine(MODEL, weights_factory=factory).generate(requests)
    resident = in_process_engine(MODEL).generate(requests)
    assert [c.token_ids for c in streamed] == [c.token_ids for c in resident]
    stats = made[0].stats
    assert stats.experts.num_reads <= 1.15 * stats.num_expert_misses + 24
    assert (stats.num_expert_hits > 0) == (plan.expert_slots > 3)
    assert kernel_adapter(plan) is None
