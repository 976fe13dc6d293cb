"""Refusals: the arithmetic, the key at fault, and a remedy that was tried and works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fake_checkpoints import LLAMA_3_8B, TINY, write_checkpoint
from planned_models import LAPTOP, node, plan_model, refused

from cluster.base.errors import ConfigError
from cluster.base.spec import ClusterSpec
from cluster.dist.topology import Topology
from cluster.planner.planner import make_plan


def test_refuses_a_split_with_the_nearest_that_work(tmp_path: Path):
    error = refused(tmp_path, LAPTOP, parallel={"tp": 3})
    assert error.param == "models[0].parallel.tp"
    assert "8 attention heads" in error.cause
    assert error.remedy == "Set tp to 2 or 4 (possible: 1, 2, 4, 8)."


def test_refuses_more_context_than_the_model_has(tmp_path: Path):
    error = refused(tmp_path, LAPTOP, limits={"max_context": 513})
    assert (error.param, "512" in error.remedy) == ("models[0].limits.max_context", True)


def test_refuses_gpus_that_are_not_there(tmp_path: Path):
    error = refused(tmp_path, LAPTOP, device="cuda", replicas=2, parallel={"tp": 2})
    assert error.param == "models[0].device"
    assert "2 replicas of tp=2 needs 4 GPUs" in error.cause
    assert "device: cpu" in error.remedy


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ({"device": "cpu"}, "the ranks run on cpu"),
        ({"device": "cuda", "engine": "offload"}, "offload.precision"),
    ],
)
def test_refuses_fp8_where_it_changes_nothing(tmp_path: Path, entry: dict[str, Any], why: str):
    machine = Topology(nodes=(node(8, 64, (24,)),))
    error = refused(tmp_path, machine, quantization="fp8", **entry)
    assert error.param == "models[0].quantization"
    assert why in error.cause


@pytest.mark.parametrize(
    ("entry", "key", "why"),
    [
        ({"dtype": "float16", "kernels": "native"}, "kernels", "cannot compute in float16"),
        (
            {"device": "cuda", "kernels": "torch", "quantization": "fp8"},
            *("kernels", "the products of quantization: fp8"),
        ),
        (
            {"kernels": "torch", "attention_backend": "cpu_paged"},
            *("attention_backend", "one of the compiled kernels"),
        ),
        ({"attention_backend": "triton_paged"}, "attention_backend", "the ranks on cpu"),
        ({"device": "cuda", "attention_backend": "cpu"}, "attention_backend", "the ranks on cuda"),
    ],
)
def test_refuses_kernels_that_cannot_be(
    tmp_path: Path, entry: dict[str, Any], key: str, why: str
) -> None:
    machine = Topology(nodes=(node(8, 64, (24,)),))
    error = refused(tmp_path, machine, **{"device": "cpu", **entry})
    assert error.param == f"models[0].{key}"
    assert why in error.cause


def test_refuses_a_replica_across_nodes(tmp_path: Path):
    pair = Topology(nodes=(node(8, 64, (24,), "a"), node(8, 64, (24,), "b")))
    assert "on one node" in refused(tmp_path, pair, device="cuda", parallel={"tp": 2}).cause


def test_out_of_memory_names_replicas_that_fit(tmp_path: Path):
    machine = Topology(nodes=(node(16, 64),))
    error = refused(tmp_path, machine, LLAMA_3_8B, dtype="bfloat16", replicas=5)
    assert error.param == "models[0].replicas"
    assert "weights 14.96GiB" in error.cause
    assert error.remedy.startswith("Lower replicas to 3")
    plan_model(tmp_path, machine, LLAMA_3_8B, dtype="bfloat16", replicas=3)


def test_out_of_memory_names_a_dtype_that_fits(tmp_path: Path):
    machine = Topology(nodes=(node(8, 32),))
    error = refused(tmp_path, machine, LLAMA_3_8B, dtype="float32")
    assert "set dtype: bfloat16" in error.remedy.lower()
    plan_model(tmp_path, machine, LLAMA_3_8B, dtype="bfloat16")


def test_out_of_memory_names_a_cache_that_fits(tmp_path: Path):
    error = refused(tmp_path, LAPTOP, kv_cache={"memory": "32GiB"})
    assert error.param == "models[0].kv_cache.memory"
    size = error.remedy.split("kv_cache.memory to ")[1].split(",")[0].rstrip(".")
    plan_model(tmp_path, LAPTOP, kv_cache={"memory": size})


def test_out_of_memory_names_a_step_that_fits(tmp_path: Path):
    config = {**TINY, "vocab_size": 1_000_000, "max_position_embeddings": 8192}
    machine = Topology(nodes=(node(2, 8),))
    error = refused(tmp_path, machine, config, limits={"max_step_tokens": 100_000})
    tokens = int(error.remedy.split("max_step_tokens to ")[1].split(",")[0].rstrip("."))
    plan_model(tmp_path, machine, config, limits={"max_step_tokens": tokens})


def test_out_of_memory_without_a_remedy_says_how_much_is_missing(tmp_path: Path):
    machine = Topology(nodes=(node(2, 4),))
    error = refused(tmp_path, machine, LLAMA_3_8B, dtype="bfloat16")
    assert error.param == "models[0].parallel"
    assert "more memory" in error.remedy


def test_gpu_out_of_memory_names_a_wider_split(tmp_path: Path):
    machine = Topology(nodes=(node(8, 64, (12, 12, 12, 12)),))
    error = refused(tmp_path, machine, LLAMA_3_8B, device="cuda")
    assert error.param == "models[0].parallel.tp"
    assert error.remedy == "Raise parallel.tp to 2."
    plan_model(tmp_path, machine, LLAMA_3_8B, device="cuda", parallel={"tp": 2})


def test_cache_too_small_for_one_request(tmp_path: Path):
    asked: dict[str, Any] = {"dtype": "float32", "limits": {"max_context": 512}}
    error = refused(tmp_path, LAPTOP, kv_cache={"memory": "128KiB"}, **asked)
    assert error.param == "models[0].kv_cache.memory"
    assert "holds 256 tokens, but one request of 512 needs 32 blocks x 16 tokens" in error.cause
    assert error.remedy == "Raise kv_cache.memory to 256KiB, or lower limits.max_context to 256."
    plan_model(tmp_path, LAPTOP, kv_cache={"memory": "256KiB"}, **asked)


def test_cpus_that_do_not_fit(tmp_path: Path):
    error = refused(tmp_path, LAPTOP, parallel={"tp": 2}, resources={"cpus_per_rank": 2})
    assert error.param == "models[0].resources.cpus_per_rank"
    assert error.remedy == "Lower it to 0.9, or leave it to auto."


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantised by an unnamed method"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantised with awq"),
        ({"hidden_size": "big"}, "hidden_size"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000"),
    ],
)
def test_unsupported_checkpoints(change: dict[str, Any], cause: str, tmp_path: Path):
    error = refused(tmp_path, LAPTOP, {**TINY, **change})
    assert error.param == "models[0].path"
    assert cause in error.cause


def overflowing(tmp_path: Path, *overflows: Any) -> ConfigError:
    """The refusal of one entry for each of `overflows`, named m0, m1, ...; the last serves `other`.

    An entry overflows to nothing when its part is None.
    """
    write_checkpoint(tmp_path / "ckpt", TINY)
    write_checkpoint(tmp_path / "other", TINY)
    entries = [
        {"name": f"m{at}", "path": "ckpt"} | ({} if to is None else {"overflow": {"to": to}})
        for at, to in enumerate(overflows)
    ]
    entries[-1]["path"] = "other"
    spec = ClusterSpec.model_validate({"models": entries})
    with pytest.raises(ConfigError) as caught:
        make_plan(spec, LAPTOP, directory=tmp_path)
    return caught.value


def test_an_overflow_needs_another_entry_of_the_same_checkpoint(tmp_path: Path):
    error = overflowing(tmp_path, "nowhere", None)
    assert (error.param, error.remedy) == ("models[0].overflow.to", "Name one of: m1.")
    assert "the model itself" in overflowing(tmp_path, "m0", None).cause
    assert "another checkpoint (other)" in overflowing(tmp_path, "m1", None).cause
    error = overflowing(tmp_path, "m1", "m0", None)
    assert "overflows itself" in error.cause
    assert error.param == "models[0].overflow.to"
