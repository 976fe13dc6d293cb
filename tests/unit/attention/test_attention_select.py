"""Choosing a backend: the fastest that can, with every reason when none does."""

from __future__ import annotations

import dataclasses
import logging

import pytest

from cluster.base.errors import ConfigError
from replicas.attention import triton_paged
from replicas.attention.backend import AttentionSpec
from replicas.attention.select import BACKEND_NAMES, select_backend
from replicas.kernels.cpu_ops import CpuKernels

CPU = AttentionSpec(
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    scale=0.5,
    block_size=4,
    dtype="float32",
    device="cpu",
)


def test_auto_takes_the_fastest_and_says_so(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_paged.importlib.util, "find_spec", lambda _: None)
    with caplog.at_level(logging.INFO):
        assert select_backend(CPU).name == "cpu"
        other = select_backend(dataclasses.replace(CPU, device="cuda:0"))
    assert other.name == "torch_ref"
    assert "attention backend cpu (auto)" in caplog.text
    assert "passed over cpu_paged: there are no compiled kernels" in caplog.text
    assert "cpu: it runs on cpu tensors, not on cuda:0" in caplog.text
    assert "triton_paged: triton is not installed" in caplog.text


def test_compiled_kernels_bring_their_backend(cpu_kernels: CpuKernels) -> None:
    assert select_backend(CPU, kernels=cpu_kernels).name == "cpu_paged"
    assert select_backend(CPU, "cpu_paged", cpu_kernels).name == "cpu_paged"
    odd = dataclasses.replace(CPU, dtype="bfloat16", head_dim=7)
    assert select_backend(odd, kernels=cpu_kernels).name == "cpu"


def test_paged_without_compiled_kernels_says_so() -> None:
    with pytest.raises(ConfigError, match="there are no compiled kernels"):
        select_backend(CPU, "cpu_paged")


@pytest.mark.parametrize(
    "name", [name for name in BACKEND_NAMES if name not in ("cpu_paged", "flashinfer")]
)
def test_a_name_is_taken_at_its_word(name: str) -> None:
    assert select_backend(CPU, name).name == name


def test_unknown_names_list_the_known() -> None:
    with pytest.raises(ConfigError, match="cpu_paged, cpu, triton_paged, flashinfer, torch_ref"):
        select_backend(CPU, "magic")


def test_every_reason_is_told() -> None:
    spec = dataclasses.replace(CPU, num_kv_heads=3, device="cuda")
    with pytest.raises(ConfigError) as caught:
        select_backend(spec)
    assert "cpu: it runs on cpu tensors, not on cuda, 4 heads do not share" in str(caught.value)
    assert "torch_ref: 4 heads do not share 3 kv heads evenly" in str(caught.value)
