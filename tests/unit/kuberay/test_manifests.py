"""Rendered manifests: what is committed is what is rendered, and Kubernetes would take it.

Checked against KubeRay's definitions where they are at hand (KUBERAY_CRDS names their directory),
against Serve's own schema, and against rules of the operator that no schema holds.
"""

import copy
import dataclasses
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from cluster.base.env import RAY_DEFAULTS
from cluster.base.load import load_cluster_file
from cluster.base.plan import ClusterPlan, from_json
from cluster.control.kuberay.options import GIB, RenderOptions
from cluster.control.kuberay.pod_plan import plan_for_pods
from cluster.control.kuberay.render import render
from cluster.planner.hub import Hub
from tests.support.crd_schema import load_schema, problems

ROOT = Path(__file__).parents[3]
OVERLAYS = ROOT / "k8s" / "overlays"
CRDS = Path(os.environ.get("KUBERAY_CRDS", ROOT.parent / "shared" / "kuberay-crds"))
IMAGE = "penstock:0.1.0"
OPTIONS = {
    "cpu": RenderOptions(image=IMAGE),
    "gpu": RenderOptions(image=IMAGE, gpus=2, cpus=8, memory_bytes=32 * GIB),
}


@pytest.fixture(scope="module", params=["cpu", "gpu"])
def overlay(request):
    return request.param


@pytest.fixture(scope="module")
def files(overlay):
    file = load_cluster_file(OVERLAYS / overlay / "cluster.yaml")
    return render(plan_for_pods(file, OPTIONS[overlay], Hub(offline=True)), OPTIONS[overlay])


@pytest.fixture(scope="module")
def manifests(files):
    texts = [text for name, text in files.items() if name != "kustomization.yaml"]
    return [document for text in texts for document in yaml.safe_load_all(text)]


@pytest.fixture(scope="module")
def service(manifests):
    return next(each for each in manifests if each["kind"] == "RayService")


def templates(service):
    config = service["spec"]["rayClusterConfig"]
    groups = [config["headGroupSpec"], *config["workerGroupSpecs"]]
    return [group["template"] for group in groups]


def test_what_is_committed_is_what_is_rendered(overlay, files):
    folder = OVERLAYS / overlay / "rendered"
    committed = {file.name: file.read_text() for file in folder.iterdir()}
    assert committed == files, f"run `make manifests` after a change ({overlay})"


def test_kuberay_takes_the_service(service):
    if not CRDS.is_dir():
        pytest.skip("KubeRay's definitions are not here; KUBERAY_CRDS may name their directory")
    schema = load_schema(CRDS / "ray.io_rayservices.yaml")
    assert problems(schema, copy.deepcopy(service)) == []
    wrong = copy.deepcopy(service)
    wrong["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["maxReplica"] = 1
    assert len(problems(schema, wrong)) == 1


def test_serve_takes_the_configuration(service):
    config = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    assert config.proxy_location == "Disabled"
    assert [app.import_path.rpartition(":")[2] for app in config.applications] == [
        "engine",
        "gateway",
    ]


def test_what_is_left_out_comes_back(overlay, service):
    file = load_cluster_file(OVERLAYS / overlay / "cluster.yaml")
    plan = plan_for_pods(file, OPTIONS[overlay], Hub(offline=True))
    *_, gateway = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    back = from_json(ClusterPlan, gateway["deployments"][0]["user_config"])
    models = tuple(dataclasses.replace(model, reasons={}, nodes=()) for model in plan.models)
    assert back == dataclasses.replace(plan, models=models, warnings=())


def test_core_objects_fit_kubernetes_own_schemas(manifests):
    validator = pytest.importorskip(
        "kubernetes_validate", reason="kubernetes-validate of the dev extra is not installed"
    )
    for manifest in manifests:
        if manifest["kind"] != "RayService":
            validator.validate(manifest, "1.32", strict=True)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="there is no kubectl here")
