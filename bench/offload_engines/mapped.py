"""The same engine over the same store, mapped: the kernel decides what stays in memory."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from bench.offload_child import ChildTask, Engine
from bench.offload_engines.ours import engine_of, offload_plan, store_of
from offload.layout import PackedTensor
from replicas.layers.weights import ResidentWeights, WeightProvider
from replicas.worker.assembly import WeightsRequest


@contextmanager
def opened(task: ChildTask) -> Iterator[Engine]:
    """The engine, ready."""
    torch.set_num_threads(task.threads)
    generate = engine_of(task, offload_plan(task), lambda request: _mapped(task, request))
    yield Engine(generate=generate)


def _mapped(task: ChildTask, request: WeightsRequest) -> WeightProvider:
    store = store_of(task)
    with store.path.open("rb") as file:
        # Private: torch wants writable memory, and nobody writes.
        view = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE)
    whole = torch.frombuffer(view, dtype=torch.uint8)
    return ResidentWeights(
        {
            unit.name: {
                tensor.name: _tensor(whole[store.records[unit.record].offset :], tensor)
                for tensor in unit.tensors
            }
            for unit in store.units
        }
    )


def _tensor(record: torch.Tensor, entry: PackedTensor) -> torch.Tensor:
    dtype: torch.dtype = getattr(torch, entry.dtype)
    if entry.offset < 0:
        return torch.empty(entry.shape, dtype=dtype, device="meta")
    flat = record[entry.offset : entry.offset + entry.num_bytes]
    return flat.view(dtype).view(entry.shape)
