"""A model planned with its KV cache in host memory, and in micro-batches, runs in both budgets."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.base.plan import ModelPlan
from cluster.base.spec import ClusterSpec
from cluster.dist.topology import Node, Topology
from cluster.planner.planner import make_plan
from replicas.api import GenerationRequest, SamplingParams
from tests.support.in_process_engine import in_process_engine
from tests.support.offload_engine import offload_engine
from tests.unit.offload.offload_shapes import machine

MODEL = Path(__file__).parents[3] / "examples" / "models" / "demo-dense"
PROMPTS = (3, 60, 17, 1)


def planned(tmp_path: Path, **offload: object) -> ModelPlan:
    """The demo model in two thirds of its 11 MiB, beside 1 MiB for keys and values."""
    entry = {
        "name": "m",
        "path": str(MODEL),
        "engine": "offload",
        "dtype": "float32",
        "offload": {
            "device_memory": "9MiB",
            "host_memory": "1MiB",
            "disk_path": "packed",
            **offload,
        },
        "limits": {"max_context": 128, "max_step_tokens": 64},
    }
    spec = ClusterSpec.model_validate({"models": [entry]})
    node = Node(node_id="n", host="n", cores=2, memory_bytes=2**34, devices=())
    plan = make_plan(spec, Topology(nodes=(node,)), directory=tmp_path, rates=lambda _: machine())
    return plan.models[0]


@pytest.mark.parametrize("home", ["host", "streamed"])
@pytest.mark.parametrize("micro_batch", ["auto", 24])
def test_a_planned_model_runs_in_its_budgets_with_the_tokens_of_a_resident_one(
    tmp_path: Path, home: str, micro_batch: int | str
) -> None:
    model = planned(tmp_path, kv_home=home, micro_batch=micro_batch)
    plan = model.offload
    assert plan is not None
    assert plan.kv_home == home
    assert (plan.micro_batch_tokens == 24) == (micro_batch == 24)
    requests = [
        GenerationRequest(
            request_id=f"r{index}",
            prompt_token_ids=tuple(range(10, 10 + length)),
            params=SamplingParams(temperature=0.0, max_tokens=12),
        )
        for index, length in enumerate(PROMPTS)
    ]
    limits = {
        "block_size": model.kv.block_size,
        "num_blocks": model.kv.num_blocks,
        "max_context": model.scheduler.max_context,
        "max_step_tokens": model.scheduler.max_step_tokens,
    }
    # Everything is reserved from the plan's budgets first, and refused where it does not fit.
    streamed = offload_engine(MODEL, plan, **limits).generate(requests)
    resident = in_process_engine(MODEL, **limits).generate(requests)
    assert [c.token_ids for c in streamed] == [c.token_ids for c in resident]
