"""`penstock plan` and `penstock pack` for models whose weights are streamed."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner, Result

from cluster.base.plan import ClusterPlan, from_json
from cluster.cli.main import cli
from offload.layout import read_store
from offload.rates import GemmPoint, Rates

DEMO = Path(__file__).parents[3] / "examples" / "models" / "demo-dense"
RATES = Rates(
    disk_bytes_per_s=3e9,
    link_bytes_per_s=20e9,
    memory_bytes_per_s=40e9,
    gemm=(GemmPoint(tokens=1, flops_per_s=20e9), GemmPoint(tokens=64, flops_per_s=500e9)),
    int8_gemm=(GemmPoint(tokens=1, flops_per_s=8e9), GemmPoint(tokens=64, flops_per_s=400e9)),
    int4_gemm=(GemmPoint(tokens=1, flops_per_s=9e9), GemmPoint(tokens=64, flops_per_s=400e9)),
)


@pytest.fixture
def cluster_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The demo model in a budget smaller than its weights."""
    monkeypatch.setattr("cluster.planner.streaming.machine_rates", lambda *_: RATES)
    file = tmp_path / "cluster.yaml"
    file.write_text(
        f"""
models:
  - name: demo
    path: {DEMO}
    dtype: float32
    limits: {{max_context: 256, max_step_tokens: 16, max_running_requests: 4}}
    offload: {{device_memory: 8MiB, disk_path: disk, ring_slots: 2}}
"""
    )
    return file


def run(*args: object) -> Result:
    return CliRunner().invoke(cli, [str(arg) for arg in args])


def test_plan_tells_tiers_and_speed(cluster_file: Path) -> None:
    result = run("plan", cluster_file, "--explain")
    assert result.exit_code == 0, result.stderr
    for words in ("offload", "Predicted speed", "DISK EACH STEP", "Batch against speed: demo"):
        assert words in result.stdout
    assert "served by an offload replica" in result.stderr


def test_plan_draws_the_frontier(cluster_file: Path, tmp_path: Path) -> None:
    drawing = tmp_path / "frontier.svg"
    assert run("plan", cluster_file, "--plot", drawing).exit_code == 0
    root = ElementTree.fromstring(drawing.read_text())
    plan = from_json(ClusterPlan, json.loads(run("plan", cluster_file, "--json").stdout))
    speed = plan.models[0].speed
    circles = root.findall(".//{http://www.w3.org/2000/svg}circle")
    assert len(circles) == len({*speed.frontier, speed.chosen})
    titles = [circle[0].text for circle in circles]
    assert all("at a time, cache device" in title for title in titles)


def test_a_drawing_of_nothing_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "whole.yaml"
    file.write_text(f"models:\n  - name: demo\n    path: {DEMO}\n")
    result = run("plan", file, "--plot", tmp_path / "x.svg")
    assert result.exit_code == 2
    assert "nothing to draw" in result.stderr
    result = run("pack", file)
    assert result.exit_code == 2
    assert "nothing to pack" in result.stderr


def test_pack_writes_the_store_of_the_file(cluster_file: Path, tmp_path: Path) -> None:
    result = run("pack", cluster_file)
    assert result.exit_code == 0, result.stderr
    (store,) = (tmp_path / "disk").glob("*.weights")
    assert str(store) in result.stdout
    assert read_store(store).model == str(DEMO)
    written = store.stat().st_mtime_ns
    assert run("pack", cluster_file).exit_code == 0
    assert store.stat().st_mtime_ns == written


def test_pack_of_one_checkpoint_with_quantised_ranks(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("pack", "--model", DEMO, "--out", out, "--precision", "int4", "--tp", 2)
    assert result.exit_code == 0, result.stderr
    stores = [read_store(path) for path in sorted(out.glob("*.weights"))]
    assert len(stores) == 2
    assert any(tensor.name.endswith(".int4") for tensor in stores[0].by_name["layer.0"].tensors)


@pytest.mark.parametrize(
    "arguments",
    [(), ("x.yaml", "--model", "y"), ("--model", "y"), ("x.yaml", "--precision", "int8")],
)
def test_pack_says_what_belongs_together(arguments: tuple[str, ...]) -> None:
    result = run("pack", *arguments)
    assert result.exit_code == 2
    assert "Error:" in result.stderr
