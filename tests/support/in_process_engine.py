"""The whole engine in one process: scheduler, runner and a real model from a checkpoint."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cluster.dist.communicator import SingleRank
from replicas.api import GenerationRequest
from replicas.engine.scheduler import Scheduler
from replicas.engine.scheduler_config import SchedulerConfig
from replicas.engine.sync_engine import Completion, SyncEngine
from replicas.models.checkpoint import load_weights
from replicas.models.hf_config import arch_from_hf
from replicas.models.registry import build_model
from replicas.worker.in_process_executor import InProcessExecutor
from replicas.worker.kv_tensors import KvCacheSpec, allocate_kv_caches
from replicas.worker.model_runner import ModelRunner

MAX_CONTEXT = 120


def in_process_engine(path: Path, **limits: Any) -> SyncEngine:
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
    arch = arch_from_hf(json.loads((path / "config.json").read_text()))
    model = build_model(
        arch, SingleRank(), dtype="float32", device="cpu", block_size=config.block_size
    )
    kv_spec = KvCacheSpec(
        num_layers=arch.num_layers,
        num_blocks=config.num_blocks,
        block_size=config.block_size,
        num_kv_heads=arch.num_kv_heads,
        head_dim=arch.head_dim,
        dtype=torch.float32,
    )
    runner = ModelRunner(
        model,
        load_weights(path, model.units, dtype="float32", device="cpu", kernels=model.kernels),
        allocate_kv_caches(kv_spec, torch.device("cpu")),
        block_size=config.block_size,
        max_context=config.max_context,
        is_output_rank=True,
        clock=time.monotonic,
    )
    return SyncEngine(Scheduler(config, arch.eos_token_ids), InProcessExecutor(runner))


def generate_pipelined(
    engine: SyncEngine, requests: Sequence[GenerationRequest]
) -> list[Completion]:
    """As `SyncEngine.generate`, but each step is planned before the last one has answered."""
    runner = engine._runner
    completions = {
        (request.request_id, index): Completion(request_id=request.request_id, index=index)
        for request in requests
        for index in range(request.params.n)
    }
    for request in requests:
        engine.add(request)
    while runner.num_in_flight or runner.submit():
        runner.submit()
        for delta in runner.collect():
            completions[delta.request_id, delta.index].extend(delta)
    return list(completions.values())
