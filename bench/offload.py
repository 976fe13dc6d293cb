"""Streaming a model twice its memory: ours against DeepSpeed, Accelerate and a mapped file.

    python -m bench.offload [--cases mapped deepspeed_zero3 ...] [--add] [--rounds 2]

A random bf16 model of 2.9 GB is served from disk by processes in one memory cgroup (needs root),
ours and the peer of a case in turn, round after round; the page cache is dropped per file before
each. Packed stores are kept beside the checkpoint. Greedy tokens are compared. Accelerate is
installed beside the bench, never into the environment. About 8 minutes; `--cases` with `--add` runs
it in parts.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from bench.memory_cgroup import MemoryCgroup
from bench.offload_child import ChildTask
from bench.offload_formats import format_rows
from bench.offload_rows import (
    BATCH,
    PEERS,
    RESIDENT_LAYERS,
    WIDE_RESIDENT_LAYERS,
    Setting,
    peer_rows,
)
from bench.offload_run import Runner, all_streaming, install_accelerate
from bench.random_checkpoint import SHAPES, RandomCheckpoint, random_checkpoint
from bench.report import Row, kept_rows, save_report, write_report
from cluster.base.env import default_cache_dir
from offload.compression import Compression
from offload.cost_model import PassLoad, pass_time
from offload.machine_rates import RatesRequest, machine_rates
from offload.model_shape import model_shape
from offload.pack_model import pack_model
from offload.precision import Precision
from offload.rates import GemmPoint
from offload.stored_share import sampled_share
from replicas.models.hf_config import arch_from_hf

DEEP = {**SHAPES["dense-1b"], "vocab_size": 8192, "num_hidden_layers": 28}
"""2.9 GB; little of it is vocabulary, so that nearly all streams."""
PROMPT_TOKENS = 16
NEW_TOKENS = 5
BATCHES = (1, BATCH, 64)
CASES = (*PEERS, *Precision)
Stores = dict[tuple[Precision, Compression], Path]
"""Folders with one store each."""


def main() -> None:
    """Run the benchmark and write its report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--add", action="store_true", help="keep other cases of the result file")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit-mb", type=int, default=1400)
    arguments = parser.parse_args()
    rows = kept_rows("offload") if arguments.add else []
    notes: list[str] = []
    for case, new in _measured(arguments, notes):
        rows = [row for row in rows if not row.case.startswith(f"{case}:")] + new
        rows.sort(key=lambda row: CASES.index(row.case.partition(":")[0]))
        save_report("offload", rows, notes=notes)
        print(f"{case} is done", flush=True)
    write_report("offload", rows, notes=notes)


def _measured(arguments: argparse.Namespace, notes: list[str]) -> Iterator[tuple[str, list[Row]]]:
    """The rows of each case; `notes` are filled in on the way."""
    models = default_cache_dir() / "bench-models"
    checkpoint = random_checkpoint("dense-deep", models, config=DEEP)
    stores = pack_all(checkpoint, models / "stores" / checkpoint.path.name)
    limit = arguments.limit_mb * 10**6
    setting = setting_of(arguments.threads, checkpoint.path, stores, limit)
    notes += _notes(arguments, setting)
    with MemoryCgroup("penstock-bench-offload", limit) as cgroup:
        runner = Runner(
            task=task_of(checkpoint, arguments.threads),
            cgroup=cgroup,
            stores=stores,
            compression=setting.compression,
            accelerate=install_accelerate(default_cache_dir()),
            limit_bytes=limit,
        )
        for case in arguments.cases:
            if case in PEERS:
                yield case, peer_rows(runner, case, arguments.rounds, setting)
            else:
                precision = Precision(case)
                yield case, format_rows(runner, precision, BATCHES, arguments.rounds, setting)
            print("\n".join(runner.notes), flush=True)


