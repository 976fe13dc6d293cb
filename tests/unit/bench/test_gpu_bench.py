"""The GPU benchmark, tried on the CPU: on a machine with few packages, and when things go wrong."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from bench.gpu import __main__ as program
from bench.gpu.cases import Case, Group, Lab, Setting, one
from bench.gpu.child import run_cases
from bench.report import measured
from tests.support.bare_packages import bare_python

pytest.importorskip("triton", reason="the benchmark needs triton (part of the dev extra)")

PROGRAM = ("-m", "bench.gpu", "--device", "cpu", "--tiny", "--out")
ROOT = Path(__file__).parents[3]
PACKAGES = ("torch", "triton", "transformers", "safetensors", "tokenizers", "numpy")
ABSENT = ("ray", "pydantic", "grpc", "msgspec", "deepspeed", "accelerate", "psutil")


def _run(arguments: str, tmp_path: Path):
    python = str(bare_python(PACKAGES, ABSENT, tmp_path / "environment"))
    lacks = f"import importlib.util as u; print([n for n in {ABSENT} if u.find_spec(n)])"
    found = subprocess.run([python, "-c", lacks], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
    run = subprocess.run(
        [python, *PROGRAM, str(tmp_path), *arguments.split()],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    report = tmp_path / "gpu.json"
    return run, json.loads(report.read_text()) if report.is_file() else {}


@pytest.mark.timeout(400)
def test_it_runs_with_few_packages(tmp_path: Path) -> None:
    """Every group, but not each of its cases: the interpreter of Triton is slow."""
    rows = "device|bf16-|fp8-decode-1$|experts-1$|transformers|offload"
    run, report = _run(f"--batches 1 2 --steps 3 --rows {rows}", tmp_path)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-3000:]
    cases = {row["case"] for row in report["rows"]}
    for case in (
        "device",
        "tiny bf16 decode 1",
        "tiny bf16 decode 2",
        "tiny bf16 prefill 40",
        "tiny bf16 steps without a host sync",
        "tiny fp8 decode 1",
        "tiny decode 2 transformers, compiled",
        "8 experts, 1 tokens",
        "offload float32, batch 1",
        "offload int4, batch 1",
    ):
        assert case in cases
    against = " / ".join(row["against"] for row in report["rows"])
    for part in (
        "memory roofline",
        "transformers, compiled",
        "accelerate is not installed",
        "deepspeed is not installed",
    ):
        assert part in against
    assert report["notes"] == []


def _setting(size: str = "1b") -> Setting:
    return Setting(
        size=size,
        dtype="float32",
        device="cpu",
        batches=(1,),
        steps=1,
        repeats=1,
        prompt_tokens=4,
        prefill_tokens=4,
        offload_layers=1,
    )


def _rows(lab: Lab):
    lab.facts["seen"] = 1.0
    yield measured("a", "b", "c", one(2.0))


def _broken(lab: Lab):
    yield measured("half", "b", "c", one(3.0))
    raise RuntimeError("the other half")


def test_a_case_that_fails_costs_only_itself(tmp_path: Path) -> None:
    cases = [
        Case(name="broken", about_s=0.1, run=_broken),
        Case(name="long", about_s=1e6, run=_rows),
        Case(name="sound", about_s=0.1, run=_rows),
    ]
    run_cases(cases, _setting(), {}, tmp_path / "lines", budget_s=100.0)
    lines = [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()]
    told = {line["case"]: line for line in lines if not line.get("begun")}
    assert "the other half" in told["broken"]["error"]
    assert told["broken"]["rows"][0]["ours"] == 3.0
    assert "needs about 1000000 s" in told["long"]["skipped"]
    assert told["sound"]["rows"][0]["ours"] == 2.0
    assert told["sound"]["facts"] == {"seen": 1.0}


def test_a_process_that_dies_costs_only_its_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent(setting: Setting) -> list[Case]:
        raise ImportError("no such package")

    sound = next(group for group in program._groups() if group.name == "device")
    monkeypatch.setattr(program, "_groups", lambda: [Group(name="gone", cases=absent), sound])
    arguments = ["--device", "cpu", "--tiny", "--rows", "device-read", "--out", str(tmp_path)]
    # The child has the true groups, where "gone" is none: its process ends with an error.
    assert program.main(arguments) == 1
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert [row["metric"] for row in report["rows"]] == ["memory"]
    assert report["notes"] == ["gone: failed: its process ended with 1"]
    assert "device-read" in capsys.readouterr().out
