"""The ranks of an expert-parallel replica as real processes, with the leader's side in this one."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from cluster.base.plan import (
    EngineKind,
    ExpertPlan,
    KvPlan,
    MemoryPlan,
    ModelPlan,
    OffloadPlan,
    SchedulerPlan,
)
from cluster.dist.rendezvous import pick_port
from moe.expert_table import ExpertTable, starting_tables
from offload.actor import OffloadWorkerActor
from replicas.engine.lockstep_scheduler import LockstepScheduler
from replicas.engine.sync_engine import SyncEngine
from replicas.leader.engine_parts import scheduler_config, scheme_chooser
from replicas.leader.expert_balancer import ExpertBalancer
from replicas.leader.worker_plans import Meetings, worker_plan
from replicas.models.hf_config import arch_from_hf
from replicas.worker.expert_state import ExpertState
from replicas.worker.link_listener import LinkListener
from replicas.worker.lockstep_executor import LockstepExecutor
from replicas.worker.plan import WorkerPlan
from replicas.worker.worker import Worker
from tests.support.rank_forks import CONTEXT, start_rank

HOST = "127.0.0.1"


def run_worker(plan: WorkerPlan, questions: Connection) -> None:
    """One rank's process; answers "facts" on `questions` with those, else with `ExpertState`."""
    with contextlib.suppress(Exception):  # the leader's side has been told
        # As the Ray actors make their workers, without Ray.
        options = OffloadWorkerActor.worker_options(None, plan) if plan.offload else {}
        worker = Worker(plan, lambda phase, fraction: None, **options)
        threading.Thread(target=_answer, args=(worker, questions), daemon=True).start()
        worker.run()


def _answer(worker: Worker, questions: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        while question := questions.recv():
            questions.send(worker.facts if question == "facts" else worker.expert_state())


def model_plan(
    path: Path,
    *,
    dp: int,
    tp: int,
    exchange: str = "flat",
    capacity_factor: float | None = None,
    num_redundant: int = 0,
    max_moves: int = 0,
    survives: bool = False,
    lost_groups: int = 0,
    dtype: str = "float32",
    offload: OffloadPlan | None = None,
    device: str = "cpu",
    **limits: int,
) -> ModelPlan:
    """A plan as the planner would make it, small."""
    defaults = {"max_running_requests": 8, "max_step_tokens": 64, "num_blocks": 64}
    sizes = {**defaults, **limits}
    return ModelPlan(
        name="m",
        path=str(path),
        source=str(path),
        family="qwen3_moe",
        engine=EngineKind.OFFLOAD if offload else EngineKind.EXPERT_PARALLEL,
        replicas=1,
        tp_size=tp,
        dp_size=dp,
        experts=ExpertPlan(
            experts_per_rank=(),
            exchange=exchange,
            dispatch="exact",
            combine="fp32",
            capacity_factor=capacity_factor,
            num_redundant=num_redundant,
            max_moves=max_moves,
            survives=survives,
            lost_groups=lost_groups,
        ),
        device=device,
        dtype=dtype,
        num_threads=1,
        cpus_per_rank=1.0,
        gpus_per_rank=0.0,
        vocab_size=2048,
        eos_token_ids=(),
        kv=KvPlan(
            block_size=16,
            num_blocks=sizes["num_blocks"],
            dtype=dtype,
            bytes_per_rank=0,
            prefix_caching=True,
        ),
        scheduler=SchedulerPlan(
            max_running_requests=sizes["max_running_requests"],
            max_step_tokens=sizes["max_step_tokens"],
            max_context=512,
            max_waiting_requests=256,
            step_timeout_s=10.0,
        ),
        memory=MemoryPlan(weights_bytes=0, kv_bytes=0, workspace_bytes=0, available_bytes=0),
        offload=offload,
    )


class LockstepRanks:
    """Rank processes, the link to them and the schedulers that know their rows.

    Args:
        nodes: the node that each rank believes to be on; default: all on one.
    """

    def __init__(self, plan: ModelPlan, nodes: Sequence[str] = ()) -> None:
        self.plan = plan
        size = plan.num_ranks
        names = tuple(nodes) or ("here",) * size
        self.nodes = names
        self.processes: dict[int, ForkServerProcess] = {}
        self._questions: dict[int, Connection] = {}
        self._asking = threading.Lock()
        listener = LinkListener(size=size, epoch="e", secret="s", host=HOST, nodes=names)
        meetings = Meetings(
            epoch="e",
            link=listener.address,
            secret="s",
            tensor_groups=tuple((HOST, pick_port(HOST)) for _ in range(plan.dp_size)),
            peers=(HOST, pick_port(HOST)),
            nodes=names,
        )
        for rank in range(size):
            self.start(worker_plan(plan, rank, meetings))
        self.link = listener.accept_all(timeout_s=90)
        listener.close()
        self.executor = LockstepExecutor(self.link, tp_size=plan.tp_size)
        self.balancer = ExpertBalancer(
            self._starting_tables(), names, max_moves=plan.experts.max_moves if plan.experts else 0
        )
        # The first rank's answer, as the leader takes it.
        self.choose_scheme = scheme_chooser(self.facts()[0]["schemes"], plan.tp_size)
        self.scheduler = LockstepScheduler(
            scheduler_config(plan),
            plan.dp_size,
            choose_scheme=lambda num_tokens: self.choose_scheme(num_tokens),
            expert_orders=lambda: self.balancer.orders(),
            serving=self.serving,
        )

    def start(self, plan: WorkerPlan) -> None:
        """Begin a rank's process."""
        self._questions[plan.rank], theirs = CONTEXT.Pipe()
        self.processes[plan.rank] = start_rank(run_worker, plan, theirs)

    def serving(self) -> Sequence[int]:
        """Groups that have ranks."""
        return range(self.plan.dp_size)

    def _starting_tables(self) -> tuple[ExpertTable, ...]:
        assert self.plan.experts is not None
        arch = arch_from_hf(json.loads((Path(self.plan.path) / "config.json").read_text()))
        sizes = [
            (i, layer.moe.gate.num_experts) for i, layer in enumerate(arch.layers) if layer.moe
        ]
        return starting_tables(sizes, self.plan.num_ranks, self.plan.experts.num_redundant)

    def engine(self) -> SyncEngine:
        """One step at a time."""
        return SyncEngine(self.scheduler, self.executor, step_timeout_s=15.0)

    def expert_states(self) -> list[ExpertState]:
        """What each rank says of its experts."""
        return self._ask(True)

    def facts(self) -> list[dict[str, Any]]:
        """What each rank found when it started; see `LockstepRank.facts`."""
        return self._ask("facts")

    def _ask(self, question: object) -> list[Any]:
        with self._asking:
            pipes = [self._questions[rank] for rank in self.link.ranks]
            for pipe in pipes:
                pipe.send(question)
            return [pipe.recv() for pipe in pipes]

    def signal(self, rank: int, signum: int) -> None:
        """Send a signal to one rank."""
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, signum)

    def cpu_s(self, rank: int) -> float:
        """CPU seconds that a rank has used."""
        fields = Path(f"/proc/{self.processes[rank].pid}/stat").read_text().rsplit(")", 1)[1]
        ticks = sum(map(int, fields.split()[11:13]))
        return ticks / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """End all ranks, stopped ones too."""
        self.executor.close()
        for rank, process in self.processes.items():
            if process.is_alive():
                with contextlib.suppress(ProcessLookupError):
                    self.signal(rank, signal.SIGCONT)
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()
