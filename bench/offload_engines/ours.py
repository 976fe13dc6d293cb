"""Penstock over a ring of slots: embedding, norm and head resident, all layers streamed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from bench.offload_child import ChildTask, Engine, Generate
from bench.offload_engines.batches import generator_of
from bench.offload_engines.roofline import disk_bytes_per_s
from cluster.base.plan import OffloadPlan
from cluster.dist.communicator import SingleRank
from offload.assembly import kernel_adapter, streamed_weights
from offload.layout import Store, read_store
from offload.provider import StreamedWeights
from replicas.layers.weights import WeightProvider
from replicas.worker.assembly import RankSpec, WeightsFactory, WeightsRequest, build_runner

BLOCK_SIZE = 16
MIB = 2**20


@contextmanager
def opened(task: ChildTask) -> Iterator[Engine]:
    """The engine, ready; the store has been packed before."""
    torch.set_num_threads(task.threads)
    made: list[StreamedWeights] = []
    plan = offload_plan(task)

    def factory(request: WeightsRequest) -> WeightProvider:
        weights = streamed_weights(plan)(request)
        assert isinstance(weights, StreamedWeights)
        made.append(weights)
        return weights

    generate = engine_of(task, plan, factory)
    store = store_of(task)
    yield Engine(
        generate=generate,
        disk_bytes_per_s=lambda: disk_bytes_per_s(store, made[0].stats.reader),
    )


def offload_plan(task: ChildTask) -> OffloadPlan:
    """As the task says; what is not a layer is resident."""
    kept = (f"layer.{index}" for index in range(task.resident_layers))
    return OffloadPlan(
        disk_path=task.folder,
        device_bytes=4096 * MIB,
        host_bytes=0,
        workspace_bytes=0,
        resident_units=("embed", *kept, "norm", "head"),
        held_bytes=task.held_bytes,
        ring_slots=task.ring_slots,
        prefetch_depth=task.ring_slots,
        precision=task.precision,
        compression=task.compression,
    )


def engine_of(task: ChildTask, plan: OffloadPlan, factory: WeightsFactory) -> Generate:
    """The runner behind the common interface, with a cache for the largest batch."""
    blocks = -(-(task.prompt_tokens + task.new_tokens) // BLOCK_SIZE)
    spec = RankSpec(
        model_path=task.checkpoint,
        dtype="bfloat16",
        kv_dtype="bfloat16",
        block_size=BLOCK_SIZE,
        num_blocks=max(task.batches) * blocks + 1,
        max_context=blocks * BLOCK_SIZE,
    )
    runner = build_runner(
        spec,
        SingleRank(),
        torch.device("cpu"),
        weights_factory=factory,
        adapt_kernels=kernel_adapter(plan),
    )
    return generator_of(runner, spec)


def store_of(task: ChildTask) -> Store:
    """The store of the task's format: the only one in its folder."""
    (path,) = Path(task.folder).glob("*.weights")
    return read_store(path)
