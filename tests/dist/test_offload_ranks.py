"""Two ranks that stream their shards, over the step link, give the tokens of transformers."""

from pathlib import Path

import pytest
import torch
import transformers

from cluster.base.plan import OffloadPlan
from cluster.dist.rendezvous import pick_port
from offload.actor import OffloadWorkerActor
from offload.layout import read_store
from replicas.api import GenerationRequest, SamplingParams
from replicas.engine.scheduler import Scheduler
from replicas.engine.scheduler_config import SchedulerConfig
from replicas.engine.sync_engine import SyncEngine
from replicas.worker.link_executor import LinkExecutor
from replicas.worker.link_listener import LinkListener
from replicas.worker.plan import WorkerPlan
from replicas.worker.worker import Worker
from tests.support.compiled_kernels import cpu_kernels
from tests.support.offload_engine import offload_plan
from tests.support.rank_forks import start_rank

__all__ = ["cpu_kernels"]

MODEL = Path(__file__).parents[2] / "examples" / "models" / "demo-dense"
SIZE, NUM_TOKENS = 2, 20
MODEL_BYTES = 2 * 5_775_872  # in fp32
CONFIG = SchedulerConfig(
    max_running_requests=8,
    max_step_tokens=64,
    max_context=128,
    block_size=16,
    num_blocks=16,
    prefix_caching=False,
)


def run_worker(plan: WorkerPlan) -> None:
    # As the Ray actor makes its worker, without Ray.
    options = OffloadWorkerActor.worker_options(None, plan)
    Worker(plan, lambda phase, fraction: None, **options).run()


def worker_plan(
    rank: int, port: int, listener: LinkListener, offload: OffloadPlan, dtype: str
) -> WorkerPlan:
    return WorkerPlan(
        rank=rank,
        tp_size=SIZE,
        epoch="e",
        model_path=str(MODEL),
        device="cpu",
        dtype=dtype,
        kv_dtype=dtype,
        block_size=CONFIG.block_size,
        num_blocks=CONFIG.num_blocks,
        max_context=CONFIG.max_context,
        num_threads=1,
        collective_timeout_s=20.0,
        store_host="127.0.0.1",
        store_port=port,
        link_path=listener.address.path,
        link_host=listener.address.host,
        link_port=listener.address.port,
        link_secret=listener.secret,
        offload=offload,
    )


def tokens_of_two_ranks(offload: OffloadPlan, dtype: str) -> dict[str, list[int]]:
    """What the prompts are answered, greedily."""
    listener = LinkListener(size=SIZE, epoch="e", secret="s")
    port = pick_port("127.0.0.1")
    processes = [
        start_rank(run_worker, worker_plan(rank, port, listener, offload, dtype))
        for rank in range(SIZE)
    ]
    executor = LinkExecutor(listener.accept_all(timeout_s=120))
    listener.close()
    try:
        tokens = generate(SyncEngine(Scheduler(CONFIG), executor, step_timeout_s=20.0))
    finally:
        executor.close()
        for process in processes:
            process.join(20)
            if process.is_alive():
                process.kill()
                process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    return tokens


KV_BYTES = 4 * 2 * CONFIG.num_blocks * CONFIG.block_size * 2 * 32 * 4
WINDOW_BLOCKS = CONFIG.max_context // CONFIG.block_size


@pytest.mark.parametrize("home", ["device", "streamed"])
def test_two_ranks_in_half_of_their_weights(tmp_path: Path, home: str) -> None:
    """With the cache on the device; and in micro-batches through windows of an eighth of it, where
    every rank cuts a step at the same places, so that their collectives match."""
    windows = 2 if home == "streamed" else 0
    window_bytes = KV_BYTES // 4 // CONFIG.num_blocks * WINDOW_BLOCKS
    offload = OffloadPlan(
        disk_path=str(tmp_path),
        device_bytes=MODEL_BYTES // SIZE // 2 + (windows * window_bytes or KV_BYTES),
        host_bytes=KV_BYTES if windows else 0,
        workspace_bytes=0,
        ring_slots=2,
        prefetch_depth=2,
        micro_batch_tokens=24 if windows else 0,
        kv_home=home,
        kv_windows=windows,
        kv_window_blocks=WINDOW_BLOCKS if windows else 0,
    )
    tokens = tokens_of_two_ranks(offload, "float32")
    stores = [read_store(path) for path in tmp_path.glob("*of2.weights")]
    assert len(stores) == SIZE
    # A rank reads its own half only; what both have is norms and the padding of pages.
    assert all(store.total_bytes <= 1.05 * MODEL_BYTES / SIZE for store in stores)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    for name, prompt in prompts().items():
        expected = oracle.generate(
            torch.tensor([prompt]),
            do_sample=False,
            max_new_tokens=NUM_TOKENS,
            min_new_tokens=NUM_TOKENS,
        )
        assert tokens[name] == expected[0, len(prompt) :].tolist()


@pytest.mark.usefixtures("cpu_kernels")
def test_two_ranks_over_compressed_slices(tmp_path: Path) -> None:
    """The same bits as over slices that are not, at every read, from two thirds of the bytes."""
    answers, sizes = [], []
    for compression in ("none", "lossless"):
        disk = tmp_path / compression
        offload = offload_plan(disk, compression=compression, ring_slots=3, verify="first")
        answers.append(tokens_of_two_ranks(offload, "bfloat16"))
        stores = [read_store(path) for path in disk.glob("*of2.weights")]
        assert len(stores) == SIZE
        assert all(store.is_compressed == (compression == "lossless") for store in stores)
        sizes.append(sum(store.total_bytes for store in stores))
    assert answers[0] == answers[1]
    assert sizes[1] < 0.75 * sizes[0]


def prompts() -> dict[str, list[int]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    texts = ("def ", "import os\n" * 20, "class A:\n")
    return {str(index): tokenizer(text)["input_ids"] for index, text in enumerate(texts)}


def generate(engine: SyncEngine) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    for name, prompt in prompts().items():
        tokens[name] = []
        engine.add(
            GenerationRequest(
                request_id=name,
                prompt_token_ids=tuple(prompt),
                params=SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True),
            )
        )
    for delta in engine.run():
        tokens[delta.request_id] += delta.token_ids
    return tokens
