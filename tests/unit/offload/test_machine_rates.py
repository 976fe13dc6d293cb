"""Rates are measured once, kept by fingerprint, and never made up."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from offload_shapes import machine

from cluster.base.env import default_cache_dir
from cluster.base.errors import ConfigError
from offload import probe, probe_disk, probe_products
from offload.machine_rates import (
    DEADLINE_S,
    RatesRequest,
    machine_rates,
    rates_from_json,
    rates_to_json,
)
from offload.probe_clock import Probe
from replicas.kernels.select import select_kernels

REQUEST = RatesRequest(device="cpu", num_threads=2, dtype="bfloat16", disk=Path("/tmp"))
RATES = machine()


class FakeProbe:
    """Answers with the rates, after lines that a library might print."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []

    def __call__(self, command: Sequence[str], timeout_s: float) -> str:
        assert timeout_s == DEADLINE_S
        self.commands.append(list(command))
        return f"some library says hello\n{json.dumps(rates_to_json(RATES))}\n"


def test_measured_once_for_each_fingerprint(tmp_path: Path) -> None:
    run = FakeProbe()
    for _ in range(2):
        assert machine_rates(REQUEST, tmp_path, run) == RATES
    assert len(run.commands) == 1
    assert run.commands[0][1:] == [
        "-m",
        "offload.probe",
        "--device=cpu",
        "--threads=2",
        "--dtype=bfloat16",
        "--disk=/tmp",
    ]
    machine_rates(replace(REQUEST, num_threads=3), tmp_path, run)
    assert len(run.commands) == 2


def test_a_damaged_entry_is_measured_again(tmp_path: Path) -> None:
    run = FakeProbe()
    machine_rates(REQUEST, tmp_path, run)
    (entry,) = (tmp_path / "rates").iterdir()
    for damage in ("", "{}", '{"gemm": []}', entry.read_text().replace("3000000000", "-1")):
        entry.write_text(damage)
        assert machine_rates(REQUEST, tmp_path, run) == RATES
    assert len(run.commands) == 5


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path: Path) -> None:
    (tmp_path / "rates").write_text("a file")
    assert machine_rates(REQUEST, tmp_path, FakeProbe()) == RATES


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (subprocess.TimeoutExpired("probe", DEADLINE_S), "took longer than 60 s"),
        (subprocess.CalledProcessError(1, "probe", stderr="Traceback\nOSError: full"), "full"),
        (OSError("no python"), "no python"),
    ],
)
def test_a_probe_that_fails_is_an_error_with_its_cause(
    tmp_path: Path, error: Exception, told: str
) -> None:
    def run(command: Sequence[str], timeout_s: float) -> str:
        raise error

    with pytest.raises(ConfigError, match=told):
        machine_rates(REQUEST, tmp_path, run)


def test_output_that_is_no_rates_is_an_error(tmp_path: Path) -> None:
    for output in ("", "[]", "nan", '{"gemm": [{"tokens": 1}]}'):
        with pytest.raises(ConfigError, match="could not be measured"):
            machine_rates(REQUEST, tmp_path, lambda *_, output=output: output)


def test_the_probe_measures_everything_it_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe_disk, "FILE_BYTES", 4 << 20)
    monkeypatch.setattr(probe_products, "WEIGHT_SHAPE", (256, 128))
    for name in ("COPY_BYTES", "READ_BYTES"):
        monkeypatch.setattr(probe, name, 1 << 20)
    kernels = select_kernels("auto", torch.bfloat16, "cpu", default_cache_dir() / "kernels")
    device = torch.device("cpu")
    asked = Probe(device=device, dtype=torch.bfloat16, kernels=kernels)
    rates = probe.measure(asked, tmp_path)
    assert rates_from_json(json.loads(json.dumps(rates_to_json(rates)))) == rates
    for points in (rates.gemm, rates.int8_gemm, rates.int4_gemm):
        assert [point.tokens for point in points] == list(probe_products.GEMM_TOKENS)
    assert 0 <= rates.compute_lost_to_reads < 1
    assert rates.part_overhead_s > 0
    assert rates.kv_copy_bytes_per_s > 0
    assert not list(tmp_path.iterdir())
