"""Cores, memory and GPUs as this process may use them, from made-up kernel files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cluster.base.env import read_environment
from cluster.planner.hardware import (
    HostFiles,
    local_topology,
    usable_cores,
    usable_memory_bytes,
    visible_devices,
)

GIB = 2**30
CORES = len(os.sched_getaffinity(0))


def _host(tmp_path: Path, cgroup: str, files: dict[str, str]) -> HostFiles:
    proc = tmp_path / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal:       16777216 kB\nMemFree: 1 kB\n")
    (proc / "self" / "cgroup").write_text(cgroup)
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return HostFiles(proc=proc, cgroup=tmp_path / "cgroup")


def test_without_limits(tmp_path: Path):
    files = _host(tmp_path, "0::/user.slice\n", {})
    assert usable_memory_bytes(files) == 16 * GIB
    assert usable_cores(files) == CORES


def test_v2_takes_the_tightest_level(tmp_path: Path):
    files = _host(
        tmp_path,
        "0::/a/b\n",
        {
            "memory.max": "max",
            "a/memory.max": f"{4 * GIB}\n",
            "a/b/memory.max": "max\n",
            "a/b/cpu.max": "max 100000\n",
            "a/cpu.max": "100000 100000\n",
        },
    )
    assert usable_memory_bytes(files) == 4 * GIB
    assert usable_cores(files) == 1


def test_v2_in_a_container_sees_only_the_root(tmp_path: Path):
    files = _host(tmp_path, "0::/../../host/path\n", {"memory.max": str(GIB)})
    assert usable_memory_bytes(files) == GIB


def test_v1(tmp_path: Path):
    files = _host(
        tmp_path,
        "5:cpu,cpuacct:/box\n4:memory:/box\n",
        {
            "memory/box/memory.limit_in_bytes": str(2 * GIB),
            "memory/memory.limit_in_bytes": str(2**63 - 4096),
            "cpu,cpuacct/box/cpu.cfs_quota_us": "150000",
            "cpu,cpuacct/box/cpu.cfs_period_us": "100000",
            "cpu,cpuacct/cpu.cfs_quota_us": "-1",
            "cpu,cpuacct/cpu.cfs_period_us": "100000",
        },
    )
    assert usable_memory_bytes(files) == 2 * GIB
    assert usable_cores(files) == 1


@pytest.mark.parametrize("text", ["", "junk", "max max", "0 0", "-5 x"])
def test_odd_files_count_as_no_limit(text: str, tmp_path: Path):
    files = _host(tmp_path, "0::/\nnonsense\n", {"memory.max": text, "cpu.max": text})
    assert usable_memory_bytes(files) == 16 * GIB
    assert usable_cores(files) >= 1


SMI = (
    "0, GPU-aaaa1111, NVIDIA H100 80GB HBM3, 81559\n"
    "1, GPU-bbbb2222, NVIDIA H100 80GB HBM3, 81559\n"
    "2, GPU-cccc3333, NVIDIA T4, [N/A]\n"
    "3, GPU-dddd4444, NVIDIA T4, 15360\n"
)


@pytest.mark.parametrize(
    ("visible", "indices"),
    [
        (None, [0, 1, 3]),
        ("", []),
        ("  ", []),
        ("1,0", [1, 0]),
        ("1,7,0", [1]),
        ("-1", []),
        ("NoDevFiles", []),
        ("GPU-bbbb", [1]),
        ("0,0", [0]),
        ("3", [3]),
    ],
)
def test_visible_devices_as_cuda_reads_them(visible: str | None, indices: list[int]):
    devices = visible_devices(lambda: SMI, visible)
    assert [device.index for device in devices] == indices
    if indices == [0, 1, 3]:
        assert devices[0].kind == "NVIDIA H100 80GB HBM3"
        assert devices[0].memory_bytes == 81559 * 2**20


@pytest.mark.parametrize("output", ["", "NVIDIA-SMI has failed because ...\n", "a,b\n"])
def test_no_driver_is_no_gpu(output: str):
    assert visible_devices(lambda: output, None) == ()


def test_this_machine():
    environment = read_environment({"HOME": "/h", "CUDA_VISIBLE_DEVICES": ""})
    (node,) = local_topology(environment).nodes
    assert 1 <= node.cores <= CORES
    assert node.memory_bytes > 2**28
    assert node.devices == ()
    assert node.host
