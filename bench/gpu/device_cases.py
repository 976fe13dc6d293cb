"""First things first: the device's ceilings, and whether our kernels say there what torch's say."""

from __future__ import annotations

from collections.abc import Iterator

from bench.gpu.cases import Case, Lab, Setting, one
from bench.gpu.ceilings import (
    fp8_flops_per_s,
    host_to_device_bytes_per_s,
    matmul_flops_per_s,
    read_bytes_per_s,
)
from bench.gpu.ours import GpuEngine
from bench.report import Row, measured
from replicas.models.context import torch_dtype


def device_cases(setting: Setting) -> list[Case]:
    """Ceilings and a comparison of tokens."""
    return [
        Case(name="device-read", about_s=4.0, run=_read),
        Case(name="device-matmul", about_s=4.0, run=_matmul),
        Case(name="device-matmul-fp8", about_s=4.0, run=_matmul_fp8),
        Case(name="device-link", about_s=4.0, run=_link),
        Case(name="device-tokens", about_s=30.0, run=_tokens),
    ]


def _large(lab: Lab) -> int:
    return 2**22 if lab.setting.is_tiny else 2**30


def _side(lab: Lab) -> int:
    return 256 if lab.setting.is_tiny else 8192


def _read(lab: Lab) -> Iterator[Row]:
    rate = lab.facts["read"] = read_bytes_per_s(lab.device, _large(lab))
    yield measured("device", "memory", "GB/s", one(rate / 1e9))


def _matmul(lab: Lab) -> Iterator[Row]:
    dtype = torch_dtype(lab.setting.dtype)
    rate = lab.facts["matmul"] = matmul_flops_per_s(lab.device, dtype, _side(lab))
    yield measured("device", f"matmul {lab.setting.dtype}", "TFLOP/s", one(rate / 1e12))


def _matmul_fp8(lab: Lab) -> Iterator[Row]:
    if lab.device.type != "cuda":
        return
    rate = lab.facts["matmul fp8"] = fp8_flops_per_s(lab.device, _side(lab))
    yield measured("device", "matmul fp8", "TFLOP/s", one(rate / 1e12))


def _link(lab: Lab) -> Iterator[Row]:
    rate = lab.facts["link"] = host_to_device_bytes_per_s(lab.device, _large(lab))
    yield measured("device", "from pinned host memory", "GB/s", one(rate / 1e9))


def _tokens(lab: Lab) -> Iterator[Row]:
    """Greedy tokens of a small model in fp32: Triton's kernels and graphs against torch's.

    Raises:
        AssertionError: they differ.
    """
    told = {}
    for name, kernels, attention in (
        ("ours", "triton" if lab.device.type == "cuda" else "off", "auto"),
        ("torch", "off", "torch_ref"),
    ):
        engine = GpuEngine("tiny", "float32", lab.device, kernels, attention)
        told[name] = engine.tokens(batch=5, prompt_tokens=70, new_tokens=24)
    same = sum(ours == theirs for ours, theirs in zip(told["ours"], told["torch"], strict=True))
    if same < len(told["torch"]):
        raise AssertionError(f"only {same} of 5 requests got torch's tokens: {told}")
    yield measured("device", "requests with torch's tokens", "of 5", one(float(same)))
