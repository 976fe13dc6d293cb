"""Tensor-parallel ranks stream their slices only, each over a link of its own: N links, N times."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from offload.record_sizes import record_bytes
from offload.ring import Ring
from offload.schedule import build_schedule
from replicas.models.hf_config import arch_from_hf
from replicas.models.weight_units import weight_units
from tests.support.fake_link import FakeLink, VirtualClock

GB = 10**9
DEMO = Path(__file__).parents[3] / "examples" / "models" / "demo-dense" / "config.json"
LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "max_position_embeddings": 8192,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}


def shard_bytes(config: dict, rank: int, size: int) -> dict[str, int]:
    """Bytes of each unit's record on one rank, as the store declares them."""
    units = weight_units(arch_from_hf(config), rank, size)
    return {unit.name: record_bytes(unit, "bfloat16") for unit in units}


def seconds_of_passes(shards: Sequence[dict[str, int]], compute_s: float, passes: int = 3) -> float:
    """Ranks in step: a layer is done when the slowest rank has its slice and has computed."""
    units = list(shards[0])
    clocks = [VirtualClock() for _ in shards]
    rings = [
        Ring(build_schedule(units, 3, 3), FakeLink(shard, bytes_per_s=5 * GB, clock=clock))
        for shard, clock in zip(shards, clocks, strict=True)
    ]
    for unit in units * passes:
        for ring, clock in zip(rings, clocks, strict=True):
            ring.acquire(unit)
            clock.now_s += compute_s / len(shards)
        together_s = max(clock.now_s for clock in clocks)
        for ring, clock in zip(rings, clocks, strict=True):
            clock.now_s = together_s
            ring.release(unit)
    return max(clock.now_s for clock in clocks)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_n_links_move_the_weights_n_times_as_fast(size: int) -> None:
    alone = seconds_of_passes([shard_bytes(LLAMA_70B, 0, 1)], compute_s=0.01)
    shards = [shard_bytes(LLAMA_70B, rank, size) for rank in range(size)]
    assert alone / seconds_of_passes(shards, compute_s=0.01) >= 0.95 * size


@pytest.mark.parametrize("size", [2, 4])
def test_each_rank_reads_its_nth_part(size: int) -> None:
    for config, spare in ((LLAMA_70B, 1.01), (json.loads(DEMO.read_text()), 1.05)):
        whole = sum(shard_bytes(config, 0, 1).values())
        for rank in range(size):
            assert sum(shard_bytes(config, rank, size).values()) <= spare * whole / size
