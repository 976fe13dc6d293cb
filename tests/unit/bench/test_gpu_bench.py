"""The GPU benchmark runs on a machine that has torch and little else."""

from __future__ import annotations

import subprocess
import sys

ABSENT = ("ray", "pydantic", "grpc", "msgspec", "yaml", "starlette", "deepspeed", "click", "rich")
PROGRAM = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
from bench.gpu.__main__ import main
sys.exit(main("--device cpu --size tiny --dtype float32 --kernels off --no-peer "
              "--batches 1 3 --steps 8 --repeats 1".split()))
"""


def test_it_runs_without_the_cluster_around_it() -> None:
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
    for part in ("tiny torch decode 1", "tiny torch decode 3", "prefill 2048", "memory roofline"):
        assert part in run.stdout
