"""Measures what the cost model needs of a machine, in a few seconds. Run as a process of its own:

    python -m offload.probe --device cpu --threads 2 --dtype bfloat16 --disk DIR

prints the rates as one line of JSON. A process, because it sets threads, takes memory and may be
killed when the disk hangs; `offload/machine_rates.py` starts it with a deadline and keeps what it
says.
Each rate is the best of a few tries: what the machine can do undisturbed. The process has as many
threads as the replica will.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from cluster.base.env import default_cache_dir
from offload.machine_rates import rates_to_json
from offload.precision import Precision
from offload.probe_clock import Probe
from offload.probe_decoding import measure_decoding
from offload.probe_disk import measure_disk
from offload.probe_parts import measure_parts
from offload.probe_products import (
    host_flops_per_s,
    layer_work,
    measure_products,
    probe_weights,
)
from offload.probe_rows import measure_rows, one_row_of
from offload.rates import Rates
from replicas.kernels.select import select_kernels
from replicas.models.context import torch_dtype
from replicas.worker.device import open_device

COPY_BYTES = 64 << 20
READ_BYTES = 256 << 20
TINY = 64


def measure(probe: Probe, disk: Path) -> Rates:
    """All rates.

    Raises:
        OSError: the directory cannot be written or read.
    """
    weights = probe_weights(probe.dtype)
    points = measure_products(probe, weights)
    is_host = probe.device.type == "cpu"
    disk_rates = measure_disk(disk, layer_work(probe, weights) if is_host else None)
    decoding = measure_decoding(torch.get_num_threads())
    rows = measure_rows(probe.kernels, probe.device, probe.dtype, probe.cold_s)
    products, one_row = _calls(probe), one_row_of(probe.kernels, probe.device, probe.dtype)
    parts = measure_parts(probe, lambda: (products(), one_row()))
    return Rates(
        disk_bytes_per_s=disk_rates.bytes_per_s,
        compute_lost_to_reads=disk_rates.compute_lost,
        link_bytes_per_s=_link(probe),
        memory_bytes_per_s=_memory(probe, probe.device),
        gemm=points[Precision.NATIVE],
        int8_gemm=points[Precision.INT8],
        int4_gemm=points[Precision.INT4],
        host_memory_bytes_per_s=_memory(probe, torch.device("cpu")),
        host_flops_per_s=host_flops_per_s(probe, weights),
        layer_overhead_s=probe.cold_s(products, 10) + rows.layer_s,
        part_overhead_s=parts.layer_s,
        kv_window_s=parts.window_s,
        kv_copy_bytes_per_s=parts.copy_bytes_per_s,
        row_value_s=rows.value_s,
        attention_bytes_per_s=rows.attention_bytes_per_s,
        decode_bytes_per_s=decoding.decode_bytes_per_s,
        decode_slowdown=decoding.decode_slowdown,
    )


def _link(probe: Probe) -> float:
    """Host memory -> device; on the CPU a copy in memory."""
    on_host = torch.ones(COPY_BYTES, dtype=torch.uint8)
    source = on_host.pin_memory() if probe.device.type == "cuda" else on_host
    target = torch.empty(COPY_BYTES, dtype=torch.uint8, device=probe.device)
    return COPY_BYTES / probe.best_s(lambda: target.copy_(source, non_blocking=True))


def _memory(probe: Probe, device: torch.device) -> float:
    data = torch.ones(READ_BYTES // 4, device=device)
    return READ_BYTES / probe.best_s(data.sum)


def _calls(probe: Probe) -> Callable[[], object]:
    """A layer's products with matrices that are next to nothing: what remains is calls."""
    kernels = probe.kernels
    tiny = torch.ones((TINY, TINY), dtype=probe.dtype)
    tensors = probe.on_device(kernels.pack("w.weight", tiny))
    hidden_TD = torch.ones((1, TINY), dtype=probe.dtype, device=probe.device)

    def products() -> None:
        for _ in range(4):  # fused q/k/v, output, fused gate and up, down
            kernels.linear(hidden_TD, tensors, "w.weight")

    return products


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
