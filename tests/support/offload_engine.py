"""Offload replicas for tests: plans over a checkpoint, and readers that fail on purpose."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cluster.base.env import default_cache_dir
from cluster.base.errors import WeightStreamError
from cluster.base.plan import OffloadPlan
from offload.assembly import model_adapter, streamed_weights
from offload.readers.engine import ReadEngine, ReadTimeoutError
from offload.runtime import Runtime
from replicas.engine.sync_engine import SyncEngine
from replicas.models.hf_config import arch_from_hf
from replicas.models.weight_units import weight_units
from replicas.worker.assembly import WeightsFactory
from tests.support.in_process_engine import in_process_engine

PLENTY = 2**30


def offload_plan(disk: Path, **changes: Any) -> OffloadPlan:
    """Everything streams, nothing is short; poisoned and always verified in tests."""
    fields = {
        "disk_path": str(disk),
        "device_bytes": PLENTY,
        "host_bytes": 0,
        "workspace_bytes": 0,
        "reader": "buffered",
        "verify": "always",
        "read_timeout_s": 20.0,
    }
    return OffloadPlan(**(fields | changes))


def poisoned(**changes: Any) -> Runtime:
    """A runtime that overwrites what was released."""
    return Runtime(cache_dir=default_cache_dir(), poison=True, **changes)


def weights_of(plan: OffloadPlan, **changes: Any) -> WeightsFactory:
    return streamed_weights(plan, poisoned(**changes))


def offload_engine(path: Path, plan: OffloadPlan, **limits: Any) -> SyncEngine:
    """The engine over streamed weights of the checkpoint at `path`."""
    return in_process_engine(
        path,
        weights_factory=weights_of(plan),
        adapt_model=model_adapter(plan, poisoned()),
        **limits,
    )


def unit_names(path: Path) -> list[str]:
    arch = arch_from_hf(json.loads((path / "config.json").read_text()))
    return [unit.name for unit in weight_units(arch, 0, 1)]


@dataclass
class FaultyEngine:
    """Passes everything on, except that read number `at` (from 0) and later ones go wrong.

    `kind`: error (wait raises), short (the second half is never written), flip (one bit).
    """

    inner: ReadEngine
    kind: str
    at: int = 0
    times: int = 10**9
    byte: int = 100
    name: str = "faulty"
    num_reads: int = 0
    faulty: dict[int, torch.Tensor] = field(default_factory=dict)

    def allocate(self, num_bytes: int) -> torch.Tensor:
        return self.inner.allocate(num_bytes)

    def submit(self, slot: int, buffer: torch.Tensor, offset: int) -> None:
        number, self.num_reads = self.num_reads, self.num_reads + 1
        self.faulty.pop(slot, None)
        if self.at <= number < self.at + self.times:
            self.faulty[slot] = buffer
            if self.kind == "short":
                buffer = buffer[: buffer.numel() // 2]
        self.inner.submit(slot, buffer, offset)

    def wait(self, slot: int, timeout_s: float) -> None:
        self.inner.wait(slot, timeout_s)
        if slot not in self.faulty:
            return
        if self.kind == "error":
            raise WeightStreamError("Input/output error.")
        if self.kind == "flip":
            self.faulty[slot][self.byte] ^= 4

    def close(self) -> None:
        self.inner.close()


@dataclass
class HeldEngine:
    """Passes everything on, but no read ends before `may_end` is set."""

    inner: ReadEngine
    may_end: threading.Event = field(default_factory=threading.Event)
    name: str = "held"
    num_reads: int = 0
    num_ended: int = 0
    is_closed: bool = False

    def allocate(self, num_bytes: int) -> torch.Tensor:
        return self.inner.allocate(num_bytes)

    def submit(self, slot: int, buffer: torch.Tensor, offset: int) -> None:
        self.num_reads += 1
        self.inner.submit(slot, buffer, offset)

    def wait(self, slot: int, timeout_s: float) -> None:
        if not self.may_end.wait(timeout_s):
            raise ReadTimeoutError("Held.")
        self.inner.wait(slot, timeout_s)
        self.num_ended += 1

    def close(self) -> None:
        self.is_closed = True
        self.inner.close()
