"""Triton's kernels compile for real GPUs and fit them, found out without one.

The interpreter checks numbers, not whether the compiler takes a kernel, nor what it needs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.base.env import default_cache_dir

pytest.importorskip("triton", reason="Triton's kernels need triton (part of the dev extra)")

ROOT = Path(__file__).parents[3]
# Shared memory that one block may have: A100, H100.
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
# Registers that did not fit may go out and in around a segment, not around a tile.
SPILLED_BYTES = 512


@pytest.fixture(scope="module", params=list(SHARED_BYTES))
def launches(
    request: pytest.FixtureRequest,
) -> tuple[int, list[dict[str, Any]]]:
    """The architecture, and all launches compiled for it."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # What has been compiled before is looked at again, not compiled again.
    environment["TRITON_CACHE_DIR"] = str(default_cache_dir() / "triton")
    run = subprocess.run(
        [sys.executable, "-m", "tests.support.triton_ahead", str(request.param)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return request.param, json.loads(run.stdout)


def test_every_launch_fits_the_device(launches: tuple[int, list[dict[str, Any]]]) -> None:
    arch, compiled = launches
    # A100s have no fp8: select_kernels refuses it there.
    fp8 = {"quantise_rows_kernel"} if arch >= 89 else set()
    assert {launch["kernel"] for launch in compiled} == fp8 | {
        "attend_kernel",
        "merge_kernel",
        "write_slots_kernel",
        "add_rms_norm_kernel",
        "silu_mul_kernel",
        "prepare_heads_kernel",
        "expert_gate_kernel",
        "expert_down_kernel",
        "expert_sum_kernel",
    }
    for launch in compiled:
        assert launch["shared_bytes"] <= SHARED_BYTES[arch], launch
        assert launch["stack_bytes"] <= SPILLED_BYTES, launch


def test_prompts_and_decodes_add_with_the_same_instructions(
    launches: tuple[int, list[dict[str, Any]]],
) -> None:
    """Or a token's bits would depend on how it came: as part of a chunk, or alone."""
    arch, compiled = launches
    by_case: dict[str, dict[bool, list[str]]] = {}
    for launch in compiled:
        if launch["kernel"] == "attend_kernel":
            ways = by_case.setdefault(launch["case"], {})
            ways[launch["constants"]["SPLIT"]] = launch["matrix_instructions"]
    assert len(by_case) == 7
    for case, ways in by_case.items():
        assert ways[True] == ways[False], case
        assert ways[True], case
    if arch == 90:
        assert all("wgmma" in name for name in by_case["llama torch.bfloat16"][True])