def test_kustomize_builds_the_overlay_with_its_components(overlay, manifests):
    built = subprocess.run(
        ["kubectl", "kustomize", str(OVERLAYS / overlay)],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    found = list(yaml.safe_load_all(built.stdout))
    assert len(found) == len(manifests) + 1
    assert {each["metadata"].get("namespace", "penstock") for each in found} == {"penstock"}
    (ray,) = [each for each in found if each["kind"] == "RayService"]
    assert ray["spec"]["rayClusterConfig"]["authOptions"] == {"mode": "token"}


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="there is no kubectl here")
@pytest.mark.parametrize("component", ["monitoring", "clients-anywhere"])
def test_kustomize_takes_the_other_components(component, tmp_path):
    shutil.copytree(ROOT / "k8s", tmp_path / "k8s")
    file = tmp_path / "k8s" / "overlays" / "cpu" / "kustomization.yaml"
    file.write_text(file.read_text() + f"  - ../../components/{component}\n")
    built = subprocess.run(
        ["kubectl", "kustomize", str(file.parent)],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    names = [(each["kind"], each["metadata"]["name"]) for each in yaml.safe_load_all(built.stdout)]
    assert len(names) == len(set(names)) > 10


def test_rules_of_the_operator(service):
    spec = service["spec"]
    config = spec["rayClusterConfig"]
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", service["metadata"]["name"])
    assert len(service["metadata"]["name"]) <= 47
    for group in config["workerGroupSpecs"]:
        assert 0 <= group["minReplicas"] <= group["maxReplicas"]
        assert "replicas" not in group  # the autoscaler's
        assert re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", group["groupName"])
        assert "resources" not in group
    for template in templates(service):
        (container,) = template["spec"]["containers"]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert {"serve", "serve-grpc"} <= ports.keys()
        assert len(set(ports.values())) == len(ports)
        assert all(len(name) <= 15 for name in ports)
    assert spec["rayClusterDeletionDelaySeconds"] >= 30


def test_pods_are_restricted_and_hold_no_secret(service, manifests):
    for template in templates(service):
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        (container,) = pod["containers"]
        context = container["securityContext"]
        assert not context["allowPrivilegeEscalation"]
        assert context["readOnlyRootFilesystem"]
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == {
            volume["name"] for volume in pod["volumes"]
        }
        assert not any("hostPath" in volume for volume in pod["volumes"])
    assert "Secret" not in {each["kind"] for each in manifests}


def test_ray_is_as_calm_in_pods_as_under_up(service):
    for template in templates(service):
        (container,) = template["spec"]["containers"]
        found = {entry["name"]: entry["value"] for entry in container["env"]}
        assert RAY_DEFAULTS.items() <= found.items()


def test_what_ray_reserves_fits_each_pod(service):
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    engine = config["applications"][0]["args"]["model"]
    _, group = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    params = group["rayStartParams"]
    (container,) = group["template"]["spec"]["containers"]
    limits = container["resources"]["limits"]
    asked = engine["tp_size"] * engine["cpus_per_rank"] + engine.get("leader_cpus", 0.1)
    assert asked <= int(params["num-cpus"]) == int(limits["cpu"])
    mebibytes = int(limits["memory"].removesuffix("Mi"))
    assert int(params.get("memory", 0)) < mebibytes << 20
    if engine["device"] == "cuda":
        assert limits["nvidia.com/gpu"] == params["num-gpus"] == str(engine["tp_size"])


def test_everything_that_selects_pods_finds_some(service, manifests):
    pods = [template["metadata"]["labels"] for template in templates(service)]
    for manifest in manifests:
        spec = manifest["spec"]
        selector = spec.get("selector") or spec.get("podSelector")
        if manifest["kind"] in ("Service", "PodDisruptionBudget", "NetworkPolicy"):
            wanted = selector.get("matchLabels", selector)
            assert any(wanted.items() <= labels.items() for labels in pods), manifest["metadata"]


def test_the_image_is_pinned_and_runs_without_rights():
    lines = (ROOT / "k8s" / "images" / "Dockerfile").read_text().splitlines()
    assert re.search(r"^ARG PYTHON=\d+\.\d+\.\d+-", "\n".join(lines), re.MULTILINE)
    assert all("${PYTHON}" in line for line in lines if line.startswith("FROM"))
    assert [line for line in lines if line.startswith("USER")] == ["USER 1000:1000"]
    assert "RUN pip install -r requirements.lock" in lines
