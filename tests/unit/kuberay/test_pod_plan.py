"""Plans for pods: what scaling leaves alone, what pods cannot have, what a gateway waits for."""

import http.server
import threading

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as BackendTokenizer
from tokenizers.models import WordLevel

from cluster.base.errors import ConfigError
from cluster.base.load import parse_cluster_text
from cluster.control.kuberay.options import GIB, ModelsVolume, RenderOptions
from cluster.control.kuberay.pod_plan import plan_for_pods, pods_per_replica
from cluster.control.kuberay.ray_service import ray_service
from cluster.control.kuberay.render import render
from cluster.control.pod_leave import num_active, wait_idle
from cluster.planner.hub import Hub
from tests.unit.planner.fake_checkpoints import write_checkpoint

OPTIONS = RenderOptions(image="penstock:test", memory_bytes=8 * GIB)


@pytest.fixture(scope="module")
def parse(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pods")
    for name in ("ckpt", "other/ckpt"):
        write_checkpoint(folder / name)
        tokenizer = BackendTokenizer(WordLevel({"a": 0}, unk_token="a"))
        tokenizer.save(str(folder / name / "tokenizer.json"))
    return lambda text: parse_cluster_text(text, folder / "c.yaml")


def planned(parse, text, options=OPTIONS):
    return plan_for_pods(parse(text), options, Hub(offline=True))


def entries(*models: str) -> str:
    return "cluster: {name: c}\nmodels:\n" + "".join(f"  - {{{model}}}\n" for model in models)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
@given(st.integers(1, 8), st.integers(1, 8))
def test_scaling_touches_only_what_serve_changes_in_place(parse, one, two):
    specs = []
    for count in (one, two):
        text = entries(f"name: a, path: ckpt, replicas: {count}", "name: b, path: ckpt")
        specs.append(ray_service(planned(parse, text), OPTIONS)["spec"])
    configs = [yaml.safe_load(spec.pop("serveConfigV2")) for spec in specs]
    assert specs[0] == specs[1]  # else KubeRay makes a second Ray cluster
    for config in configs:
        for app in config["applications"]:
            for deployment in app["deployments"]:
                del deployment["user_config"], deployment["num_replicas"]
    assert configs[0] == configs[1]  # else Serve restarts replicas


def test_equal_files_give_equal_bytes(parse):
    text = entries("name: a, path: ckpt")
    assert render(planned(parse, text), OPTIONS) == render(planned(parse, text), OPTIONS)


def test_each_replica_is_planned_as_if_alone(parse):
    (alone,) = planned(parse, entries("name: a, path: ckpt")).models
    both = planned(parse, entries("name: a, path: ckpt, replicas: 3", "name: b, path: ckpt"))
    assert {model.num_threads for model in both.models} == {alone.num_threads} == {4}
    assert {pods_per_replica(model) for model in both.models} == {1}
    assert [model.path for model in both.models] == ["/models/ckpt"] * 2


@pytest.mark.parametrize(
    ("text", "param"),
    [
        (entries("name: a, path: ckpt").replace("name: c", "name: 1c"), "cluster.name"),
        (entries("name: a, path: ckpt") + "gateway: {host: 10.0.0.1}\n", "gateway.host"),
        (entries("name: a, path: ckpt") + "gateway: {http_port: 6379}\n", "gateway.http_port"),
        (entries("name: a, path: ckpt, replicas: 9"), "models[0].replicas"),
        (entries("name: a.b, path: ckpt", "name: a-B, path: ckpt"), "models[1].name"),
        (entries("name: a, path: ckpt", "name: b, path: other/ckpt"), "models"),
        (entries("name: a, path: ckpt, engine: offload, offload: {disk_path: here}"),
         "models[0].offload.disk_path"),
    ],
)  # fmt: skip
def test_what_pods_cannot_have_is_refused_by_key(parse, text, param):
    with pytest.raises(ConfigError) as refused:
        planned(parse, text)
    assert refused.value.param == param
    assert refused.value.remedy


@pytest.mark.parametrize("text", ["nfs", "pvc:", "hostPath:data", "image:", ""])
def test_volumes_that_are_none_are_refused(text):
    with pytest.raises(ConfigError, match="no volume of checkpoints"):
        ModelsVolume.parse(text)


@pytest.mark.parametrize(
    ("text", "key", "claims"),
    [
        ("pvc", "persistentVolumeClaim", 1),
        ("pvc:mine", "persistentVolumeClaim", 0),
        ("hostPath:/data", "hostPath", 0),
        ("image:store/models:1", "image", 0),
    ],
)
def test_volumes_of_checkpoints(parse, text, key, claims):
    options = RenderOptions(image="i", models=ModelsVolume.parse(text))
    files = render(planned(parse, entries("name: a, path: ckpt"), options), options)
    assert ("models-claim.yaml" in files) == bool(claims)
    spec = yaml.safe_load(files["rayservice.yaml"])["spec"]["rayClusterConfig"]
    for group in spec["workerGroupSpecs"]:
        volumes = {volume["name"]: volume for volume in group["template"]["spec"]["volumes"]}
        assert key in volumes["models"]


def test_keys_and_certificates_are_secrets_of_gateways_only(parse):
    text = "gateway:\n  api_keys_file: k\n  tls: {certificate: c, key: k, client_ca: a}\n"
    plan = planned(parse, text + entries("name: a, path: ckpt"))
    assert plan.gateway.api_keys_file == "/etc/penstock/api-keys/api-keys"
    assert plan.gateway.tls.client_ca == "/etc/penstock/client-ca/ca.crt"
    files = render(plan, OPTIONS)
    config = yaml.safe_load(files["rayservice.yaml"])["spec"]["rayClusterConfig"]
    found = {}
    for group in config["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
        found[group["groupName"]] = {
            volume["secret"]["secretName"]: mounts[volume["name"]]["mountPath"]
            for volume in pod["volumes"]
            if "secret" in volume
        }
        assert all(mounts[name]["readOnly"] for name in mounts if name in ("tls", "api-keys"))
        if group["groupName"] == "gateway":
            assert container["readinessProbe"]["httpGet"]["scheme"] == "HTTPS"
            leave = container["lifecycle"]["preStop"]["exec"]["command"]
            assert "https://127.0.0.1:8000/metrics" in leave
    assert found == {
        "gateway": {
            "c-api-keys": "/etc/penstock/api-keys",
            "c-tls": "/etc/penstock/tls",
            "c-client-ca": "/etc/penstock/client-ca",
        },
        "engine-a": {},
    }
    (service, _) = yaml.safe_load_all(files["services.yaml"])
    assert {port["appProtocol"] for port in service["spec"]["ports"]} == {"https"}


def metrics(*counts: int) -> str:
    lines = [f'penstock_active_requests{{model="m{i}"}} {n}.0' for i, n in enumerate(counts)]
    return "\n".join(["# HELP penstock_active_requests how many", *lines])


def test_a_gateway_leaves_when_its_requests_have_ended():
    answers = [metrics(2, 1), metrics(0, 1), metrics(0, 0)]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = (answers.pop(0) if len(answers) > 1 else answers[0]).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/metrics"
    try:
        assert not wait_idle(url, 0.1, settle_s=0.0)
        assert wait_idle(url, 10.0, settle_s=0.0)
        assert len(answers) == 1
    finally:
        server.shutdown()
        server.server_close()
    assert wait_idle(url, 10.0, settle_s=0.0)  # nobody there has nothing to wait for


def test_the_gauge_is_the_one_that_gateways_export():
    from prometheus_client import CollectorRegistry, Gauge, generate_latest

    from cluster.base.metrics import ACTIVE_REQUESTS

    registry = CollectorRegistry()
    name, text, labels = ACTIVE_REQUESTS.name, ACTIVE_REQUESTS.help, ACTIVE_REQUESTS.labels
    Gauge(name, text, labels, registry=registry).labels("m").set(3)
    assert num_active(generate_latest(registry).decode()) == 3