def setting_of(threads: int, checkpoint: Path, stores: Stores, limit_bytes: int) -> Setting:
    """Shape of the model, speeds of the machine, and what `compression: auto` is then."""
    disk = stores[Precision.NATIVE, Compression.NONE]
    request = RatesRequest(device="cpu", num_threads=threads, dtype="bfloat16", disk=disk)
    rates = replace(machine_rates(request, default_cache_dir()), device_is_host=True)
    files = [path.name for path in sorted(checkpoint.glob("*.safetensors"))]
    shape = replace(
        model_shape(arch_from_hf(DEEP), 1, "bfloat16"),
        stored_share=sampled_share(checkpoint, files),
    )
    load = PassLoad(rows=BATCH, context_tokens=PROMPT_TOKENS + NEW_TOKENS // 2)

    def pass_s(compression: Compression) -> float:
        placement = replace(all_streaming(Precision.NATIVE, compression), ring_slots=4)
        return pass_time(shape, placement, rates, load).total_s

    return Setting(
        shape=shape,
        rates=rates,
        limit_bytes=limit_bytes,
        context_tokens=load.context_tokens,
        compression=min(Compression, key=pass_s),
    )


def task_of(checkpoint: RandomCheckpoint, threads: int) -> ChildTask:
    """What every child is asked but for its engine."""
    return ChildTask(
        engine="",
        checkpoint=str(checkpoint.path),
        folder="",
        cgroup_procs="",
        batches=(BATCH,),
        prompt_tokens=PROMPT_TOKENS,
        new_tokens=NEW_TOKENS,
        threads=threads,
        vocab_size=checkpoint.vocab_size,
    )


def pack_all(checkpoint: RandomCheckpoint, folder: Path) -> Stores:
    """A folder with the store of each format, packed where it is not there yet."""
    stores = {(precision, Compression.NONE): folder / precision.value for precision in Precision}
    stores[Precision.NATIVE, Compression.LOSSLESS] = folder / Compression.LOSSLESS.value
    for (precision, compression), store in stores.items():
        print(f"{store.name} store ...", flush=True)
        current = pack_model(
            str(checkpoint.path),
            dtype="bfloat16",
            precision=precision.value,
            compression=compression.value,
            disk_path=str(store),
        )
        # What an earlier version of the format left is of no use to anybody.
        for path in store.glob("*.weights"):
            if path != current.path:
                path.unlink()
    return stores


def _notes(arguments: argparse.Namespace, setting: Setting) -> list[str]:
    weights = setting.shape.layer_bytes(Precision.NATIVE) + setting.shape.fixed_bytes
    rates = setting.rates
    return [
        f"bf16, {arguments.threads} compute threads, {PROMPT_TOKENS} + {NEW_TOKENS} tokens, memory "
        f"limit {arguments.limit_mb} MB where a row says nothing else, "
        f"{weights / setting.limit_bytes:.2f} times that of weights; rates: all rows decoding",
        f"against peers ours keeps {_kept(setting, RESIDENT_LAYERS)}, elsewhere nothing of layers; "
        f"under 2600 MB {_kept(setting, WIDE_RESIDENT_LAYERS)}",
        "its reader alone: the same reader over the whole store, the same requests in flight, "
        "before and after each batch in the same process; a batch between which it changed by more "
        "than 5 % is run again, at most twice",
        f"machine rates: memory {rates.memory_bytes_per_s / 1e9:.1f} GB/s; weights multiplied with "
        f"one row, native {_per_s(rates.gemm)}, int8 {_per_s(rates.int8_gemm)}, int4 "
        f"{_per_s(rates.int4_gemm)} G/s; predictions take the disk as fast as it was in the run",
        f"ours streams native records with compression {setting.compression.value} (what auto is "
        f"here: {setting.shape.stored_share:.1%} of the bytes by a sample, decoded at "
        f"{rates.decode_bytes_per_s / 1e9:.1f} GB/s of weights by one core)",
        f"load average {os.getloadavg()[0]:.1f} at the start of the last part",
    ]


def _kept(setting: Setting, layers: int) -> str:
    use = setting.keeping(layers)
    kept = []
    if use.resident_layers:
        kept.append(f"{use.resident_layers} of 28 layers")
    if use.held_bytes:
        kept.append(f"{use.held_bytes / 1e6:.0f} MB of the streamed layers' records")
    return f"{' and '.join(kept) or 'no layer'} in memory beside {use.ring_slots} slots"


def _per_s(points: Sequence[GemmPoint]) -> str:
    return f"{1e-9 / points[0].seconds_per_weight:.1f}"


if __name__ == "__main__":
    main()
