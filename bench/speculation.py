"""Prompt-lookup speculation on a streamed model at batch 1: the same tokens in fewer steps.

    python -m bench.speculation [--rounds 3] [--tokens 64] [--layers 64]

The demo model, made deep with layers that add nothing (`deepened_checkpoint.py`), streams all its
layers from disk past the page cache. Two engines take turns, one with drafts, one without; equal
tokens are asserted. Prompts are of three kinds: text that goes on as it began, text that half
does, and text that does not.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from bench.deepened_checkpoint import deepened_checkpoint
from bench.report import Row, Samples, compared, measured, write_report
from cluster.base.env import default_cache_dir
from cluster.base.plan import OffloadPlan
from cluster.dist.communicator import SingleRank
from offload.assembly import streamed_weights
from offload.runtime import Runtime
from replicas.api import GenerationRequest, SamplingParams
from replicas.engine.scheduler import Scheduler
from replicas.engine.scheduler_config import SchedulerConfig
from replicas.engine.speculation import SpeculationConfig
from replicas.engine.sync_engine import SyncEngine
from replicas.worker.assembly import RankSpec, build_runner
from replicas.worker.in_process_executor import InProcessExecutor

DEMO = Path(__file__).parents[1] / "examples" / "models" / "demo-dense"
SPECULATION = SpeculationConfig(num_tokens=16)
TARGET = 1.5
_NAMES = ("name", "path", "size", "kind", "value", "mode")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One prompt; `copies` says whether its continuation repeats it."""

    name: str
    prompt: str
    copies: bool
    temperature: float = 0.0


CASES = (
    Case(name="constants", prompt="".join(f"    CODE_{i} = {i}\n" for i in range(14)), copies=True),
    Case(name="table rows", prompt="    (0, 1, 2, 3),\n" * 12, copies=True),
    Case(
        name="assignments",
        prompt="".join(f"        self.{name} = {name}\n" for name in _NAMES) * 3,
        copies=True,
    ),
    Case(name="imports", prompt="import os\nimport sys\nimport re\n\n" * 5, copies=True),
    Case(
        name="imports, seeded",
        prompt="import os\nimport sys\nimport re\n\n" * 5,
        copies=True,
        temperature=0.3,
    ),
    Case(
        name="properties",
        prompt="".join(
            f"    @property\n    def {name}(self):\n        return self._{name}\n\n"
            for name in _NAMES
        ),
        copies=False,
    ),
    Case(
        name="new code, seeded",
        prompt="class Reader:\n    def __init__(self, path):\n",
        copies=False,
        temperature=0.7,
    ),
)


