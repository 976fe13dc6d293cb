"""Whole engines over models that transformers computes under ZeRO-3."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from cluster.base.zero3_plan import ForeignModel, KvLayer, Zero3Plan
from cluster.dist.communicator import SingleRank
from offload.zero3.assembly import zero3_runner
from offload.zero3.inspect import inspect
from replicas.engine.scheduler import Scheduler
from replicas.engine.scheduler_config import SchedulerConfig
from replicas.engine.sync_engine import SyncEngine
from replicas.worker.assembly import RankSpec
from replicas.worker.in_process_executor import InProcessExecutor
from replicas.worker.model_runner import ModelRunner

MAX_CONTEXT = 120
FOREIGN = ForeignModel(
    architecture="PhiForCausalLM",
    vocab_size=51200,
    model_dim=2048,
    num_heads=32,
    max_position=2048,
    dtype="bfloat16",
    num_values=1_418_270_720,
    largest_values=104_857_600,
    layer_values=50_354_176,
    tensors_per_module=2,
    materialises_scores=False,
    kv=(KvLayer(num_heads=32, key_dim=64, value_dim=64),) * 24,
)
"""Phi-1.5's own figures."""


def zero3_plan(path: Path, disk: Path, **changes: Any) -> Zero3Plan:
    """Weights in memory unless said otherwise, batches of a few rows."""
    model = inspect(path)
    fields = {
        "model": model,
        "tier": "memory",
        "disk_path": str(disk),
        "window_values": model.layer_values,
        "num_buffers": 2 * model.tensors_per_module + 2,
        "max_query_columns": 48,
        "max_context_columns": 400,
    }
    return Zero3Plan(**(fields | changes))


def make_zero3_runner(path: Path, plan: Zero3Plan, num_blocks: int = 128) -> ModelRunner:
    """A rank in fp32 on one thread: these models are too small for more."""
    torch.set_num_threads(1)
    spec = RankSpec(
        model_path=str(path),
        dtype="float32",
        kv_dtype="float32",
        block_size=4,
        num_blocks=num_blocks,
        max_context=MAX_CONTEXT,
    )
    return zero3_runner(plan)(spec, SingleRank(), torch.device("cpu"), None)


def engine_over(runner: ModelRunner, num_blocks: int = 128, **limits: Any) -> SyncEngine:
    """A fresh engine over a rank's model, without the rows of the one before.

    `limits` are fields of `SchedulerConfig`.
    """
    config = SchedulerConfig(
        **{
            "max_running_requests": 8,
            "max_step_tokens": 48,
            "max_context": MAX_CONTEXT,
            "block_size": 4,
            "num_blocks": num_blocks,
            **limits,
        }
    )
    fresh = ModelRunner(
        runner.model,
        runner.weights,
        runner._kv_caches,
        block_size=config.block_size,
        max_context=config.max_context,
        is_output_rank=True,
        clock=time.perf_counter,
    )
    return SyncEngine(Scheduler(config, ()), InProcessExecutor(fresh))
