"""An engine per rank of a group, all with the same scheduler state: no leader, no link.

Every rank plans for itself; as schedulers are pure and rank 0's answers go to all, plans are equal.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path

import torch

from cluster.dist.communicator import Communicator
from replicas.api import GenerationRequest, SamplingParams
from replicas.engine.scheduler import Scheduler
from replicas.engine.scheduler_config import SchedulerConfig
from replicas.engine.scheduler_output import SchedulerOutput, StepOutput
from replicas.engine.speculation import SpeculationConfig
from replicas.engine.sync_engine import SyncEngine
from replicas.worker import wire
from replicas.worker.assembly import RankSpec, build_runner
from replicas.worker.model_runner import ModelRunner
from tests.support.tiny_models import prompt_tokens

SPECULATION = SpeculationConfig(num_tokens=6, min_ngram=1, max_ngram=3)
CONFIG = SchedulerConfig(
    max_running_requests=8,
    max_step_tokens=24,
    max_context=120,
    block_size=4,
    num_blocks=64,
    speculation=SPECULATION,
)


class SharedExecutor:
    """Implements `Executor`: this rank's part of each step, and rank 0's answer."""

    def __init__(self, runner: ModelRunner, communicator: Communicator) -> None:
        self._runner = runner
        self._communicator = communicator
        self._plans: deque[SchedulerOutput] = deque()

    def submit(self, plan: SchedulerOutput) -> None:
        self._plans.append(plan)

    def poll(self, timeout_s: float) -> bool:
        return True

    def collect(self, timeout_s: float) -> StepOutput:
        payload = wire.encode(self._runner.execute(self._plans.popleft()))
        size = self._communicator.broadcast(torch.tensor([len(payload)]))
        data = torch.zeros(int(size), dtype=torch.uint8)
        if self._communicator.rank == 0:
            data[:] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        return wire.decode_result(self._communicator.broadcast(data).numpy().tobytes())

    def close(self) -> None:
        pass


def shared_engine(
    path: Path, communicator: Communicator, config: SchedulerConfig = CONFIG
) -> SyncEngine:
    """This rank's engine over a checkpoint."""
    spec = RankSpec(
        model_path=str(path),
        dtype="float32",
        kv_dtype="float32",
        block_size=config.block_size,
        num_blocks=config.num_blocks,
        max_context=config.max_context,
    )
    runner = build_runner(spec, communicator, torch.device("cpu"))
    return SyncEngine(Scheduler(config), SharedExecutor(runner, communicator))


def copying_requests() -> list[GenerationRequest]:
    """Greedy, random and penalised requests that have few words to choose from."""
    few = tuple((token, 30.0) for token in range(20, 26))
    shared = {"logit_bias": few, "max_tokens": 40, "logprobs": 1}
    params = (
        SamplingParams(temperature=0.0, **shared),
        SamplingParams(temperature=0.7, top_p=0.9, seed=3, n=2, **shared),
        SamplingParams(temperature=0.6, seed=11, frequency_penalty=0.05, **shared),
    )
    return [
        GenerationRequest(
            request_id=f"r{index}",
            prompt_token_ids=tuple(prompt_tokens(9 + index, seed=index) * 2),
            params=each,
        )
        for index, each in enumerate(params)
    ]