def main() -> None:
    """Run the benchmark and write its report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--layers", type=int, default=64)
    arguments = parser.parse_args()
    load_before = os.getloadavg()[0]
    models = default_cache_dir() / "bench-models"
    models.mkdir(parents=True, exist_ok=True)
    path = deepened_checkpoint(DEMO, models / f"demo-deep-{arguments.layers}", arguments.layers)
    bench = Bench(path, models / "speculation-stores", arguments.tokens)
    for _ in range(arguments.rounds):
        for case in CASES:
            bench.run(case)
    write_report("speculation", bench.rows(), notes=[*bench.notes(), _load(load_before)])


def _load(before: float) -> str:
    return f"load average {before:.1f} before, {os.getloadavg()[0]:.1f} after (includes the bench)"


class Bench:
    """Both engines, and what they took."""

    def __init__(self, path: Path, disk: Path, num_tokens: int) -> None:
        self._num_tokens = num_tokens
        self._tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        self._plain = streamed_engine(path, disk, None)
        self._drafting = streamed_engine(path, disk, SPECULATION)
        self._speeds: dict[tuple[str, bool], list[float]] = {}
        self._steps: dict[tuple[str, bool], int] = {}
        self._drafts: dict[str, tuple[int, int]] = {}
        self._path = path
        self._runs = 0

    def run(self, case: Case) -> None:
        """Both engines once, in an order that changes from run to run.

        Raises:
            RuntimeError: they said different things.
        """
        order = (False, True) if self._runs % 2 else (True, False)
        self._runs += 1
        tokens = {drafts: self._generate(case, drafts=drafts) for drafts in order}
        if tokens[True] != tokens[False]:
            raise RuntimeError(f"{case.name}: drafts changed the tokens")

    def _generate(self, case: Case, *, drafts: bool) -> list[int]:
        engine = self._drafting if drafts else self._plain
        request = GenerationRequest(
            request_id=f"{case.name}-{self._runs}",
            prompt_token_ids=tuple(self._tokenizer.encode(case.prompt).ids),
            params=SamplingParams(
                temperature=case.temperature,
                seed=1,
                max_tokens=self._num_tokens,
                ignore_eos=True,
            ),
        )
        before, steps = engine.stats, engine.times.num_steps
        engine.add(request)
        tokens: list[int] = []
        first_s = 0.0
        for delta in engine.run():
            # The first token is the prompt's time, which drafts do not change.
            first_s = first_s or time.perf_counter()
            tokens += delta.token_ids
        speed = (len(tokens) - 1) / (time.perf_counter() - first_s)
        self._speeds.setdefault((case.name, drafts), []).append(speed)
        self._steps[case.name, drafts] = engine.times.num_steps - steps
        if drafts:
            after = engine.stats
            self._drafts[case.name] = (
                after.draft_tokens - before.draft_tokens,
                after.accepted_draft_tokens - before.accepted_draft_tokens,
            )
        return tokens

    def rows(self) -> list[Row]:
        """A line per case."""
        rows = []
        for case in CASES:
            ours, theirs = (
                Samples(values=tuple(self._speeds[case.name, drafts])) for drafts in (True, False)
            )
            rows.append(
                compared(
                    measured(case.name, "tokens/s at batch 1", "1/s", ours),
                    "without drafts",
                    theirs,
                    target=TARGET if case.copies else None,
                )
            )
        return rows

    def notes(self) -> list[str]:
        """What was measured, and how drafts fared."""
        size = sum(file.stat().st_size for file in self._path.glob("*.safetensors"))
        fared = "; ".join(
            f"{name}: {self._steps[name, True]} steps instead of {self._steps[name, False]}, "
            f"{accepted} of {drafted} drafted tokens right"
            for name, (drafted, accepted) in self._drafts.items()
        )
        return [
            f"demo-dense with silent layers, bf16, {size / 1e6:.0f} MB, every layer streamed from "
            f"disk in each step; one thread; {self._num_tokens} tokens; equal tokens asserted",
            f"up to {SPECULATION.num_tokens} drafted tokens, n-grams of {SPECULATION.min_ngram} "
            f"to {SPECULATION.max_ngram}",
            fared,
        ]


def streamed_engine(path: Path, disk: Path, speculation: SpeculationConfig | None) -> SyncEngine:
    """An engine over a checkpoint that streams every unit."""
    torch.set_num_threads(1)
    limits = SchedulerConfig(
        max_running_requests=4,
        max_step_tokens=256,
        max_context=512,
        block_size=16,
        num_blocks=64,
        prefix_caching=False,
        speculation=speculation,
    )
    spec = RankSpec(
        model_path=str(path),
        dtype="bfloat16",
        kv_dtype="bfloat16",
        block_size=limits.block_size,
        num_blocks=limits.num_blocks,
        max_context=limits.max_context,
    )
    plan = OffloadPlan(disk_path=str(disk), device_bytes=1 << 30, host_bytes=0, workspace_bytes=0)
    runner = build_runner(
        spec,
        SingleRank(),
        torch.device("cpu"),
        weights_factory=streamed_weights(plan, Runtime(cache_dir=default_cache_dir())),
    )
    return SyncEngine(Scheduler(limits), InProcessExecutor(runner))


if __name__ == "__main__":
    main()
