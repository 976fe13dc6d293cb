"""The engine alone, in this process, under the same closed loop: what the cluster is compared with.

Same checkpoint, dtype, threads, scheduler limits and prompts; no Ray, no link, no gateway, no text.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from bench.load import Load, LoadResult, RequestTrace, prompts, think_times
from cluster.base.plan import ModelPlan
from cluster.dist.communicator import SingleRank
from replicas.api import GenerationRequest, SamplingParams
from replicas.engine.scheduler import Scheduler
from replicas.engine.scheduler_config import SchedulerConfig
from replicas.engine.sync_engine import SyncEngine
from replicas.worker import device as devices
from replicas.worker.assembly import RankSpec, build_runner
from replicas.worker.in_process_executor import InProcessExecutor


@dataclass(slots=True)
class _Live:
    client: int
    due_s: float
    """When its client sent it; the engine may have been in a step then."""
    first_s: float = 0.0
    num_tokens: int = 0


class BareEngine:
    """One engine built from a model plan (tensor-parallel size 1)."""

    def __init__(self, plan: ModelPlan, kernels: str = "auto") -> None:
        device = devices.open_device(plan.device, plan.num_threads)
        spec = RankSpec(
            model_path=plan.path,
            dtype=plan.dtype,
            kv_dtype=plan.kv.dtype,
            block_size=plan.kv.block_size,
            num_blocks=plan.kv.num_blocks,
            max_context=plan.scheduler.max_context,
            kernels=kernels,
        )
        runner = build_runner(spec, SingleRank(), device)
        config = SchedulerConfig(
            max_running_requests=plan.scheduler.max_running_requests,
            max_step_tokens=plan.scheduler.max_step_tokens,
            max_context=plan.scheduler.max_context,
            block_size=plan.kv.block_size,
            num_blocks=plan.kv.num_blocks,
            prefix_caching=plan.kv.prefix_caching,
        )
        self._engine = SyncEngine(Scheduler(config), InProcessExecutor(runner))
        self._runs = 0

    def run(self, load: Load) -> LoadResult:
        """The closed loop of `bench.load` without anything in between."""
        self._runs += 1
        waiting = [self._request(load, *each) for each in enumerate(prompts(load))][::-1]
        started_s = time.perf_counter()
        due_s = {client: started_s + client * load.stagger_s for client in range(load.concurrency)}
        pauses = {client: think_times(load, client) for client in due_s}
        live: dict[str, _Live] = {}
        traces: list[RequestTrace] = []
        while waiting or live:
            now_s = time.perf_counter()
            for client in [client for client, at_s in due_s.items() if at_s <= now_s]:
                if waiting:
                    coming = waiting.pop()
                    live[coming.request_id] = _Live(client, due_s.pop(client))
                    self._engine.add(coming)
            if not live:
                time.sleep(max(0.0, min(due_s.values()) - now_s))
                continue
            for request in self._step(live):
                ended_s = time.perf_counter()
                traces.append(_trace(request, ended_s))
                due_s[request.client] = ended_s + next(pauses[request.client])
        return LoadResult(wall_s=time.perf_counter() - started_s, requests=tuple(traces))

    def _step(self, live: dict[str, _Live]) -> list[_Live]:
        """Run one step; the requests that ended with it."""
        ended = []
        for delta in self._engine.step():
            request = live[delta.request_id]
            if not request.num_tokens and delta.token_ids:
                request.first_s = time.perf_counter()
            request.num_tokens += len(delta.token_ids)
            if delta.finish_reason is not None:
                ended.append(live.pop(delta.request_id))
        return ended

    def _request(self, load: Load, index: int, prompt: list[int]) -> GenerationRequest:
        return GenerationRequest(
            request_id=f"{self._runs}-{index}",
            prompt_token_ids=tuple(prompt),
            params=SamplingParams(temperature=0.0, max_tokens=load.max_tokens, ignore_eos=True),
        )


def _trace(request: _Live, now_s: float) -> RequestTrace:
    return RequestTrace(
        ttft_s=request.first_s - request.due_s,
        e2e_s=now_s - request.due_s,
        num_tokens=request.num_tokens,
    )
