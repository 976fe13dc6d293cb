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
from replicas.engine.scheduler_output import SchedulerOutput, StepOutput
from replicas.engine.step_runner import StepRunner
from replicas.models.context import torch_dtype
from replicas.models.decoder import DecoderModel
from replicas.models.hf_config import arch_from_hf
from replicas.models.registry import build_model
from replicas.worker.decode_graphs import GraphedModel, GraphLimits
from replicas.worker.device import GraphRecorder, async_device, host_waits_refused, synchronize
from replicas.worker.in_process_executor import InProcessExecutor
from replicas.worker.kv_tensors import KvCacheSpec, allocate_kv_caches
from replicas.worker.model_runner import ModelRunner

BLOCK_SIZE = 16
_WARM_STEPS = 4
_STEP_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeRun:
    """Steps of one batch size, without their prompts."""

    step_s: tuple[float, ...]
    """From one answer to the next."""
    launch_s: tuple[float, ...]
    """Planning and launching, which the device does not wait for."""
    bytes_per_step: int
    """Weights and KV that a step must read, at the middle of the run."""
    graphed: bool


class GpuEngine:
    """One model on one device; engines are made anew for each batch size, weights are kept.

    Args:
        size: a name of `SHAPES`.
        kernels: as in `build_model`.
    """

    def __init__(
        self,
        size: str,
        dtype: str,
        device: torch.device,
        kernels: str,
        attention_backend: str = "auto",
    ) -> None:
        self._dtype, self._device = dtype, device
        self.arch = arch_from_hf(dict(SHAPES[size]))
        self.model = build_model(
            self.arch,
            SingleRank(),
            dtype=dtype,
            device=device.type,
            block_size=BLOCK_SIZE,
            kernels=kernels,
            attention_backend=attention_backend,
        )
        self.weights = random_weights(
            self.model.units, torch_dtype(dtype), device, self.model.kernels
        )
        self.weight_bytes = weight_bytes(self.weights, self.model.units)

    def decode(self, batch: int, prompt_tokens: int, steps: int) -> DecodeRun:
        """Time `steps` decode steps of `batch` requests, two in flight, all prompts done before."""
        # Requests whose prompts come first decode while the others' are still computed.
        driver = _Driver(self, batch, prompt_tokens, steps + 64)
        driver.finish_prompts()
        step_s, launch_s = [], []
        driver.steps.submit()
        synchronize(self._device)
        at_s = time.perf_counter()
        for _ in range(steps):
            driver.steps.submit()
            launched_s = time.perf_counter()
            driver.steps.collect()
            now_s = time.perf_counter()
            step_s.append(now_s - at_s)
            launch_s.append(launched_s - at_s)
            at_s = now_s
        driver.steps.collect()
        cached_tokens = prompt_tokens + _WARM_STEPS + steps // 2
        kv_bytes = batch * cached_tokens * self._kv_bytes_per_token()
        return DecodeRun(
            # The first was launched before the clock started.
            step_s=tuple(step_s[1:]),
            launch_s=tuple(launch_s[1:]),
            bytes_per_step=self.weight_bytes + kv_bytes,
            graphed=driver.runner.replays_decodes,
        )

    def decode_without_waiting(self, batch: int, steps: int = 8) -> int:
        """Launch steps, each on top of the last, where waiting for the device is an error.

        Raises:
            RuntimeError: something waits; torch says what.
        """
        driver = _Driver(self, batch, prompt_tokens=32, new_tokens=96)
        driver.finish_prompts()
        driver.steps.submit()
        for _ in range(steps):
            with host_waits_refused(self._device):
                driver.steps.submit()
            driver.steps.collect()
        driver.steps.collect()
        return steps

    def tokens(self, batch: int, prompt_tokens: int, new_tokens: int) -> list[list[int]]:
        """What greedy requests get, two steps in flight; graphs are captured on the way."""
        driver = _Driver(self, batch, prompt_tokens, new_tokens)
        return driver.run()

    def prefill(self, tokens: int, repeats: int) -> list[float]:
        """Times of one prompt's only step, its first token included."""
        times = []
        for _ in range(repeats + 1):
            driver = _Driver(self, 1, tokens, 1)
            synchronize(self._device)
            started_s = time.perf_counter()
            driver.steps.step()
            times.append(time.perf_counter() - started_s)
        return times[1:]

    def _kv_bytes_per_token(self) -> int:
        width = self.arch.num_kv_heads * self.arch.head_dim
        return 2 * self.arch.num_layers * width * torch_dtype(self._dtype).itemsize

    def runner(self, batch: int, context: int, blocks: int) -> ModelRunner:
        """A runner with room for so many requests, and none yet."""
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
        return ModelRunner(
            model,
            self.weights,
            allocate_kv_caches(cache, self._device),
            block_size=BLOCK_SIZE,
            max_context=context,
            is_output_rank=True,
            clock=time.perf_counter,
            device=async_device(self._device),
        )


class _Driver:
    """Scheduler, steps and runner with `batch` greedy requests."""

    def __init__(self, engine: GpuEngine, batch: int, prompt_tokens: int, new_tokens: int) -> None:
        context = prompt_tokens + new_tokens
        blocks = batch * (-(-context // BLOCK_SIZE)) + 1
        self.runner = engine.runner(batch, context, blocks)
        config = SchedulerConfig(
            max_running_requests=batch,
            max_step_tokens=max(2048, batch),
            max_context=context,
            block_size=BLOCK_SIZE,
            num_blocks=blocks,
            prefix_caching=False,
        )
        self.scheduler = Scheduler(config, ())
        self.steps: StepRunner[SchedulerOutput, StepOutput] = StepRunner(
            self.scheduler, InProcessExecutor(self.runner), step_timeout_s=_STEP_TIMEOUT_S
        )
        self._batch = batch
        vocab = engine.arch.vocab_size
        for index in range(batch):
            self.scheduler.add(_request(index, prompt_tokens, new_tokens, vocab), 0)

    def finish_prompts(self) -> None:
        """Until every request decodes and the steps of this size are captured."""
        while (stats := self.scheduler.stats()).num_running < self._batch or (
            stats.num_waiting_tokens > 0
        ):
            self.steps.step()
        for _ in range(_WARM_STEPS):
            self.steps.step()
            self.runner.settle()

    def run(self) -> list[list[int]]:
        """All requests to their end."""
        tokens: dict[str, list[int]] = {f"r{index}": [] for index in range(self._batch)}
        while self.steps.submit() or self.steps.num_in_flight:
            if not self.runner.wants_to_settle:
                self.steps.submit()
            while self.steps.num_in_flight:
                for delta in self.steps.collect():
                    tokens[delta.request_id].extend(delta.token_ids)
            self.runner.settle()
        return list(tokens.values())


def _request(index: int, prompt_tokens: int, max_tokens: int, vocab: int) -> GenerationRequest:
    ids = (3 + (index * 7919 + place * 104729) % (vocab - 3) for place in range(prompt_tokens))
    return GenerationRequest(
        request_id=f"r{index}",
        prompt_token_ids=tuple(ids),
        params=SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True),
    )
