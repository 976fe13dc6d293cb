"""A running cluster follows its edited file, and no request notices.

One replica becomes two and one again while requests run; a model comes and goes; what cannot change
live is refused and changes nothing.
"""

import concurrent.futures
import os
import signal
import threading
import time

import pytest

from cluster.base.errors import PenstockError, WorkerDiedError
from router.client import PenstockClient
from tests.e2e.conftest import MIXTURE, MODEL, penstock, start_cluster, stop_cluster
from tests.e2e.test_up_and_down import alive

pytestmark = pytest.mark.e2e

CLUSTER = """
# A comment that survives.
cluster: {{name: {name}, drain: 60s}}
dashboard: {{port: {dashboard}}}
gateway: {{grpc_port: {grpc}, http_port: {http}}}
models:
  - name: {served}  # the demo
    path: {model}
    dtype: float32
    kv_cache: {{memory: 16MiB}}
"""
PROMPTS = ("def ", "import os\n\n\nclass Reader:\n", "for name in names:\n    ")
NUM_TOKENS = 160


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A cluster of one replica, and its file."""
    folder = tmp_path_factory.mktemp("live")
    running = start_cluster(folder, "live", MODEL, CLUSTER)
    try:
        yield running, folder / "cluster.yaml"
    finally:
        stop_cluster(running)


class Load:
    """Requests without a pause, until told to stop; keeps every answer and every error."""

    def __init__(self, address: str, num_clients: int = 4) -> None:
        self.answers: list[tuple[str, tuple[int, ...]]] = []
        self.errors: list[Exception] = []
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(address, index), daemon=True)
            for index in range(num_clients)
        ]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        for thread in self._threads:
            thread.join(60.0)

    def _run(self, address: str, index: int) -> None:
        with PenstockClient(address) as client:
            while not self._stop.is_set():
                prompt = PROMPTS[index % len(PROMPTS)]
                try:
                    self.answers.append((prompt, answer(client, prompt)))
                except Exception as error:
                    self.errors.append(error)
                index += 1


def answer(client: PenstockClient, prompt: str, model: str = MODEL.name) -> tuple[int, ...]:
    stream = client.generate(model, prompt, temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    return tuple(token for event in stream for token in event.token_ids)


def ranks_of(replica: dict) -> set[int]:
    return {worker["pid"] for worker in replica["workers"]} | {replica["pid"]}


def test_replicas_come_and_go_under_load_and_every_answer_is_whole(one):
    cluster, file = one
    with PenstockClient(cluster.grpc) as client:
        expected = {prompt: answer(client, prompt) for prompt in PROMPTS}
    (first,) = cluster.replicas()
    text = file.read_text()
    file.write_text(text.replace("# the demo", "# the demo\n    replicas: 2"))
    with Load(cluster.grpc) as load:
        planned = penstock("apply", str(file), "--dry-run", env=cluster.env)
        assert "~ demo-dense: replicas: 1 -> 2" in planned.stdout, planned.stderr
        assert len(cluster.replicas()) == 1
        grown = penstock("apply", str(file), env=cluster.env, timeout=120)
        assert grown.returncode == 0, grown.stderr
        (model,) = cluster.status()["models"]
        assert (model["ready_replicas"], model["replicas"]) == (2, 2)
        cluster.wait_for(lambda: all(r["generated_tokens"] > 0 for r in cluster.replicas()), 30.0)
        both = cluster.replicas()
        shrunk = penstock("scale", "demo-dense", "--replicas", "1", env=cluster.env, timeout=120)
        assert shrunk.returncode == 0, shrunk.stderr
        (left,) = cluster.replicas()
        time.sleep(1.0)
    assert load.errors == []
    assert len(load.answers) > 20
    assert all(tokens == expected[prompt] for prompt, tokens in load.answers)
    assert first["replica_id"] in {replica["replica_id"] for replica in both}
    (gone,) = [replica for replica in both if replica["replica_id"] != left["replica_id"]]
    cluster.wait_for(lambda: not alive(ranks_of(gone)), 15.0)
    assert alive(ranks_of(left)) == ranks_of(left)
    (model,) = cluster.status()["models"]
    assert (model["ready_replicas"], model["replicas"]) == (1, 1)
    assert file.read_text() == text.replace("# the demo", "# the demo\n    replicas: 1")


def test_streams_that_outlast_the_drain_go_on_elsewhere(one):
    cluster, file = one
    text = file.read_text()
    with PenstockClient(cluster.grpc) as client:
        undisturbed = [long_answer(client, index) for index in range(6)]
        before = cluster.status()["resumed_requests"]
        single = text.replace("\n    replicas: 1", "").replace("60s", "100ms")
        file.write_text(single.replace("# the demo", "# the demo\n    replicas: 2"))
        grown = penstock("apply", str(file), env=cluster.env, timeout=120)
        assert grown.returncode == 0, grown.stderr
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            streams = [pool.submit(long_answer, client, index) for index in range(6)]
            cluster.wait_for(lambda: all(r["num_running"] > 1 for r in cluster.replicas()), 20.0)
            scale = ("scale", "demo-dense", "--replicas", "1")
            shrunk = penstock(*scale, env=cluster.env, timeout=120)
            assert [stream.result(timeout=60) for stream in streams] == undisturbed
    assert shrunk.returncode == 0, shrunk.stderr
    assert cluster.status()["resumed_requests"] > before
    file.write_text(text)
    assert penstock("apply", str(file), env=cluster.env, timeout=120).returncode == 0


def long_answer(client: PenstockClient, index: int) -> list[int]:
    stream = client.generate(
        MODEL.name, f"# {index}\n", temperature=0.9, seed=index, max_tokens=900, ignore_eos=True
    )
    return [token for piece in stream for token in piece.token_ids]


def test_a_killed_worker_ends_its_streams_with_a_code_and_the_replica_comes_back(one):
    cluster, _ = one
    (victim,) = cluster.replicas()
    with PenstockClient(cluster.grpc) as client, concurrent.futures.ThreadPoolExecutor(4) as pool:
        undisturbed = long_answer(client, 0)
        streams = [pool.submit(end_of, client, index) for index in range(4)]
        cluster.wait_for(lambda: cluster.replicas()[0]["num_running"] == 4, 20.0)
        killed_s = time.monotonic()
        os.kill(int(victim["workers"][0]["pid"]), signal.SIGKILL)
        for stream in streams:
            error, ended_s = stream.result(timeout=60)
            assert isinstance(error, WorkerDiedError)
            assert "No other replica could take the request" in error.cause
            assert "output tokens were delivered" in error.cause
            assert ended_s - killed_s < 2.0
        cluster.wait_for(
            lambda: [r["epoch"] for r in cluster.replicas()] not in ([], [victim["epoch"]])
        )
        assert long_answer(client, 0) == undisturbed


def end_of(client: PenstockClient, index: int) -> tuple[Exception | None, float]:
    try:
        long_answer(client, index)
    except PenstockError as error:
        return error, time.monotonic()
    return None, time.monotonic()


def test_what_replicas_were_built_with_is_refused_by_key_and_line(one):
    cluster, file = one
    text = file.read_text()
    before = cluster.replicas()
    file.write_text(text.replace("dtype: float32", "dtype: bfloat16"))
    refused = penstock("apply", str(file), env=cluster.env)
    file.write_text(text)
    assert refused.returncode == 2
    line = text[: text.index("dtype")].count("\n") + 1
    assert f"cluster.yaml:{line}: models[0].dtype: cannot change from float32" in refused.stderr
    assert "another name" in refused.stderr
    assert cluster.replicas()[0]["epoch"] == before[0]["epoch"]
    unchanged = penstock("apply", str(file), env=cluster.env)
    assert (unchanged.returncode, unchanged.stdout) == (0, "nothing to change\n")


def test_a_model_comes_and_goes_beside_another(one):
    cluster, file = one
    text = file.read_text()
    (before,) = cluster.replicas()
    more = f"  - {{name: moe, path: {MIXTURE}, dtype: float32, kv_cache: {{memory: 16MiB}}}}\n"
    file.write_text(text + more)
    added = penstock("apply", str(file), env=cluster.env, timeout=120)
    assert added.returncode == 0, added.stderr
    with PenstockClient(cluster.grpc) as client:
        assert len(answer(client, "def ", "moe")) == NUM_TOKENS
    assert [model["name"] for model in cluster.status()["models"]] == [MODEL.name, "moe"]
    (newcomer,) = cluster.replicas("moe")
    file.write_text(text)
    removed = penstock("apply", str(file), env=cluster.env, timeout=120)
    assert removed.returncode == 0, removed.stderr
    assert [model["name"] for model in cluster.status()["models"]] == [MODEL.name]
    cluster.wait_for(lambda: not alive(ranks_of(newcomer)), 15.0)
    assert [replica["epoch"] for replica in cluster.replicas()] == [before["epoch"]]


def test_a_model_that_cannot_start_leaves_everything_as_it_was(one, tmp_path):
    cluster, file = one
    text = file.read_text()
    broken = tmp_path / "broken"
    broken.mkdir()
    for part in MODEL.iterdir():
        if part.is_file():
            (broken / part.name).write_bytes(part.read_bytes())
    weights = (broken / "model.safetensors").read_bytes()
    # The header is whole, so the planner has nothing to say; the ranks do.
    (broken / "model.safetensors").write_bytes(weights[:-1000] + b"\xff" * 1000)
    file.write_text(text + f"  - {{name: broken, path: {broken}, dtype: float32}}\n")
    failed = penstock("apply", str(file), env=cluster.env, timeout=120)
    file.write_text(text)
    assert failed.returncode == 1
    assert "broken" in failed.stderr
    assert [model["name"] for model in cluster.status()["models"]] == [MODEL.name]
    assert [replica["model"] for replica in cluster.status()["replicas"]] == [MODEL.name]


def test_a_watched_file_is_followed_and_a_bad_edit_changes_nothing(tmp_path):
    cluster = start_cluster(tmp_path, "watched", MODEL, CLUSTER, "--watch")
    file = tmp_path / "cluster.yaml"
    try:
        text = file.read_text()
        (first,) = cluster.replicas()
        file.write_text(text.replace("# the demo", "# the demo\n    parallel: {tp: 2}"))
        cluster.wait_for(lambda: "models[0].parallel.tp" in cluster.log.read_text(), 20.0)
        file.write_text(text.replace("# the demo", "# the demo\n    replicas: 2"))
        cluster.wait_for(lambda: len(cluster.replicas()) == 2, 60.0)
        assert first["epoch"] in {replica["epoch"] for replica in cluster.replicas()}
    finally:
        assert stop_cluster(cluster) == 0
