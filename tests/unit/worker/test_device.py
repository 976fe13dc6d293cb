"""Device choice, dtypes and memory on a machine that may have no GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cluster.base.errors import ConfigError, DeviceOutOfMemoryError
from replicas.models.context import torch_dtype
from replicas.worker import device as devices


def test_open_cpu_sets_threads() -> None:
    before = torch.get_num_threads()
    try:
        assert devices.open_device("cpu", 1) == torch.device("cpu")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_unknown_or_missing_device_is_a_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="tpu"):
        devices.open_device("tpu", 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="sees none") as caught:
        devices.open_device("cuda", 0)
    assert caught.value.param == "device"
    assert "device: cpu" in caught.value.remedy


def test_dtypes() -> None:
    assert torch_dtype("bfloat16") is torch.bfloat16
    assert torch_dtype("float32") is torch.float32
    with pytest.raises(ConfigError, match="int8"):
        torch_dtype("int8")


def test_available_memory_respects_the_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 900 kB\nMemAvailable:     500 kB\n")
    (tmp_path / "max").write_text("max\n")
    (tmp_path / "current").write_text("100000\n")
    monkeypatch.setattr(devices, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(devices, "_CGROUP_LIMIT", tmp_path / "max")
    monkeypatch.setattr(devices, "_CGROUP_USED", tmp_path / "current")
    cpu = torch.device("cpu")
    assert devices.available_memory_bytes(cpu) == 500 * 1024
    (tmp_path / "max").write_text("150000\n")
    assert devices.available_memory_bytes(cpu) == 50000
    monkeypatch.setattr(devices, "_MEMINFO", tmp_path / "none")
    monkeypatch.setattr(devices, "_CGROUP_LIMIT", tmp_path / "none")
    assert devices.available_memory_bytes(cpu) > 10**8


def test_only_memory_errors_are_translated() -> None:
    with (
        pytest.raises(DeviceOutOfMemoryError, match="while testing"),
        devices.out_of_memory_as_error("testing"),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(RuntimeError, match="shape"), devices.out_of_memory_as_error("testing"):
        raise RuntimeError("shape mismatch")
