"""Starts the children of `bench.offload`: each alone, in the cgroup, on a cold page cache."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.memory_cgroup import MemoryCgroup
from bench.offload_child import BatchResult, ChildResult, ChildTask
from offload.compression import Compression
from offload.homes import Placement
from offload.precision import Precision

TIMEOUT_S = 150.0
_ATTEMPTS = 3
ACCELERATE = "accelerate==1.15.0"


def install_accelerate(cache_dir: Path) -> Path | None:
    """A folder that holds Accelerate alone; None when it cannot be had."""
    target = cache_dir / "peers" / "accelerate"
    if not (target / "accelerate").is_dir():
        command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(target)]
        done = subprocess.run([*command, ACCELERATE], capture_output=True, check=False)
        if done.returncode:
            return None
    return target


@dataclass(kw_only=True)
class Runner:
    """Runs children and keeps what they left behind; `notes` are for the report."""

    task: ChildTask
    cgroup: MemoryCgroup
    stores: Mapping[tuple[Precision, Compression], Path]
    compression: Compression
    """Of native records that ours streams, as its planner would have them."""
    accelerate: Path | None
    limit_bytes: int
    notes: list[str] = field(default_factory=list)
    peak_bytes: int = 0
    """Largest peak of ours under the common limit."""

    def run(
        self,
        engine: str,
        batches: Sequence[int] = (),
        precision: Precision = Precision.NATIVE,
        *,
        limit_bytes: int | None = None,
        placement: Placement | None = None,
    ) -> ChildResult | None:
        """One child from start to end; None, and a note, when it failed.

        Args:
            limit_bytes: of memory; None: the limit of all.
            placement: what ours keeps and how it streams; None: as `all_streaming`.
        """
        if engine == "accelerate_disk" and self.accelerate is None:
            self._note("Accelerate could not be installed")
            return None
        compression = self.compression_of(engine, precision)
        placement = placement or all_streaming(precision, compression)
        folder = self.stores[precision, compression]
        task = dataclasses.replace(
            self.task,
            engine=engine,
            folder=str(folder),
            cgroup_procs=str(self.cgroup.procs),
            batches=tuple(batches) or self.task.batches,
            precision=precision.value,
            compression=compression.value,
            resident_layers=placement.resident_layers,
            held_bytes=placement.held_bytes,
            ring_slots=placement.ring_slots,
            # Against peers the engine is cold, and they have but one run too.
            attempts=_ATTEMPTS if batches else 1,
        )
        for path in (*folder.glob("*.weights"), *Path(task.checkpoint).iterdir()):
            _drop_cache(path)
        self.cgroup.reset()
        self.cgroup.limit(limit_bytes or self.limit_bytes)
        print(f"{engine} ...", flush=True)
        outcome = self._child(task)
        peak, hits = self.cgroup.peak_bytes(), self.cgroup.num_hits()
        if engine == "ours" and limit_bytes in (None, self.limit_bytes):
            self.peak_bytes = max(self.peak_bytes, peak)
        if isinstance(outcome, str):
            self._note(f"{engine} failed: {outcome}")
            return None
        self._note(
            f"{engine}, {precision.value}, compression {compression.value}: peak "
            f"{peak / 1e6:.0f} MB, memory limit met {hits} times"
        )
        return outcome

    def compression_of(self, engine: str, precision: Precision) -> Compression:
        """Only ours decodes what it reads; codes get no smaller."""
        native = engine == "ours" and precision is Precision.NATIVE
        return self.compression if native else Compression.NONE

    def _child(self, task: ChildTask) -> ChildResult | str:
        path = [str(Path.cwd())]
        # Only for the one: transformers changes what it does where it finds it.
        if task.engine == "accelerate_disk":
            path.append(str(self.accelerate))
        env = {
            **os.environ,  # the bench's own environment, handed on
            "PYTHONPATH": os.pathsep.join(path),
            "OMP_NUM_THREADS": str(task.threads),
        }
        command = [sys.executable, "-m", "bench.offload_child"]
        try:
            done = subprocess.run(
                command,
                input=json.dumps(dataclasses.asdict(task)),
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
                env=env,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"took longer than {TIMEOUT_S:.0f} s"
        lines = done.stdout.strip().splitlines()
        if done.returncode or not lines:
            last = done.stderr.strip().splitlines()[-1:] or [""]
            return f"exit status {done.returncode} {last[0]}".strip()
        return _result(lines[-1])

    def _note(self, text: str) -> None:
        """Once for each different text; counts differ from run to run, so the last one stays."""
        head = text.partition(":")[0]
        self.notes[:] = [note for note in self.notes if not note.startswith(f"{head}:")]
        self.notes.append(text)


def all_streaming(precision: Precision, compression: Compression) -> Placement:
    """No layer in memory, through three slots; one more to decode in."""
    return Placement(
        resident_layers=0,
        host_layers=0,
        precision=precision,
        compression=compression,
        ring_slots=3 if compression is Compression.NONE else 4,
    )


def _result(line: str) -> ChildResult:
    data = json.loads(line)
    batches = tuple(
        BatchResult(
            **{
                **batch,
                "step_s": tuple(batch["step_s"]),
                "token_ids": tuple(tuple(row) for row in batch["token_ids"]),
            }
        )
        for batch in data["batches"]
    )
    return ChildResult(**{**data, "batches": batches})


def _drop_cache(path: Path) -> None:
    if not path.is_file():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fdatasync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
