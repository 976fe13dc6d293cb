"""A runner of ours as the common interface of the engines: all rows decode together."""

from __future__ import annotations

import time

from bench.offload_child import Generate
from replicas.api import GenerationRequest, SamplingParams
from replicas.engine.scheduler import Scheduler
from replicas.engine.scheduler_config import SchedulerConfig
from replicas.engine.sync_engine import SyncEngine
from replicas.worker.assembly import RankSpec
from replicas.worker.in_process_executor import InProcessExecutor
from replicas.worker.model_runner import ModelRunner

MAX_STEP_TOKENS = 4096
MAX_ROWS = 256


def generator_of(runner: ModelRunner, spec: RankSpec) -> Generate:
    """Greedy batches through scheduler and runner."""
    config = SchedulerConfig(
        max_running_requests=MAX_ROWS,
        max_step_tokens=MAX_STEP_TOKENS,
        max_context=spec.max_context,
        block_size=spec.block_size,
        num_blocks=spec.num_blocks,
        prefix_caching=False,
    )
    engine = SyncEngine(Scheduler(config), InProcessExecutor(runner))
    runs = 0

    def generate(prompts: list[list[int]], new_tokens: int) -> tuple[list[float], list[list[int]]]:
        nonlocal runs
        runs += 1
        params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
        tokens: dict[str, list[int]] = {}
        for index, prompt in enumerate(prompts):
            name = f"{runs}-{index}"
            tokens[name] = []
            request = GenerationRequest(
                request_id=name, prompt_token_ids=tuple(prompt), params=params
            )
            engine.add(request)
        seconds = []
        while engine.has_unfinished:
            started_s = time.perf_counter()
            for delta in engine.step():
                tokens[delta.request_id].extend(delta.token_ids)
            seconds.append(time.perf_counter() - started_s)
        return seconds, list(tokens.values())

    return generate
