"""The whole engine in one process: scheduler, runner and a real model from a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cluster.dist.communicator import SingleRank
from replicas.api import GenerationRequest
from replicas.engine.scheduler import Scheduler
from replicas.engine.scheduler_config import SchedulerConfig
from replicas.engine.sync_engine import Completion, SyncEngine
from replicas.worker.assembly import (
    ModelAdapter,
    RankSpec,
    WeightsFactory,
    build_runner,
    resident_weights,
)
from replicas.worker.in_process_executor import InProcessExecutor

MAX_CONTEXT = 120


def in_process_engine(
    path: Path,
    weights_factory: WeightsFactory = resident_weights,
    *,
    dtype: str = "float32",
    kernels: str = "auto",
    attention: str = "auto",
    adapt_model: ModelAdapter | None = None,
    **limits: Any,
) -> SyncEngine:
    """An engine over a checkpoint directory; `limits` are fields of `SchedulerConfig`."""
    config = SchedulerConfig(
        **{
            "max_running_requests": 8,
            "max_step_tokens": 64,
            "max_context": MAX_CONTEXT,
            "block_size": 4,
            "num_blocks": 128,
            **limits,
        }
    )
    spec = RankSpec(
        model_path=str(path),
        dtype=dtype,
        kv_dtype=dtype,
        block_size=config.block_size,
        num_blocks=config.num_blocks,
        max_context=config.max_context,
        kernels=kernels,
        attention_backend=attention,
    )
    device = torch.device("cpu")
    runner = build_runner(
        spec, SingleRank(), device, weights_factory=weights_factory, adapt_model=adapt_model
    )
    eos_token_ids = runner.model.arch.eos_token_ids
    return SyncEngine(Scheduler(config, eos_token_ids), InProcessExecutor(runner))


def generate_pipelined(
    engine: SyncEngine, requests: Sequence[GenerationRequest]
) -> list[Completion]:
    """As `SyncEngine.generate`, but each step is planned before the last one has answered."""
    runner = engine._runner
    completions = {
        (request.request_id, choice.index): Completion(
            request_id=request.request_id, index=choice.index
        )
        for request in requests
        for choice in request.choices
    }
    for request in requests:
        engine.add(request)
    while runner.num_in_flight or runner.submit():
        runner.submit()
        for delta in runner.collect():
            completions[delta.request_id, delta.index].extend(delta)
    return list(completions.values())
