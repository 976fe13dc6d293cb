"""The engine on one GPU, in bf16 and fp8, beside the device's own speed and transformers.

    python -m bench.gpu [--size 8b] [--batches 1 8 64 256] [--no-peer]

Needs torch, triton, transformers, safetensors and tokenizers; no Ray, no pydantic, no grpc. Decode:
128-token prompts, whole engine steps (scheduling and sampling included), against the time that
reading weights and KV takes at the memory's measured rate. Prefill: one prompt of 2048 tokens
against the measured rate of matrix multiplication. `--device cpu --size tiny` tries the program.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Iterator, Sequence

import torch

from bench.gpu.ceilings import matmul_flops_per_s, read_bytes_per_s
from bench.gpu.ours import GpuEngine
from bench.gpu.shapes import SHAPES, linear_parameters
from bench.report import Row, Samples, compared, format_table, measured, write_report
from replicas.models.context import torch_dtype
from replicas.worker.device import open_device

PROMPT_TOKENS = 128
PREFILL_TOKENS = 2048
DECODE_TARGETS = {1: 0.85, 64: 0.75}
PREFILL_TARGET = 0.65
PEER_BATCH = 64
PEER_TARGET = 3.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write bench/results/gpu.json; other sizes and devices are only printed."""
    options = _options(arguments)
    device = open_device(options.device, 0)
    size = 2**30 if device.type == "cuda" else 2**26
    read_rate = read_bytes_per_s(device, size)
    matmul_rate = matmul_flops_per_s(device, torch_dtype(options.dtype), size=size >> 17)
    rows = [
        measured("device", "read", "GB/s", _one(read_rate / 1e9)),
        measured("device", f"matmul {options.dtype}", "TFLOP/s", _one(matmul_rate / 1e12)),
    ]
    peer_s = _peer(options, device)
    for kernels in options.kernels:
        engine = GpuEngine(options.size, options.dtype, device, kernels)
        case = f"{options.size} {engine.model.kernels.name}"
        rows += _decode_rows(engine, case, options, read_rate, peer_s)
        rows += _prefill_rows(engine, case, options, matmul_rate)
        del engine
        gc.collect()
    if options.size == "8b" and device.type == "cuda":
        write_report("gpu", rows)
    else:
        print(format_table(rows))
    return 0


def _decode_rows(
    engine: GpuEngine,
    case: str,
    options: argparse.Namespace,
    read_rate: float,
    peer_s: Samples | None,
) -> Iterator[Row]:
    for batch in options.batches:
        run = engine.decode(batch, PROMPT_TOKENS, options.steps)
        name = f"{case} decode {batch}{'' if run.graphed else ' (no graphs)'}"
        rate = Samples(values=tuple(batch / step_s for step_s in run.step_s))
        ceiling = _one(batch * read_rate / run.bytes_per_step)
        row = measured(name, "tokens/s", "1/s", rate)
        yield compared(row, "memory roofline", ceiling, target=DECODE_TARGETS.get(batch))
        if peer_s is not None and batch == PEER_BATCH:
            theirs = Samples(values=tuple(batch / step_s for step_s in peer_s.values))
            yield compared(row, "transformers, compiled", theirs, target=PEER_TARGET)


def _prefill_rows(
    engine: GpuEngine, case: str, options: argparse.Namespace, matmul_rate: float
) -> Iterator[Row]:
    tokens = min(PREFILL_TOKENS, engine.arch.max_position - 8)
    times = engine.prefill(tokens, options.repeats)
    work = 2 * linear_parameters(engine.model.units) * tokens
    rate = Samples(values=tuple(work / time_s / 1e12 for time_s in times))
    row = measured(f"{case} prefill {tokens}", "linears", "TFLOP/s", rate)
    yield compared(row, "measured matmul", _one(matmul_rate / 1e12), target=PREFILL_TARGET)


def _peer(options: argparse.Namespace, device: torch.device) -> Samples | None:
    if not options.peer or PEER_BATCH not in options.batches:
        return None
    from bench.gpu.transformers_peer import decode_step_s

    times = decode_step_s(
        options.size,
        torch_dtype(options.dtype),
        device,
        (PEER_BATCH, PROMPT_TOKENS, options.steps),
    )
    gc.collect()
    return Samples(values=tuple(times))


def _one(value: float) -> Samples:
    return Samples(values=(value,))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=list(SHAPES), default="8b")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--kernels", nargs="+", default=["auto", "fp8"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64, 256])
    parser.add_argument("--steps", type=int, default=64, help="decode steps per batch size")
    parser.add_argument("--repeats", type=int, default=5, help="prompts of the prefill case")
    parser.add_argument("--no-peer", dest="peer", action="store_false")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
