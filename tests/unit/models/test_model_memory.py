"""What the planner counts is what the loader loads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.base.errors import ConfigError
from cluster.planner.layout import Layout
from replicas.kernels.triton_ops import TritonKernels
from replicas.models.checkpoint import load_weights
from replicas.models.hf_config import arch_from_hf
from replicas.models.memory import kv_bytes_per_token, weight_bytes_per_rank
from replicas.models.weight_units import weight_units
from tests.support.tiny_models import TINY_NAMES

# The odd one has a feed-forward width that no group of ranks can share.
SPLIT = [name for name in TINY_NAMES if name != "gpt2_odd"]


@pytest.mark.parametrize(
    ("name", "tp_size", "dtype"),
    [(name, 1, "float32") for name in TINY_NAMES] + [(name, 4, "bfloat16") for name in SPLIT],
)
def test_planned_bytes_are_loaded_bytes(
    checkpoint: Callable[[str], Path], name: str, tp_size: int, dtype: str
) -> None:
    path = checkpoint(name)
    arch = arch_from_hf(json.loads((path / "config.json").read_text()))
    planned = weight_bytes_per_rank(arch, tp_size, dtype)
    for rank in {0, tp_size - 1}:
        progress: list[tuple[int, int]] = []
        units = weight_units(arch, rank, tp_size)
        weights = load_weights(
            path,
            units,
            dtype=dtype,
            device="cpu",
            on_progress=lambda done, total, log=progress: log.append((done, total)),
        )
        tensors = {t.data_ptr(): t for unit in units for t in weights.acquire(unit.name).values()}
        assert sum(tensor.nbytes for tensor in tensors.values()) == planned
        assert progress[-1] == (planned, planned)
        assert progress == sorted(progress)


@pytest.mark.parametrize("name", ["mixtral", "mixtral_uneven", "qwen3_moe_uneven", "pr_moe"])
def test_the_first_expert_parallel_rank_is_planned_and_none_holds_more(
    checkpoint: Callable[[str], Path], name: str
) -> None:
    path = checkpoint(name)
    arch = arch_from_hf(json.loads((path / "config.json").read_text()))
    layout = Layout(tp_size=2, dp_size=2, spreads_experts=True, num_redundant=1)
    loaded = []
    for rank in range(layout.num_ranks):
        units = weight_units(arch, rank % 2, 2, layout.held_by(arch, rank))
        weights = load_weights(path, units, dtype="float32", device="cpu")
        tensors = {t.data_ptr(): t for unit in units for t in weights.acquire(unit.name).values()}
        loaded.append(sum(tensor.nbytes for tensor in tensors.values()))
    assert loaded[0] == weight_bytes_per_rank(arch, 2, "float32", layout.held_by(arch, 0))
    assert max(loaded) == loaded[0]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_planned_fp8_bytes_are_loaded_bytes(checkpoint: Callable[[str], Path], name: str) -> None:
    """Weights without whole tiles stay plain, in the plan too."""
    path = checkpoint(name)
    arch = arch_from_hf(json.loads((path / "config.json").read_text()))
    units = weight_units(arch, 0, 1)
    kernels = TritonKernels(fp8=True)
    weights = load_weights(path, units, dtype="bfloat16", device="cpu", kernels=kernels)
    tensors = {
        tensor.data_ptr(): tensor
        for unit in units
        for tensor in weights.acquire(unit.name).values()
        if not tensor.is_meta
    }
    planned = weight_bytes_per_rank(arch, 1, "bfloat16", fp8=True)
    assert sum(tensor.nbytes for tensor in tensors.values()) == planned
    assert planned < weight_bytes_per_rank(arch, 1, "bfloat16")


def test_kv_bytes_count_replicated_heads(checkpoint: Callable[[str], Path]) -> None:
    path = checkpoint("llama")
    arch = arch_from_hf(json.loads((path / "config.json").read_text()))
    assert kv_bytes_per_token(arch, 1, "float32") == 2 * 3 * 2 * 8 * 4
    assert kv_bytes_per_token(arch, 2, "bfloat16") == 2 * 3 * 1 * 8 * 2
    assert kv_bytes_per_token(arch, 4, "bfloat16") == 2 * 3 * 1 * 8 * 2


def test_impossible_splits_and_dtypes_are_refused(checkpoint: Callable[[str], Path]) -> None:
    path = checkpoint("llama")
    arch = arch_from_hf(json.loads((path / "config.json").read_text()))
    with pytest.raises(ConfigError, match="8 attention heads"):
        weight_bytes_per_rank(arch, 3, "float32")
    with pytest.raises(ConfigError, match="int8"):
        kv_bytes_per_token(arch, 1, "int8")
