"""Our engine on one device, built without a checkpoint and driven without Ray, pydantic or grpc."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from bench.gpu.shapes import SHAPES, random_weights, weight_bytes
from cluster.dist.communicator import SingleRank
from replicas.api import GenerationRequest, SamplingParams
from replicas.engine.scheduler import Scheduler
from replicas.engine.scheduler_config import SchedulerConfig
from replicas.engine.step_runner import StepRunner
from replicas.models.context import torch_dtype
from replicas.models.decoder import DecoderModel
from replicas.models.hf_config import arch_from_hf
from replicas.models.registry import build_model
from replicas.worker.decode_graphs import GraphedModel, GraphLimits
from replicas.worker.device import GraphRecorder, synchronize
from replicas.worker.in_process_executor import InProcessExecutor
from replicas.worker.kv_tensors import KvCacheSpec, allocate_kv_caches
from replicas.worker.model_runner import ModelRunner

BLOCK_SIZE = 16
_WARM_STEPS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeRun:
    """Steps of one batch size, without their prompts."""

    step_s: tuple[float, ...]
    bytes_per_step: int
    """Weights and KV that a step must read, at the middle of the run."""
    graphed: bool


class GpuEngine:
    """One model on one device; engines are made anew for each batch size, weights are kept.

    Args:
        size: a name of `SHAPES`.
        kernels: as in `build_model`.
    """

    def __init__(self, size: str, dtype: str, device: torch.device, kernels: str) -> None:
        self._dtype, self._device = dtype, device
        self.arch = arch_from_hf(dict(SHAPES[size]))
        self.model = build_model(
            self.arch,
            SingleRank(),
            dtype=dtype,
            device=device.type,
            block_size=BLOCK_SIZE,
            kernels=kernels,
        )
        self.weights = random_weights(
            self.model.units, torch_dtype(dtype), device, self.model.kernels
        )
        self.weight_bytes = weight_bytes(self.weights, self.model.units)

    def decode(self, batch: int, prompt_tokens: int, steps: int) -> DecodeRun:
        """Time `steps` decode steps of `batch` requests, all prompts computed before."""
        # Requests whose prompts come first decode while the others' are still computed.
        new_tokens = steps + 64
        context = prompt_tokens + new_tokens
        runner, engine = self._engine(batch, context)
        for index in range(batch):
            engine.scheduler.add(
                _request(index, prompt_tokens, new_tokens, self.arch.vocab_size), 0
            )
        while engine.has_prompts_left(batch):
            engine.steps.step()
        for _ in range(_WARM_STEPS):
            engine.steps.step()
            runner.settle()
        times = []
        for _ in range(steps - _WARM_STEPS):
            synchronize(self._device)
            started_s = time.perf_counter()
            engine.steps.step()
            synchronize(self._device)
            times.append(time.perf_counter() - started_s)
        cached_tokens = prompt_tokens + steps // 2
        return DecodeRun(
            step_s=tuple(times),
            bytes_per_step=self.weight_bytes + batch * cached_tokens * self._kv_bytes_per_token(),
            graphed=runner.replays_decodes,
        )

    def prefill(self, tokens: int, repeats: int) -> list[float]:
        """Times of one prompt's only step, its first token included."""
        times = []
        for repeat in range(repeats + 1):
            _, engine = self._engine(1, tokens + 8)
            engine.scheduler.add(_request(repeat, tokens, 1, self.arch.vocab_size), 0)
            synchronize(self._device)
            started_s = time.perf_counter()
            engine.steps.step()
            synchronize(self._device)
            times.append(time.perf_counter() - started_s)
        return times[1:]

    def _kv_bytes_per_token(self) -> int:
        width = self.arch.num_kv_heads * self.arch.head_dim
        return 2 * self.arch.num_layers * width * torch_dtype(self._dtype).itemsize

    def _engine(self, batch: int, context: int) -> tuple[ModelRunner, _Engine]:
        blocks = batch * (-(-context // BLOCK_SIZE)) + 1
        cache = KvCacheSpec(
            num_layers=self.arch.num_layers,
            num_blocks=blocks,
            block_size=BLOCK_SIZE,
            num_kv_heads=self.arch.num_kv_heads,
            head_dim=self.arch.head_dim,
            dtype=torch_dtype(self._dtype),
        )
        model: DecoderModel = self.model
        if not GraphedModel.why_not(model, self.weights, self._device.type):
            limits = GraphLimits(max_rows=batch, max_context=context, block_size=BLOCK_SIZE)
            model = GraphedModel(model, limits, self._device, GraphRecorder())
        runner = ModelRunner(
            model,
            self.weights,
            allocate_kv_caches(cache, self._device),
            block_size=BLOCK_SIZE,
            max_context=context,
            is_output_rank=True,
            clock=time.perf_counter,
        )
        config = SchedulerConfig(
            max_running_requests=batch,
            max_step_tokens=max(2048, batch),
            max_context=context,
            block_size=BLOCK_SIZE,
            num_blocks=blocks,
            prefix_caching=False,
        )
        return runner, _Engine(Scheduler(config, ()), runner)


class _Engine:
    """A scheduler and the steps over one runner."""

    def __init__(self, scheduler: Scheduler, runner: ModelRunner) -> None:
        self.scheduler = scheduler
        self.steps = StepRunner(scheduler, InProcessExecutor(runner), step_timeout_s=600.0)

    def has_prompts_left(self, batch: int) -> bool:
        """Whether some request has not had its first token; each step gives one to all others."""
        stats = self.scheduler.stats()
        return stats.num_running < batch or stats.num_waiting_tokens > 0


def _request(index: int, prompt_tokens: int, max_tokens: int, vocab: int) -> GenerationRequest:
    ids = (3 + (index * 7919 + place * 104729) % (vocab - 3) for place in range(prompt_tokens))
    return GenerationRequest(
        request_id=f"r{index}",
        prompt_token_ids=tuple(ids),
        params=SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True),
    )
