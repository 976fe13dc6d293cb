"""Machines to plan for, and plans of one made-up model on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fake_checkpoints import TINY, write_checkpoint

from cluster.base.errors import ConfigError
from cluster.base.plan import ClusterPlan
from cluster.base.spec import ClusterSpec
from cluster.dist.topology import Device, Node, Topology
from cluster.planner.planner import make_plan
from cluster.planner.streaming import RatesSource
from offload.machine_rates import RatesRequest
from offload.rates import GemmPoint, Rates

GIB = 2**30


def node(cores: int, memory_gib: float, gpus_gib: tuple[int, ...] = (), name: str = "n0") -> Node:
    devices = tuple(
        Device(index=index, kind="GPU", memory_bytes=size * GIB)
        for index, size in enumerate(gpus_gib)
    )
    return Node(
        node_id=name, host=name, cores=cores, memory_bytes=int(memory_gib * GIB), devices=devices
    )


LAPTOP = Topology(nodes=(node(2, 16),))
BIG_CPU = Topology(nodes=(node(32, 256),))
GPU_BOX = Topology(nodes=(node(64, 512, (80,) * 8),))


def plan_model(
    tmp_path: Path,
    topology: Topology,
    config: Any = TINY,
    rates: RatesSource | None = None,
    **model: Any,
) -> ClusterPlan:
    write_checkpoint(tmp_path / "ckpt", config)
    entry = {"name": "m", "path": "ckpt", "engine": "tensor_parallel", **model}
    spec = ClusterSpec.model_validate({"models": [entry]})
    return make_plan(spec, topology, directory=tmp_path, rates=rates or rates_for_tests)


def rates_for_tests(request: RatesRequest) -> Rates:
    """A machine whose disk gives 3 GB/s, whatever is asked for."""
    return Rates(
        disk_bytes_per_s=3e9,
        link_bytes_per_s=20e9,
        memory_bytes_per_s=40e9,
        gemm=(GemmPoint(tokens=1, flops_per_s=20e9), GemmPoint(tokens=64, flops_per_s=500e9)),
        int8_gemm=(GemmPoint(tokens=1, flops_per_s=8e9), GemmPoint(tokens=64, flops_per_s=400e9)),
        int4_gemm=(GemmPoint(tokens=1, flops_per_s=9e9), GemmPoint(tokens=64, flops_per_s=400e9)),
        host_memory_bytes_per_s=40e9,
    )


def refused(tmp_path: Path, topology: Topology, config: Any = TINY, **model: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        plan_model(tmp_path, topology, config, **model)
    return caught.value
