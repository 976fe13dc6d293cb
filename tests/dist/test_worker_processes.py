"""Real worker processes over the step link: the leader's side drives two ranks like one."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
import transformers

from cluster.base.errors import CorruptWeightsError, PenstockError, WorkerDiedError
from cluster.dist.rendezvous import pick_port
from replicas.api import GenerationDelta, GenerationRequest, ReplicaStats, SamplingParams
from replicas.engine.engine_loop import EngineLoop
from replicas.engine.scheduler import Scheduler
from replicas.engine.scheduler_config import SchedulerConfig
from replicas.engine.sync_engine import SyncEngine
from replicas.worker.link_executor import LinkExecutor
from replicas.worker.link_listener import LinkListener
from replicas.worker.plan import WorkerPlan
from replicas.worker.worker import Worker
from tests.support.rank_forks import start_rank

MODEL = Path(__file__).parents[2] / "examples" / "models" / "demo-dense"
NUM_BLOCKS, BLOCK_SIZE, MAX_CONTEXT = 64, 16, 512
CONFIG = SchedulerConfig(
    max_running_requests=8,
    max_step_tokens=64,
    max_context=MAX_CONTEXT,
    block_size=BLOCK_SIZE,
    num_blocks=NUM_BLOCKS,
    prefix_caching=False,
)


def run_worker(plan: WorkerPlan) -> None:
    Worker(plan, lambda phase, fraction: None).run()


class Ranks:
    """The processes of one group, the link to them and the scheduler that knows their rows."""

    def __init__(self, size: int, model: Path = MODEL) -> None:
        listener = LinkListener(size=size, epoch="e", secret="s")
        port = pick_port("127.0.0.1")
        self.processes = [
            start_rank(run_worker, self._plan(rank, size, port, listener, model))
            for rank in range(size)
        ]
        self.scheduler = Scheduler(CONFIG)
        self.executor = LinkExecutor(listener.accept_all(timeout_s=60))
        listener.close()

    def _plan(self, rank, size, port, listener, model) -> WorkerPlan:
        return WorkerPlan(
            rank=rank,
            tp_size=size,
            epoch="e",
            model_path=str(model),
            device="cpu",
            dtype="float32",
            kv_dtype="float32",
            block_size=BLOCK_SIZE,
            num_blocks=NUM_BLOCKS,
            max_context=MAX_CONTEXT,
            num_threads=1,
            collective_timeout_s=5.0,
            store_host="127.0.0.1",
            store_port=port,
            link_path=listener.address.path,
            link_host=listener.address.host,
            link_port=listener.address.port,
            link_secret=listener.secret,
        )

    def engine(self) -> SyncEngine:
        return SyncEngine(self.scheduler, self.executor, step_timeout_s=10.0)

    def close(self) -> None:
        self.executor.close()
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()


@pytest.fixture
def two_ranks():
    ranks = Ranks(2)
    yield ranks
    ranks.close()


def greedy(request_id: str, prompt: list[int], num_tokens: int) -> GenerationRequest:
    return GenerationRequest(
        request_id=request_id,
        prompt_token_ids=tuple(prompt),
        params=SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True),
    )


def test_two_rank_processes_give_the_tokens_of_transformers_and_end_on_stop(two_ranks):
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    prompts = [tokenizer(text)["input_ids"] for text in ("def ", "import os\n" * 40, "class A:\n")]
    engine = two_ranks.engine()
    for index, prompt in enumerate(prompts):
        engine.add(greedy(str(index), prompt, 20))
    tokens: dict[str, list[int]] = {str(index): [] for index in range(len(prompts))}
    for delta in engine.run():
        tokens[delta.request_id] += delta.token_ids
    for index, prompt in enumerate(prompts):
        expected = oracle.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=20, min_new_tokens=20
        )
        assert tokens[str(index)] == expected[0, len(prompt) :].tolist()
    two_ranks.close()
    assert [process.exitcode for process in two_ranks.processes] == [0, 0]


def sampled(tag: str, stop_token_ids: tuple[int, ...] = ()) -> list[GenerationRequest]:
    """Some with several choices, penalties over their own output, and prompts in chunks."""
    return [
        GenerationRequest(
            request_id=f"{tag}{index}",
            prompt_token_ids=tuple((7 * index + 3 * i) % 200 + 20 for i in range(5 + 40 * index)),
            params=SamplingParams(
                temperature=1.0,
                top_p=0.95,
                repetition_penalty=1.2,
                presence_penalty=0.5,
                frequency_penalty=0.2,
                seed=index,
                n=1 + index % 2,
                max_tokens=24,
                ignore_eos=True,
                stop_token_ids=stop_token_ids,
                logprobs=1,
            ),
        )
        for index in range(4)
    ]


class LoopRun:
    """An engine loop over the ranks, in its own thread, to the end of some requests."""

    def __init__(self, ranks: Ranks, requests: list[GenerationRequest]) -> None:
        self.tokens: dict[tuple[str, int], list[int]] = {}
        self.fatal: list[PenstockError] = []
        self.loop = EngineLoop(
            ranks.scheduler,
            ranks.executor,
            on_deltas=self._hear,
            on_fatal=self.fatal.append,
            step_timeout_s=10.0,
        )
        for request in requests:
            self.loop.add_request(request)
        self.loop.drain()
        self.loop.start()

    def _hear(self, deltas: list[GenerationDelta], stats: ReplicaStats) -> None:
        for delta in deltas:
            key = (delta.request_id[1:], delta.index)
            self.tokens.setdefault(key, []).extend(delta.token_ids)


def test_the_pipelined_loop_gives_the_streams_of_one_step_at_a_time(two_ranks):
    one_by_one = {
        (c.request_id[1:], c.index): c.token_ids for c in two_ranks.engine().generate(sampled("s"))
    }
    run = LoopRun(two_ranks, sampled("p"))
    assert run.loop.wait_drained(30.0)
    assert run.loop.stop()
    assert run.fatal == []
    assert run.tokens == one_by_one
    assert len(one_by_one) == 6
    # Ends that nobody foresees: a step on top computes tokens that have to be discarded.
    stops = (one_by_one["0", 0][7], one_by_one["3", 1][11])
    stopped = {
        (c.request_id[1:], c.index): c.token_ids
        for c in two_ranks.engine().generate(sampled("t", stops))
    }
    run = LoopRun(two_ranks, sampled("q", stops))
    assert run.loop.wait_drained(30.0)
    assert run.loop.stop()
    assert run.tokens == stopped != one_by_one
    assert two_ranks.scheduler.num_discarded_tokens > 0


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_killed_with_steps_in_flight_ends_the_loop_at_once(two_ranks, victim):
    run = LoopRun(two_ranks, [greedy("r", [5, 6, 7], 400)])
    deadline_s = time.monotonic() + 20.0
    while len(run.tokens.get(("", 0), ())) < 5 and time.monotonic() < deadline_s:
        time.sleep(0.01)
    os.kill(two_ranks.processes[victim].pid, signal.SIGKILL)
    killed_s = time.monotonic()
    assert run.loop.wait_drained(10.0)
    assert time.monotonic() - killed_s < 1.0
    assert [error.code for error in run.fatal] == ["worker_died"]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_is_named_within_a_second_and_its_peer_ends_too(two_ranks, victim):
    engine = two_ranks.engine()
    engine.add(greedy("r", [5, 6, 7], 400))
    deltas = engine.run()
    for _ in range(5):
        next(deltas)
    os.kill(two_ranks.processes[victim].pid, signal.SIGKILL)
    killed_s = time.monotonic()
    with pytest.raises(WorkerDiedError, match=f"rank {victim}|connection to a peer is gone"):
        for _ in deltas:
            pass
    assert time.monotonic() - killed_s < 1.0
    two_ranks.executor.close()
    for process in two_ranks.processes:
        process.join(10)
        assert not process.is_alive()


def test_a_rank_that_cannot_load_says_why(tmp_path):
    for file in MODEL.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])
    plan = Ranks._plan(None, 0, 1, 0, LinkListener(size=1, epoch="e", secret="s"), tmp_path)
    with pytest.raises(CorruptWeightsError, match=r"model\.safetensors"):
        Worker(plan, lambda phase, fraction: None)
