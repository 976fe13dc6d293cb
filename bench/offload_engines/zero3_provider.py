"""Penstock's engine over its provider `deepspeed-zero3`: transformers' code, weights on disk.

Planned as the planner does it for an architecture that the engine has no code for, though it has
some for this one: so that both providers can be seen with one model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from bench.offload_child import ChildTask, Engine
from bench.offload_engines.batches import MAX_STEP_TOKENS, generator_of
from cluster.base.env import default_cache_dir
from cluster.base.zero3_plan import Zero3Plan
from cluster.dist.communicator import SingleRank
from cluster.planner.zero3 import num_buffers
from offload.zero3.assembly import zero3_runner
from offload.zero3.foreign_model import inspect_checkpoint
from replicas.worker.assembly import RankSpec

BLOCK_SIZE = 16


@contextmanager
def opened(task: ChildTask) -> Iterator[Engine]:
    """The engine, ready; ZeRO-3 writes its own copy of the weights first."""
    torch.set_num_threads(task.threads)
    model = inspect_checkpoint(Path(task.checkpoint), default_cache_dir())
    blocks = -(-(task.prompt_tokens + task.new_tokens) // BLOCK_SIZE)
    plan = Zero3Plan(
        model=model,
        tier="disk",
        disk_path=task.folder,
        window_values=model.layer_values,
        num_buffers=num_buffers(model),
        max_query_columns=MAX_STEP_TOKENS,
        max_context_columns=max(task.batches) * blocks * BLOCK_SIZE,
    )
    spec = RankSpec(
        model_path=task.checkpoint,
        dtype="bfloat16",
        kv_dtype="bfloat16",
        block_size=BLOCK_SIZE,
        num_blocks=max(task.batches) * blocks + 1,
        max_context=blocks * BLOCK_SIZE,
    )
    runner = zero3_runner(plan)(spec, SingleRank(), torch.device("cpu"), None)
    yield Engine(generate=generator_of(runner, spec))
