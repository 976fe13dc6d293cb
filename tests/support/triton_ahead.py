"""Compiles what Triton would launch on a GPU, on a machine that has none; prints what it takes.

    python -m tests.support.triton_ahead ARCH > launches.json

The launching code runs as it is, over CPU tensors; a launch compiles its kernel down to machine
code for the CUDA architecture ARCH (90 is Hopper) instead of starting it. Runs in a process of
its own: whether Triton compiles or interprets is settled when a kernel is defined.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget

from moe.experts import DOWN, DOWN_BIAS, UP, UP_BIAS
from replicas.kernels.expert_ops import ExpertSet
from replicas.kernels.gpu import paged_attention
from replicas.kernels.ops import HeadShape, HeadTensors
from replicas.kernels.triton_experts import TritonExperts
from replicas.kernels.triton_ops import FP8_SINCE, TritonKernels

_USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")
_MATRIX_INSTRUCTION = re.compile(r"(?:wgmma\.mma_async|mma\.sync)\S+")


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """One launch: what was asked for and what its code takes of a multiprocessor."""

    kernel: str
    case: str
    constants: dict[str, Any]
    shared_bytes: int
    registers: int
    stack_bytes: int
    """Per thread, mostly registers that did not fit."""
    matrix_instructions: list[str]


class _NoDevice:
    """What Triton asks its driver before it compiles."""

    def __init__(self, arch: int) -> None:
        self._target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


class _Recorder:
    """Turns launches into compilations; `case` names what is compiled next."""

    def __init__(self, arch: int) -> None:
        self.case = ""
        self.compiled: list[Compiled] = []
        triton.runtime.driver.set_active(_NoDevice(arch))
        recorder = self

        def launcher(kernel: Any, grid: Any) -> Callable[..., None]:
            return lambda *args, **constants: recorder.compile(kernel, grid, args, constants)

        triton.runtime.jit.JITFunction.__getitem__ = launcher

    def compile(
        self, kernel: Any, grid: Any, args: tuple[Any, ...], constants: dict[str, Any]
    ) -> None:
        code = kernel.warmup(*args, grid=grid, **constants)
        registers, stack = _usage(code.asm["cubin"])
        self.compiled.append(
            Compiled(
                kernel=kernel.fn.__name__,
                case=self.case,
                constants=constants,
                shared_bytes=code.metadata.shared,
                registers=registers,
                stack_bytes=stack,
                matrix_instructions=sorted(set(_MATRIX_INSTRUCTION.findall(code.asm["ptx"]))),
            )
        )


def _usage(cubin: bytes) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-res-usage", file.name],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    found = _USAGE.search(listing)
    assert found, listing
    return int(found[1]), int(found[2])


def _attention(recorder: _Recorder, dtype: torch.dtype) -> None:
    """(query heads, kv heads, head width, window, sinks) of models that are served."""
    shapes = {
        "llama": (32, 8, 128, 0, False),
        "mistral": (32, 8, 128, 4096, False),
        "gpt-oss": (64, 8, 64, 128, True),
        "multi-query": (71, 1, 64, 0, False),
        "head of 80": (32, 32, 80, 0, False),
        "head of 256": (8, 4, 256, 0, False),
        "deepseek": (128, 1, 576, 0, False),
    }
    for name, (heads, kv_heads, dim, window, sinks) in shapes.items():
        recorder.case = f"{name} {dtype}"
        batch = paged_attention.PagedBatch(
            query_start_R1=torch.tensor([0, 39, 40]),
            seq_lens_R=torch.tensor([39, 500]),
            block_tables_RN=torch.zeros((2, 64), dtype=torch.int32),
            max_query_len=39,
            max_seq_len=500,
            has_decodes=True,
        )
        shape = paged_attention.PagedShape(
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=dim,
            block_size=16,
            scale=0.1,
            window=window,
            shared_plane=dim == 576,
        )
        query = torch.empty((40, heads, dim), dtype=dtype)
        cache = torch.empty((2, 64, 16, kv_heads, dim), dtype=dtype)
        paged_attention.paged_attention(
            query,
            cache,
            batch,
            shape,
            torch.empty_like(query),
            torch.empty(heads, dtype=dtype) if sinks else None,
        )
        rows = query[:, :kv_heads]
        paged_attention.write_slots(
            rows, rows, cache, torch.zeros(40, dtype=torch.int64), shared_plane=shape.shared_plane
        )


def _rows(recorder: _Recorder, dtype: torch.dtype) -> None:
    recorder.case = f"rows {dtype}"
    kernels = TritonKernels()
    hidden = torch.empty((4, 8192), dtype=dtype)
    kernels.rms_norm(hidden, hidden[0], 1e-5)
    kernels.add_rms_norm(hidden, hidden, hidden[0], 1e-5)
    kernels.silu_mul(torch.empty((4, 2 * 14336), dtype=dtype))
    heads = HeadShape(num_heads=32, num_kv_heads=8, head_dim=128, norm_eps=1e-6)
    angles = torch.empty((4, 1, 128), dtype=dtype)
    for norm in (None, torch.empty(128, dtype=dtype)):
        tensors = HeadTensors(query_norm_P=norm, key_norm_P=norm, cos_sin=(angles, angles))
        kernels.prepare_heads(torch.empty((4, 48 * 128), dtype=dtype), heads, tensors)


def _experts(recorder: _Recorder, dtype: torch.dtype, *, biased: bool) -> None:
    recorder.case = f"experts {dtype}{' with biases' if biased else ''}"
    tensors = {
        UP: torch.empty((2 * 768, 2048), dtype=dtype),
        DOWN: torch.empty((2048, 768), dtype=dtype),
    }
    if biased:
        tensors |= {
            UP_BIAS: torch.empty(2 * 768, dtype=dtype),
            DOWN_BIAS: torch.empty(2048, dtype=dtype),
        }
    experts = ExpertSet(
        tensors=(tensors,) * 4,
        held=(0, 1, 2, 3),
        down_bias=biased,
        glu_limit=7.0 if biased else 0.0,
    )
    slots = torch.zeros((4, 2), dtype=torch.int64)
    TritonExperts(experts).forward(torch.empty((4, 2048), dtype=dtype), slots, torch.ones((4, 2)))


def _fp8(recorder: _Recorder, dtype: torch.dtype) -> None:
    recorder.case = f"fp8 {dtype}"
    kernels = TritonKernels(fp8=True)
    codes = kernels.pack("weight", torch.ones((16, 14336), dtype=dtype))
    kernels.linear(torch.ones((4, 14336), dtype=dtype), codes, "weight")


def main(arch: int) -> None:
    """Compile all and print a list of `Compiled`."""
    recorder = _Recorder(arch)
    _attention(recorder, torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        _rows(recorder, dtype)
        _experts(recorder, dtype, biased=dtype is torch.bfloat16)
        if arch >= FP8_SINCE:
            _fp8(recorder, dtype)
    json.dump([asdict(compiled) for compiled in recorder.compiled], sys.stdout)


if __name__ == "__main__":
    main(int(sys.argv[1]))
