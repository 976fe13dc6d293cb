"""Routed experts as units: sliced over ranks, or whole and only some of them on a rank."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.base.errors import ConfigError, CorruptWeightsError
from replicas.layers.weights import ResidentWeights
from replicas.models.arch import ArchConfig
from replicas.models.checkpoint import load_unit, load_weights
from replicas.models.hf_config import arch_from_hf
from replicas.models.memory import weight_bytes_per_rank
from replicas.models.mixture_weights import expert_unit
from replicas.models.weight_units import weight_units

Checkpoint = Callable[[str], Path]
# Two ranks that hold unequal numbers of experts, and one of them in copies; layer 1 is dense.
HELD = [[(0, 3), (), (4,)], [(1, 2, 3, 4), (), (0, 1, 2, 3)]]


def _arch(path: Path) -> ArchConfig:
    return arch_from_hf(json.loads((path / "config.json").read_text()))


def _load(
    path: Path, rank: int = 0, tp_size: int = 1, experts: list[tuple[int, ...]] | None = None
) -> ResidentWeights:
    units = weight_units(_arch(path), rank, tp_size, experts)
    return load_weights(path, units, dtype="float32", device="cpu")


def test_units_follow_their_layer_in_the_order_of_the_forward_pass(checkpoint: Checkpoint) -> None:
    arch = _arch(checkpoint("qwen2_moe"))
    experts = [f"expert.{expert}" for expert in range(5)]
    layers = [
        "layer.0",
        *(f"layer.0.{expert}" for expert in experts),
        "layer.1",
        "layer.2",
        *(f"layer.2.{expert}" for expert in experts),
    ]
    names = [unit.name for unit in weight_units(arch, 0, 1)]
    assert names == ["embed", *layers, "norm", "head"]
    held = [unit.name for unit in weight_units(arch, 0, 1, HELD[0])]
    assert held == [
        "embed",
        *("layer.0", "layer.0.expert.0", "layer.0.expert.3"),
        *("layer.1", "layer.2", "layer.2.expert.4"),
        *("norm", "head"),
    ]


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_an_expert_read_later_is_the_one_read_at_first(checkpoint: Checkpoint, name: str) -> None:
    path, weights = checkpoint(name), _load(checkpoint(name))
    unit = expert_unit(_arch(path), 2, 1)
    expected = weights.acquire(unit.name)
    later = load_unit(path, unit, dtype="float32")
    assert later.keys() == expected.keys()
    assert all(torch.equal(later[key], tensor) for key, tensor in expected.items())
    weights.exchange({"layer.2.expert.9": later}, ["layer.2.expert.0"])
    assert weights.acquire("layer.2.expert.9") is later
    with pytest.raises(KeyError):
        weights.acquire("layer.2.expert.0")


def test_an_expert_that_is_not_stored_any_more_is_named(tmp_path: Path, checkpoint: Checkpoint):
    path = checkpoint("mixtral")
    stored = load_file(path / "model.safetensors")
    gone = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    stored.pop(gone)
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(CorruptWeightsError, match=gone):
        load_unit(tmp_path, expert_unit(_arch(path), 0, 1), dtype="float32")


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss"])
def test_slices_of_an_expert_make_up_the_whole(checkpoint: Checkpoint, name: str) -> None:
    path = checkpoint(name)
    unit = "layer.2.expert.3"
    whole = _load(path).acquire(unit)
    parts = [_load(path, rank, 2).acquire(unit) for rank in range(2)]
    gates, ups = zip(*(part["gate_up.weight"].chunk(2) for part in parts), strict=True)
    assert torch.equal(torch.cat((*gates, *ups)), whole["gate_up.weight"])
    assert torch.equal(
        torch.cat([part["down.weight"] for part in parts], dim=1), whole["down.weight"]
    )


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_loads_the_experts_it_holds_whole_whatever_the_split_of_attention(
    checkpoint: Checkpoint, rank: int
) -> None:
    path = checkpoint("qwen2_moe")
    everything = _load(path)
    held = _load(path, rank, 2, HELD[rank])
    total = 0
    for unit in weight_units(_arch(path), rank, 2, HELD[rank]):
        tensors = held.acquire(unit.name)
        total += sum(tensor.nbytes for tensor in tensors.values())
        if "expert" in unit.name:
            for name, tensor in everything.acquire(unit.name).items():
                assert torch.equal(tensors[name], tensor)
    assert total == weight_bytes_per_rank(_arch(path), 2, "float32", HELD[rank])


def test_names_of_other_ranks_experts_are_expected_and_others_are_not(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    path = checkpoint("qwen2_moe")
    arch = _arch(path)
    fewer = dataclasses.replace(
        arch,
        layers=tuple(
            dataclasses.replace(
                layer,
                moe=dataclasses.replace(
                    layer.moe, gate=dataclasses.replace(layer.moe.gate, num_experts=4)
                ),
            )
            if layer.moe
            else layer
            for layer in arch.layers
        ),
    )
    units = weight_units(fewer, 0, 1, [(0,), (), ()])
    with pytest.raises(CorruptWeightsError, match=r"6 unexpected tensors: .*experts\.4\."):
        load_weights(path, units, dtype="float32", device="cpu")


def test_a_stacked_expert_is_unwound_into_gate_and_up(checkpoint: Checkpoint) -> None:
    path = checkpoint("gpt_oss")
    stored = load_file(path / "model.safetensors")
    prefix = "model.layers.1.mlp.experts."
    tensors = _load(path).acquire("layer.1.expert.4")
    fused = stored[f"{prefix}gate_up_proj"][4].T
    assert torch.equal(tensors["gate_up.weight"], torch.cat((fused[::2], fused[1::2])))
    bias = stored[f"{prefix}gate_up_proj_bias"][4]
    assert torch.equal(tensors["gate_up.bias"], torch.cat((bias[::2], bias[1::2])))
    assert torch.equal(tensors["down.weight"], stored[f"{prefix}down_proj"][4].T)
    assert torch.equal(tensors["down.bias"], stored[f"{prefix}down_proj_bias"][4])


def test_the_correction_bias_keeps_its_precision_and_extra_layers_are_left_alone(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    path = checkpoint("deepseek_v3")
    stored = load_file(path / "model.safetensors")
    arch = dataclasses.replace(_arch(path), num_prediction_layers=1)
    stored["model.layers.3.eh_proj.weight"] = torch.zeros(2, 2)
    save_file(stored, tmp_path / "model.safetensors")
    units = weight_units(arch, 0, 1)
    weights = load_weights(tmp_path, units, dtype="bfloat16", device="cpu")
    bias = weights.acquire("layer.1")["router.correction"]
    assert torch.equal(bias, stored["model.layers.1.mlp.gate.e_score_correction_bias"])
    without = weight_units(dataclasses.replace(arch, num_prediction_layers=0), 0, 1)
    with pytest.raises(CorruptWeightsError, match="eh_proj"):
        load_weights(tmp_path, without, dtype="bfloat16", device="cpu")


def test_splits_that_do_not_work_out(checkpoint: Checkpoint) -> None:
    arch = _arch(checkpoint("qwen3_moe"))
    odd = dataclasses.replace(arch, num_heads=16, num_kv_heads=16)
    assert odd.why_not_tp(16) == ["expert width 24 is not divisible by tp=16"]
    assert odd.why_not_tp(16, whole_experts=True) == []
    with pytest.raises(ConfigError, match="expert width 24"):
        weight_units(odd, 0, 16)
    shared = _arch(checkpoint("qwen2_moe"))
    wide = dataclasses.replace(shared, num_heads=16, num_kv_heads=16)
    assert any("shared expert width 40" in reason for reason in wide.why_not_tp(16))
