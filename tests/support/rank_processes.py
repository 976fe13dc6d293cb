"""Runs one function in several real processes, one per rank, with a deadline on everything.

The function takes `(communicator, **arguments)` and returns something JSON can carry; a rank that
should die may simply exit.
"""

from __future__ import annotations

import importlib
import json
import tempfile
import time
import traceback
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from cluster.base.errors import PenstockError
from cluster.dist.rendezvous import Rendezvous, pick_port
from tests.support.rank_forks import start_rank


@dataclass(frozen=True, slots=True, kw_only=True)
class RankResult:
    """How one rank ended."""

    exit_code: int
    value: Any = None
    error: dict[str, Any] | None = None
    """`PenstockError.to_dict()` if the function raised one."""
    duration_s: float = 0.0
    log: str = ""


def run_ranks(
    function: str,
    size: int,
    *,
    deadline_s: float = 120.0,
    timeout_s: float = 60.0,
    **arguments: Any,
) -> list[RankResult]:
    """Run `module:function` on `size` ranks; kills what is left at the deadline."""
    with tempfile.TemporaryDirectory() as scratch:
        port = pick_port("127.0.0.1")
        children = []
        for rank in range(size):
            job = {
                "function": function,
                "rank": rank,
                "size": size,
                "port": port,
                "timeout_s": timeout_s,
                "arguments": arguments,
                "result": f"{scratch}/{rank}.json",
            }
            log = Path(scratch, f"{rank}.log")
            children.append((start_rank(_child, job, log=log), log, Path(job["result"])))
        give_up = time.monotonic() + deadline_s
        for child, _, _ in children:
            child.join(max(0.1, give_up - time.monotonic()))
        return [_collect(*child) for child in children]


def _collect(child: ForkServerProcess, log: Path, result: Path) -> RankResult:
    if child.is_alive():
        child.kill()
        child.join()
    text = log.read_text() if log.exists() else ""
    fields = json.loads(result.read_text()) if result.exists() else {}
    assert child.exitcode is not None
    return RankResult(exit_code=child.exitcode, log=text, **fields)


def values(results: list[RankResult]) -> list[Any]:
    """What every rank returned; fails with the log of a rank that did not."""
    for rank, result in enumerate(results):
        assert result.exit_code == 0, f"rank {rank} ended with {result.exit_code}:\n{result.log}"
        assert result.error is None, f"rank {rank}: {result.error}"
    return [result.value for result in results]


def _child(job: dict[str, Any]) -> None:
    import torch  # the parent has no need of it

    from cluster.dist.torch_communicator import TorchCommunicator

    torch.set_num_threads(1)
    module, _, name = job["function"].partition(":")
    function = getattr(importlib.import_module(module), name)
    fields: dict[str, Any] = {}
    begin = time.monotonic()
    try:
        communicator = TorchCommunicator(
            rank=job["rank"],
            size=job["size"],
            backend="gloo",
            rendezvous=Rendezvous(host="127.0.0.1", port=job["port"], connect_timeout_s=30.0),
            timeout_s=job["timeout_s"],
        )
        begin = time.monotonic()
        fields["value"] = function(communicator, **job["arguments"])
    except PenstockError as error:
        traceback.print_exc()
        fields["error"] = error.to_dict()
    fields["duration_s"] = time.monotonic() - begin
    Path(job["result"]).write_text(json.dumps(fields))
