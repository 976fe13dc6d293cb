"""A rendered RayService starts: Ray nodes as its groups say, Serve's config as KubeRay sends it.

Everything but Kubernetes itself: the nodes have the groups' labels, CPUs and memory, the
configuration goes to Ray's dashboard over the REST call that KubeRay makes, unchanged.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
import yaml

from bench.running_cluster import free_ports
from cluster.base.env import RAY_DEFAULTS
from router.client import PenstockClient
from tests.e2e.conftest import MODEL, PENSTOCK, RunningCluster

pytestmark = pytest.mark.e2e

CLUSTER = """
cluster: {{name: pods, drain: 20s}}
dashboard: {{port: {dashboard}}}
gateway: {{grpc_port: {grpc}, http_port: {http}}}
models:
  - {{name: Demo.Dense, path: {model}, dtype: float32, replicas: {replicas},
      kv_cache: {{memory: 16MiB}}, parallel: {{tp: 2}}, resources: {{threads_per_rank: 1}}}}
"""
PROMPT = "import os\n\n\nclass Reader:\n"
NUM_TOKENS = 24
# A process of its own: this Ray runs with settings that must not reach other tests.
NODES = """
import json, sys
from ray.cluster_utils import Cluster

head, *workers = json.loads(sys.argv[1])
def arguments(node):
    params = node["rayStartParams"]
    return {"num_cpus": int(params["num-cpus"]), "labels": node.get("labels"),
            "object_store_memory": int(params["object-store-memory"]),
            **({"memory": int(params["memory"])} if "memory" in params else {})}
cluster = Cluster(initialize_head=True, head_node_args={
    **arguments(head), "include_dashboard": True,
    "dashboard_port": int(head["rayStartParams"]["dashboard-port"])})
for node in workers:
    cluster.add_node(**arguments(node))
print("up", flush=True)
sys.stdin.read()
cluster.shutdown()
"""
DEPLOY = """
import sys, yaml
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient
ServeSubmissionClient(sys.argv[1]).deploy_applications(yaml.safe_load(sys.stdin))
"""


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    return {
        "RAY_AUTH_MODE": "disabled",
        **RAY_DEFAULTS,
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "HOME": str(tmp_path_factory.mktemp("home")),
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }


def render(folder: Path, ports: tuple[int, ...], replicas: int) -> dict:
    """The RayService of a cluster file, as the command renders it."""
    (folder / "models").mkdir(exist_ok=True)
    if not (folder / "models" / MODEL.name).exists():
        (folder / "models" / MODEL.name).symlink_to(MODEL)
    grpc, http, dashboard = ports
    file = folder / "cluster.yaml"
    file.write_text(
        CLUSTER.format(grpc=grpc, http=http, dashboard=dashboard, model=MODEL, replicas=replicas)
    )
    command = [PENSTOCK, "render", str(file), "-o", str(folder / "k8s"), "--pod-cpus", "2",
               "--pod-memory", "4GiB", "--models-dir", str(folder / "models")]  # fmt: skip
    subprocess.run(command, check=True, timeout=60)
    return yaml.safe_load((folder / "k8s" / "rayservice.yaml").read_text())["spec"]


def expected() -> list[int]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    output = model.generate(
        **inputs, do_sample=False, max_new_tokens=NUM_TOKENS, min_new_tokens=NUM_TOKENS
    )
    return output[0, inputs["input_ids"].shape[1] :].tolist()


def answer(address: str) -> list[int]:
    with PenstockClient(address) as client:
        stream = client.generate(
            "Demo.Dense", PROMPT, temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True
        )
        return [token for event in stream for token in event.token_ids]


def deploy(spec: dict, dashboard: int, env: dict) -> None:
    subprocess.run(
        [sys.executable, "-c", DEPLOY, f"http://127.0.0.1:{dashboard}"],
        input=spec["serveConfigV2"], text=True, env=env, check=True, timeout=120,
    )  # fmt: skip


def test_the_manifest_starts_and_scales_in_place(tmp_path, env):
    ports = free_ports(3)
    spec = render(tmp_path, ports, replicas=1)
    config = spec["rayClusterConfig"]
    gateway, engine = config["workerGroupSpecs"]
    nodes = [config["headGroupSpec"], gateway, engine, engine]
    log = tmp_path / "nodes.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", NODES, json.dumps(nodes)],
            env=env, stdin=subprocess.PIPE, stdout=output, stderr=output,
        )  # fmt: skip
    cluster = RunningCluster(process, f"127.0.0.1:{ports[0]}", "", env, log)
    try:
        cluster.wait_for(lambda: "up" in log.read_text() or process.poll() is not None, 90.0)
        deploy(spec, ports[2], env)
        cluster.wait_for(lambda: is_ready(cluster, 1), 90.0)
        assert answer(cluster.grpc) == expected()
        before = cluster.status()
        again = render(tmp_path, ports, replicas=2)
        assert again["rayClusterConfig"] == config
        deploy(again, ports[2], env)
        cluster.wait_for(lambda: is_ready(cluster, 2), 90.0)
        after = cluster.status()
        epochs = {replica["epoch"] for replica in after["replicas"]}
        assert {replica["epoch"] for replica in before["replicas"]} < epochs
        assert after["gateway_pid"] == before["gateway_pid"]
        assert answer(cluster.grpc) == expected()
    finally:
        process.stdin.close()
        process.wait(timeout=60)


def is_ready(cluster: RunningCluster, count: int) -> bool:
    try:
        (model,) = cluster.status()["models"]
    except Exception:
        return False
    return model["ready_replicas"] == model["replicas"] == count
