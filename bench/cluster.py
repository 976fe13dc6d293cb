"""The cost of the cluster: gateway, leader and link against the bare engine in the same run.

    python -m bench.cluster [--repeats 3] [--model demo-dense] [--streams 1 8]

Bare engine and cluster alternate (A B A B) on the same prompts, one compute thread each, so that a
drifting machine hits both; the load generator is a process of its own. Also CPU time per streamed
token of gateway and leader, and the ledger of a warm start-up. With `--streams` only the comparison
of these loads, which is printed and not written.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.bare_engine import BareEngine
from bench.load import Load, LoadResult, drive
from bench.report import Row, Samples, compared, format_table, measured, write_report
from bench.running_cluster import ClusterSpec, RunningCluster, cpu_seconds
from cluster.base.plan import ModelPlan, from_json

MODELS = Path(__file__).parents[1] / "examples" / "models"
CONCURRENCIES = (1, 8, 32)
CPU_STREAMS = 64
MIN_REQUESTS = 32
PROMPT_TOKENS = 128
OUTPUT_TOKENS = 64
THINK_S = 0.02
BARE = "bare engine"
START_TARGET_S = 15.0
CPU_TARGET_US = 100.0


def main() -> None:
    """Run the benchmark and write its report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", default="demo-dense")
    parser.add_argument("--streams", type=int, nargs="+", help="only these loads; writes nothing")
    arguments = parser.parse_args()
    spec = ClusterSpec(model=arguments.model, path=MODELS / arguments.model)
    if arguments.streams:
        with RunningCluster(spec) as cluster:
            rows = comparisons(cluster, arguments.streams, arguments.repeats)
        print(format_table(rows))
        return
    print("starting once to warm the file cache ...", flush=True)
    with RunningCluster(spec):
        pass
    with RunningCluster(spec) as cluster:
        rows = list(start_rows(cluster))
        rows += comparisons(cluster, CONCURRENCIES, arguments.repeats)
        rows += cpu_rows(cluster, arguments.repeats)
    write_report(
        "cluster",
        rows,
        notes=[
            f"{arguments.model}, fp32, tp 1, one compute thread for the engine in both cases",
            f"closed loop, {PROMPT_TOKENS} prompt and {OUTPUT_TOKENS} output tokens, greedy; "
            f"clients begin evenly apart and pause {THINK_S * 1e3:.0f} ms on average",
            "TTFT added: cluster minus bare, as the median over repeats of the p50 difference",
        ],
    )


def start_rows(cluster: RunningCluster) -> list[Row]:
    """The start-up ledger."""
    total = measured("start", "command to ready", "s", Samples(values=(cluster.ready_s,)))
    rows = [
        compared(
            total, "budget", Samples(values=(START_TARGET_S,)), target=1.0, lower_is_better=True
        )
    ]
    for phase, seconds in cluster.phases_s.items():
        rows.append(measured("start", phase, "s", Samples(values=(seconds,))))
    return rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """Runs of cluster and bare engine on the same loads, in pairs."""

    case: str
    ours: tuple[LoadResult, ...]
    theirs: tuple[LoadResult, ...]

    def row(
        self,
        metric: str,
        unit: str,
        read: Callable[[LoadResult], float],
        target: float | None = None,
    ) -> Row:
        """One metric of both."""
        mine = Samples(values=tuple(read(run) for run in self.ours))
        other = Samples(values=tuple(read(run) for run in self.theirs))
        row = measured(self.case, metric, unit, mine)
        return compared(row, BARE, other, target=target, lower_is_better=unit == "ms")

    def added_ttft(self) -> Row:
        """What the cluster adds to the median time to the first token, pair by pair."""
        added = tuple(
            _p50(mine, "ttft_s") - _p50(other, "ttft_s")
            for mine, other in zip(self.ours, self.theirs, strict=True)
        )
        return measured(self.case, "TTFT p50 added (aim <= 5)", "ms", Samples(values=added))


