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


def plan_model(tmp_path: Path, topology: Topology, config: Any = TINY, **model: Any) -> ClusterPlan:
    write_checkpoint(tmp_path / "ckpt", config)
    spec = ClusterSpec.model_validate({"models": [{"name": "m", "path": "ckpt", **model}]})
    return make_plan(spec, topology, directory=tmp_path)


def refused(tmp_path: Path, topology: Topology, config: Any = TINY, **model: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        plan_model(tmp_path, topology, config, **model)
    return caught.value
