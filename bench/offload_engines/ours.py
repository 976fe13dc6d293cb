"""Penstock over a ring of slots: embedding, norm and head resident, all layers streamed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from bench.offload_child import ChildTask, Generate
from bench.offload_engines.batches import generator_of
from cluster.base.env import default_cache_dir
from cluster.base.plan import OffloadPlan
from cluster.dist.communicator import SingleRank
from offload.assembly import kernel_adapter, streamed_weights
from offload.layout import Store, read_store
from offload.provider import StreamedWeights
from offload.readers.choose import choose_reader, measure, openers
from replicas.layers.weights import WeightProvider
from replicas.worker.assembly import RankSpec, WeightsFactory, WeightsRequest, build_runner

BLOCK_SIZE = 16
MIB = 2**20


@contextmanager
def opened(task: ChildTask) -> Iterator[tuple[Generate, Callable[[], dict[str, float]]]]:
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

    def facts() -> dict[str, float]:
        stats = made[0].stats
        return {"disk_bytes_per_s": _disk_rate(task), "read_bytes": float(stats.ring.num_bytes)}

    yield generate, facts


def offload_plan(task: ChildTask) -> OffloadPlan:
    """Three slots, everything that is not a layer resident."""
    return OffloadPlan(
        disk_path=task.folder,
        device_bytes=4096 * MIB,
        host_bytes=0,
        workspace_bytes=0,
        resident_units=("embed", "norm", "head"),
        precision=task.precision,
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


def _disk_rate(task: ChildTask) -> float:
    """What the reader itself gets from the store, alone, in this cgroup: the best of three."""
    store = store_of(task)
    engines = openers(store.path, default_cache_dir())
    name = choose_reader("auto", store.path, engines)
    rates = []
    for _ in range(3):
        engine = engines[name](2)
        rates.append(measure(engine, store.path))
        engine.close()
    return max(rates)
