"""One in-process engine on a checkpoint, timed by phase: prefill, decode, and the step's ledger."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from cluster.dist.communicator import SingleRank
from replicas.api import GenerationRequest, SamplingParams
from replicas.engine.scheduler import Scheduler
from replicas.engine.scheduler_config import SchedulerConfig
from replicas.engine.scheduler_output import StepOutput
from replicas.engine.sync_engine import SyncEngine
from replicas.models.llama import LlamaModel
from replicas.worker.assembly import RankSpec, build_runner
from replicas.worker.in_process_executor import InProcessExecutor
from replicas.worker.model_runner import ModelRunner

BLOCK_SIZE = 16
NUM_BLOCKS = 1024
MAX_STEP_TOKENS = 4096
MAX_CONTEXT = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class OfflineRun:
    """What one batch took."""

    prefill_s: float
    """From the first step to the step that gave the last request its first token."""
    decode_s: float
    num_steps: int
    """Steps of the decode phase."""
    ledger_s: dict[str, float]
    """Seconds of the decode phase by part of a step; `forward` without the parts named apart."""


class TimedExecutor(InProcessExecutor):
    """Adds up what the runner says about its steps."""

    def __init__(self, runner: ModelRunner) -> None:
        super().__init__(runner)
        self.seconds: dict[str, float] = {}

    def collect(self, timeout_s: float) -> StepOutput:
        """See `InProcessExecutor.collect`."""
        output = super().collect(timeout_s)
        for part, seconds in output.timings_s.items():
            self.seconds[part] = self.seconds.get(part, 0.0) + seconds
        return output


class OfflineEngine:
    """A bf16 engine over a checkpoint directory."""

    def __init__(self, path: Path, *, kernels: str) -> None:
        spec = RankSpec(
            model_path=str(path),
            dtype="bfloat16",
            kv_dtype="bfloat16",
            block_size=BLOCK_SIZE,
            num_blocks=NUM_BLOCKS,
            max_context=MAX_CONTEXT,
            kernels=kernels,
        )
        runner = build_runner(spec, SingleRank(), torch.device("cpu"))
        self.kernels = runner.model.kernels.name
        self._model = runner.model
        self._vocab_size = runner.model.arch.vocab_size
        self._runs = 0
        config = SchedulerConfig(
            max_running_requests=64,
            max_step_tokens=MAX_STEP_TOKENS,
            max_context=MAX_CONTEXT,
            block_size=BLOCK_SIZE,
            num_blocks=NUM_BLOCKS,
            prefix_caching=False,
        )
        self._executor = TimedExecutor(runner)
        self._engine = SyncEngine(Scheduler(config), self._executor)

    def run(self, num_requests: int, prompt_tokens: int, new_tokens: int) -> OfflineRun:
        """One batch of random prompts, greedy, end-of-sequence ignored."""
        self._runs += 1
        generator = torch.Generator().manual_seed(self._runs)
        waiting = set()
        for index in range(num_requests):
            waiting.add(f"{self._runs}-{index}")
            prompt = torch.randint(self._vocab_size, (prompt_tokens,), generator=generator)
            self._engine.add(
                GenerationRequest(
                    request_id=f"{self._runs}-{index}",
                    prompt_token_ids=tuple(prompt.tolist()),
                    params=SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True),
                )
            )
        started_s = time.perf_counter()
        while waiting:
            waiting -= {delta.request_id for delta in self._engine.step() if delta.token_ids}
        filled_s = time.perf_counter()
        before, parts, layers = self._engine.times, dict(self._executor.seconds), self._layers()
        while self._engine.has_unfinished:
            self._engine.step()
        ended_s = time.perf_counter()
        after = self._engine.times
        ledger: dict[str, float] = {
            name: self._executor.seconds[name] - parts[name] for name in parts
        }
        for name, seconds in self._layers().items():
            ledger[name] = seconds - layers[name]
            ledger["forward"] -= ledger[name]
        ledger["schedule"] = after.schedule_s - before.schedule_s
        ledger["update"] = after.update_s - before.update_s
        ledger["other"] = (ended_s - filled_s) - sum(ledger.values())
        return OfflineRun(
            prefill_s=filled_s - started_s,
            decode_s=ended_s - filled_s,
            num_steps=after.num_steps - before.num_steps,
            ledger_s=ledger,
        )

    def _layers(self) -> dict[str, float]:
        """Seconds so far by part of the layers, where the model counts them."""
        return dict(self._model.layer_seconds) if isinstance(self._model, LlamaModel) else {}
