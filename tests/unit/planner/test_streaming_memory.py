"""Micro-batches, and homes of the KV cache, of streamed models: chosen, shown and refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_checkpoints import LLAMA_3_8B, write_checkpoint
from planned_models import GIB, LAPTOP, plan_model, rates_for_tests, refused

from cluster.base.plan import ModelPlan
from cluster.base.spec import ClusterSpec
from cluster.planner.explain import explain
from cluster.planner.planner import make_plan
from offload.machine_rates import RatesRequest
from offload.model_shape import model_shape
from offload.rates import Rates
from replicas.models.hf_config import arch_from_hf


def streamed(tmp_path: Path, **offload: Any) -> ModelPlan:
    entry = {"engine": "offload", "limits": {"max_context": 2048}, "offload": offload}
    (plan,) = plan_model(tmp_path, LAPTOP, LLAMA_3_8B, **entry).models
    return plan


def test_micro_batches_carry_a_larger_step_in_the_same_memory(tmp_path: Path) -> None:
    """A slow disk hides thousands of tokens, whose activations as a whole would take too much."""
    write_checkpoint(tmp_path / "ckpt", LLAMA_3_8B)

    def plan(**offload: Any) -> ModelPlan:
        entry = {
            "name": "m",
            "path": "ckpt",
            "engine": "offload",
            "limits": {"max_context": 2048},
            "offload": {"device_memory": "6GiB", **offload},
        }
        spec = ClusterSpec.model_validate({"models": [entry]})
        made = make_plan(spec, LAPTOP, directory=tmp_path, rates=slow_disk)
        return made.models[0]

    chosen, whole = plan(), plan(micro_batch=131_072)
    assert chosen.offload.micro_batch_tokens in (512, 128, 32)
    assert whole.offload.micro_batch_tokens == 0
    assert chosen.scheduler.max_step_tokens >= 2 * whole.scheduler.max_step_tokens
    assert f"micro-batches of {chosen.offload.micro_batch_tokens}" in chosen.reasons["engine"]
    asked = plan(micro_batch=64)
    assert asked.offload.micro_batch_tokens == 64
    assert asked.offload.workspace_bytes < whole.offload.workspace_bytes


def test_keys_and_values_in_host_memory_leave_the_device_to_weights(tmp_path: Path) -> None:
    small = {"device_memory": "5GiB"}
    plain = streamed(tmp_path, **small)
    beside = streamed(tmp_path, **small, host_memory="4GiB")
    assert plain.offload.kv_home == "device"
    assert beside.offload.kv_home == "host"
    assert beside.offload.host_bytes == 4 * GIB
    assert plain.kv.bytes_per_rank < beside.kv.bytes_per_rank <= 4 * GIB
    assert beside.speed.chosen.tokens_per_s > plain.speed.chosen.tokens_per_s
    assert "keys and values in host memory" in beside.reasons["engine"]
    held = beside.memory.weights_bytes + beside.offload.workspace_bytes
    assert held <= 5 * GIB


def test_a_streamed_cache_takes_windows_of_the_device(tmp_path: Path) -> None:
    asked = {"device_memory": "5GiB", "host_memory": "4GiB", "kv_home": "streamed"}
    model = streamed(tmp_path, **asked)
    offload, shape = model.offload, model_shape(arch_from_hf(LLAMA_3_8B), 1, "bfloat16")
    assert (offload.kv_home, offload.kv_windows) == ("streamed", 2)
    window_tokens = offload.kv_window_blocks * model.kv.block_size
    assert window_tokens % 2048 == 0
    windows = 2 * window_tokens * shape.kv_bytes_per_token // 32
    assert model.kv.bytes_per_rank <= 4 * GIB
    held = model.memory.weights_bytes + offload.workspace_bytes
    assert windows < model.memory.weights_bytes
    assert held <= 5 * GIB
    # On a CPU copies take the time of the cores that compute.
    host = streamed(tmp_path, **{**asked, "kv_home": "host"})
    assert model.speed.chosen.tpot_s >= host.speed.chosen.tpot_s
    assert model.speed.host_bytes > 0
    plan = plan_model(
        tmp_path, LAPTOP, LLAMA_3_8B, engine="offload", limits={"max_context": 2048}, offload=asked
    )
    tables = {table.title: table for table in explain(plan)}
    (computing,) = tables["How streamed models compute"].rows
    assert f"2 windows of {window_tokens} tokens" in computing[-1]


def slow_disk(request: RatesRequest) -> Rates:
    return replace(rates_for_tests(request), disk_bytes_per_s=5e7)


@pytest.mark.parametrize(
    ("model", "param", "told"),
    [
        ({"offload": {"kv_home": "host"}}, "offload.kv_home", "there is no host_memory"),
        (
            {"offload": {"kv_home": "device", "host_memory": "1GiB"}},
            "offload.host_memory",
            "nothing would be there",
        ),
        (
            {"offload": {"kv_home": "host", "host_memory": "100MiB"}},
            "offload.host_memory",
            "one request of 2048 tokens takes 2048 x 128KiB",
        ),
        (
            {"offload": {"device_memory": "6GiB", "host_memory": "900GiB"}},
            "offload.device_memory",
            "beside host_memory 900GiB",
        ),
        (
            {
                "offload": {
                    "device_memory": "1GiB",
                    "host_memory": "1GiB",
                    "kv_home": "streamed",
                }
            },
            "offload.device_memory",
            "2 windows of 2048 tokens of a layer",
        ),
        (
            {
                "offload": {"micro_batch": 64},
                "limits": {"max_context": 2048, "max_step_tokens": 64},
            },
            "offload.micro_batch",
            "no step has more than 64 tokens",
        ),
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