def comparisons(cluster: RunningCluster, streams: Sequence[int], repeats: int) -> list[Row]:
    """`compare` at several loads."""
    plan = from_json(ModelPlan, cluster.plan())
    bare = BareEngine(plan)
    rows: list[Row] = []
    for concurrency in streams:
        rows += compare(cluster, bare, plan, concurrency, repeats)
    return rows


def compare(
    cluster: RunningCluster, bare: BareEngine, plan: ModelPlan, concurrency: int, repeats: int
) -> list[Row]:
    """TTFT, TPOT and tokens/s of both, alternating."""
    ours: list[LoadResult] = []
    theirs: list[LoadResult] = []
    stagger_s = 0.0
    for repeat in range(repeats + 1):
        load = _load(cluster, plan, concurrency, seed=1000 * concurrency + repeat)
        load = dataclasses.replace(load, stagger_s=stagger_s)
        results = bare.run(load), drive(load)
        stagger_s = _mean_e2e_s(results[0]) / concurrency
        if repeat:  # the first round warms both
            theirs.append(results[0])
            ours.append(results[1])
        print(f"{concurrency} streams, round {repeat}: bare {results[0].tokens_per_s:.0f}, "
              f"cluster {results[1].tokens_per_s:.0f} tokens/s", flush=True)  # fmt: skip
    pairs = Pairs(case=f"{concurrency} streams", ours=tuple(ours), theirs=tuple(theirs))
    return [
        pairs.row("tokens/s", "1/s", lambda run: run.tokens_per_s, target=0.97),
        pairs.row("TPOT p50", "ms", lambda run: _p50(run, "tpot_s")),
        pairs.row("TTFT p50", "ms", lambda run: _p50(run, "ttft_s")),
        pairs.added_ttft(),
    ]


def cpu_rows(cluster: RunningCluster, repeats: int) -> list[Row]:
    """CPU microseconds per streamed token of gateway and leader, idle share taken off."""
    plan = from_json(ModelPlan, cluster.plan())
    pids = cluster.pids()
    samples: dict[str, list[float]] = {"gateway": [], "leader": []}
    for repeat in range(repeats):
        load = _load(cluster, plan, CPU_STREAMS, seed=77_000 + repeat)
        idle = {role: _idle_rate(pids[role]) for role in samples}
        before = {role: cpu_seconds(pids[role]) for role in samples}
        started_s = time.perf_counter()
        result = drive(load)
        wall_s = time.perf_counter() - started_s
        tokens = sum(request.num_tokens for request in result.requests)
        for role, values in samples.items():
            used_s = cpu_seconds(pids[role]) - before[role] - idle[role] * wall_s
            values.append(used_s / tokens * 1e6)
    both = Samples(values=tuple(map(sum, zip(*samples.values(), strict=True))))
    case = f"{CPU_STREAMS} streams"
    rows = [
        measured(case, f"CPU of {role} per token", "us", Samples(values=tuple(values)))
        for role, values in samples.items()
    ]
    total = measured(case, "CPU of both per token", "us", both)
    budget = Samples(values=(CPU_TARGET_US,))
    return [*rows, compared(total, "budget", budget, target=1.0, lower_is_better=True)]


def _load(cluster: RunningCluster, plan: ModelPlan, concurrency: int, seed: int) -> Load:
    return Load(
        target=cluster.target,
        model=plan.name,
        concurrency=concurrency,
        num_requests=max(MIN_REQUESTS, 4 * concurrency),
        prompt_tokens=PROMPT_TOKENS,
        max_tokens=OUTPUT_TOKENS,
        vocab_size=plan.vocab_size,
        seed=seed,
        stagger_s=0.0,
        think_s=THINK_S,
    )


def _mean_e2e_s(run: LoadResult) -> float:
    return sum(request.e2e_s for request in run.requests) / len(run.requests)


def _p50(run: LoadResult, name: str) -> float:
    return Samples(values=tuple(getattr(request, name) * 1e3 for request in run.requests)).median


def _idle_rate(pids: list[int], window_s: float = 2.0) -> float:
    before_s = cpu_seconds(pids)
    time.sleep(window_s)
    return (cpu_seconds(pids) - before_s) / window_s


if __name__ == "__main__":
    main()
