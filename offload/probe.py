"""Measures what the cost model needs of a machine, in a few seconds. Run as a process of its own:

    python -m offload.probe --device cpu --threads 2 --dtype bfloat16 --disk DIR

prints the rates as one line of JSON. A process, because it sets threads, takes memory and may be
killed when the disk hangs; `offload/machine_rates.py` starts it with a deadline and keeps what it
says.
Each rate is the best of a few tries: what the machine can do undisturbed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from cluster.base.env import default_cache_dir
from offload.machine_rates import rates_to_json
from offload.precision import Precision
from offload.probe_decoding import measure_decoding
from offload.probe_rows import measure_rows
from offload.quant_kernels import QuantKernels
from offload.rates import GemmPoint, Rates
from offload.readers.choose import OpenEngine, choose_reader, openers
from offload.readers.choose import measure as measure_reader
from replicas.kernels.ops import Kernels
from replicas.kernels.select import select_kernels
from replicas.models.context import torch_dtype
from replicas.worker.device import open_device, synchronize

FILE_BYTES = 256 << 20
COPY_BYTES = 64 << 20
READ_BYTES = 256 << 20
GEMM_TOKENS = (1, 16, 64, 256)
"""Kernels change their way at 16 and at 64 rows."""
HOST_ROWS = 8
"""An expert that more rows visit is fetched, as a rule."""
WEIGHT_SHAPE = (4096, 2048)
NUM_WEIGHTS = 8
"""Together larger than the caches of a core's share, so that weights come from memory."""
TINY = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What is measured with."""

    device: torch.device
    dtype: torch.dtype
    kernels: Kernels

    def best_s(self, work: Callable[[], object], tries: int = 3) -> float:
        """Shortest time of `work`, after one run that warms up."""
        work()
        synchronize(self.device)
        times = []
        for _ in range(tries):
            started_s = time.perf_counter()
            work()
            synchronize(self.device)
            times.append(time.perf_counter() - started_s)
        return min(times)

    def cold_s(self, work: Callable[[], object], tries: int) -> float:
        """As `best_s`, with caches that hold something else, as weights do between two layers."""
        others = torch.ones(COPY_BYTES, dtype=torch.uint8, device=self.device)

        def time_one() -> float:
            others.add_(1)
            synchronize(self.device)
            started_s = time.perf_counter()
            work()
            synchronize(self.device)
            return time.perf_counter() - started_s

        work()
        return min(time_one() for _ in range(tries))


def measure(probe: Probe, disk: Path) -> Rates:
    """All rates.

    Raises:
        OSError: the directory cannot be written or read.
    """
    weights = [torch.full(WEIGHT_SHAPE, 0.01, dtype=probe.dtype) for _ in range(NUM_WEIGHTS)]
    packed = [_on_device(probe.kernels.pack("w.weight", weight), probe) for weight in weights]
    points = tuple(_gemm(probe, probe.kernels, packed, tokens) for tokens in GEMM_TOKENS)
    decoding = measure_decoding(torch.get_num_threads())
    rows = measure_rows(probe.kernels, probe.device, probe.dtype, probe.cold_s)
    return Rates(
        disk_bytes_per_s=_disk(disk),
        link_bytes_per_s=_link(probe),
        memory_bytes_per_s=_memory(probe, probe.device),
        gemm=points,
        int8_gemm=_quantised_gemm(probe, Precision.INT8, weights),
        int4_gemm=_quantised_gemm(probe, Precision.INT4, weights),
        host_memory_bytes_per_s=_memory(probe, torch.device("cpu")),
        host_flops_per_s=_host_flops(probe, weights),
        layer_overhead_s=_calls(probe) + rows.layer_s,
        row_value_s=rows.value_s,
        attention_bytes_per_s=rows.attention_bytes_per_s,
        decode_bytes_per_s=decoding.decode_bytes_per_s,
        decode_slowdown=decoding.decode_slowdown,
    )


def _gemm(
    probe: Probe, kernels: Kernels, packed: Sequence[dict[str, torch.Tensor]], tokens: int
) -> GemmPoint:
    input_TI = torch.ones((tokens, WEIGHT_SHAPE[1]), dtype=probe.dtype, device=probe.device)

    def multiply() -> None:
        for tensors in packed:
            kernels.linear(input_TI, tensors, "w.weight")

    seconds = probe.best_s(multiply, 5 if tokens < max(GEMM_TOKENS) else 2)
    flops = 2 * tokens * math.prod(WEIGHT_SHAPE) * len(packed)
    return GemmPoint(tokens=tokens, flops_per_s=flops / seconds)


def _host_flops(probe: Probe, weights: Sequence[torch.Tensor]) -> float:
    """What host cores make of experts beside a device; 0 where they are the device."""
    if probe.device.type == "cpu":
        return 0.0
    beside = replace(probe, device=torch.device("cpu"), kernels=probe.kernels.on_host)
    packed = [beside.kernels.pack("w.weight", weight) for weight in weights]
    return _gemm(beside, beside.kernels, packed, HOST_ROWS).flops_per_s


def _quantised_gemm(
    probe: Probe, precision: Precision, weights: Sequence[torch.Tensor]
) -> tuple[GemmPoint, ...]:
    kernels = QuantKernels(probe.kernels, precision, default_cache_dir() / "kernels")
    coded = kernels.quantise("w.weight", weights[0])
    # As many codes as caches do not hold; what they are does not matter.
    copies = [{name: t.clone() for name, t in coded.items()} for _ in range(2 * len(weights))]
    packed = [_on_device(tensors, probe) for tensors in copies]
    return tuple(_gemm(probe, kernels, packed, tokens) for tokens in GEMM_TOKENS)


def _on_device(tensors: dict[str, torch.Tensor], probe: Probe) -> dict[str, torch.Tensor]:
    return {
        name: tensor if tensor.is_meta else tensor.to(probe.device)
        for name, tensor in tensors.items()
    }


def _link(probe: Probe) -> float:
    """Host memory -> device; on the CPU a copy in memory."""
    on_host = torch.ones(COPY_BYTES, dtype=torch.uint8)
    source = on_host.pin_memory() if probe.device.type == "cuda" else on_host
    target = torch.empty(COPY_BYTES, dtype=torch.uint8, device=probe.device)
    return COPY_BYTES / probe.best_s(lambda: target.copy_(source, non_blocking=True))


def _memory(probe: Probe, device: torch.device) -> float:
    data = torch.ones(READ_BYTES // 4, device=device)
    return READ_BYTES / probe.best_s(data.sum)


def _calls(probe: Probe) -> float:
    """A layer's products with matrices that are next to nothing: what remains is calls."""
    kernels = probe.kernels
    tiny = torch.ones((TINY, TINY), dtype=probe.dtype)
    tensors = _on_device(kernels.pack("w.weight", tiny), probe)
    hidden_TD = torch.ones((1, TINY), dtype=probe.dtype, device=probe.device)

    def products() -> None:
        for _ in range(4):  # fused q/k/v, output, fused gate and up, down
            kernels.linear(hidden_TD, tensors, "w.weight")

    return probe.cold_s(products, 10)


def _disk(directory: Path) -> float:
    """What the reader that a replica would choose here gets from a file, past the page cache."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=directory, prefix="probe-") as file:
        chunk = os.urandom(1 << 20)
        for _ in range(FILE_BYTES >> 20):
            file.write(chunk)
        file.flush()
        os.fdatasync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        path = Path(file.name)
        engines = openers(path, default_cache_dir())
        name = choose_reader("auto", path, engines)
        return max(_read_rate(engines[name], path) for _ in range(3))


def _read_rate(open_engine: OpenEngine, path: Path) -> float:
    engine = open_engine(2)
    try:
        return measure_reader(engine, path)
    finally:
        engine.close()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--disk", type=Path, required=True)
    arguments = parser.parse_args()
    device, dtype = open_device(arguments.device, arguments.threads), torch_dtype(arguments.dtype)
    kernels = select_kernels("auto", dtype, device.type, default_cache_dir() / "kernels")
    with torch.inference_mode():
        rates = measure(Probe(device=device, dtype=dtype, kernels=kernels), arguments.disk)
    sys.stdout.write(json.dumps(rates_to_json(rates)) + "\n")


if __name__ == "__main__":
    main()
