"""What `bench.offload` makes of its children's results: rows of ours against each peer."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.offload_child import BatchResult, ChildResult
from bench.offload_run import Runner
from bench.report import Row, Samples, compared, measured, not_measured
from offload.compression import Compression
from offload.cost_model import PassLoad, pass_time
from offload.homes import Placement
from offload.model_shape import ModelShape
from offload.precision import Precision
from offload.rates import Rates
from offload.search_space import Budgets, Choices, Demand, placements

BATCH = 8
"""Rows against peers."""
RESIDENT_LAYERS = 6
"""What the limit leaves room for beside three slots, engine and Python; against peers, which use
the same memory their own way. How ours uses it `Setting.keeping` finds."""
WIDE_RESIDENT_LAYERS = 17
"""The same under `WIDE_LIMIT_BYTES`."""
WIDE_LIMIT_BYTES = 2600 * 10**6
"""The least that DeepSpeed runs in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """Somebody else who streams."""

    name: str
    target: float | None
    """The ratio to reach."""
    is_wide: bool = False
    """It runs under `WIDE_LIMIT_BYTES`: everybody's limit is too little for it."""


PEERS: Mapping[str, Peer] = {
    "mapped": Peer(name="mapped store, same engine", target=1.4),
    "deepspeed_zero3": Peer(name="DeepSpeed ZeRO-3 NVMe, limit 2600 MB", target=2.5, is_wide=True),
    "zero3_provider": Peer(
        name="our provider deepspeed-zero3, limit 2600 MB", target=None, is_wide=True
    ),
    "accelerate_disk": Peer(name="Accelerate disk offload", target=5.0),
}
"""By the engine of `bench.offload_engines`. DeepSpeed is killed under less memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What all cases share."""

    shape: ModelShape
    rates: Rates
    limit_bytes: int
    context_tokens: int
    compression: Compression
    """Of native records, as the planner would have them."""

    def keeping(self, layers: int) -> Placement:
        """The fastest use of the memory of three slots and `layers` layers, as a planner finds it:
        layers that stay, or parts of the records of all of them."""
        load = PassLoad(rows=BATCH, context_tokens=self.context_tokens)
        budgets = Budgets(device_bytes=0, workspace_bytes=0, host_bytes=0, host_holds_weights=False)
        choices = Choices(compressions=(self.compression,), may_hold=True)
        demand = Demand(max_rows=BATCH, context_tokens=0, max_context=0)
        room = Placement(resident_layers=layers, host_layers=0).weight_bytes(self.shape)
        uses = [
            use
            for use in placements(self.shape, budgets, demand, choices)
            if use.fixed_resident and use.weight_bytes(self.shape) <= room
        ]
        return min(uses, key=lambda use: pass_time(self.shape, use, self.rates, load).total_s)

    def compression_of(self, precision: Precision) -> Compression:
        """Codes get no smaller."""
        return self.compression if precision is Precision.NATIVE else Compression.NONE


def peer_rows(runner: Runner, engine: str, rounds: int, setting: Setting) -> list[Row]:
    """The same batch by ours and a peer, in turn."""
    peer = PEERS[engine]
    limit_bytes = WIDE_LIMIT_BYTES if peer.is_wide else None
    ours: list[ChildResult] = []
    theirs: list[ChildResult] = []
    wide: list[ChildResult] = []
    for _ in range(rounds):
        if (result := runner.run("ours", placement=setting.keeping(RESIDENT_LAYERS))) is not None:
            ours.append(result)
        if (result := runner.run(engine, limit_bytes=limit_bytes)) is not None:
            theirs.append(result)
        if peer.is_wide:
            result = runner.run(
                "ours",
                limit_bytes=limit_bytes,
                placement=setting.keeping(WIDE_RESIDENT_LAYERS),
            )
            wide += [] if result is None else [result]
    label = f"{engine}: batch {ours[0].batches[0].rows}, model twice the memory"
    row = measured(label, "rate", "tok/s", rates_of([run.batches[0] for run in ours]))
    if not theirs:
        return [not_measured(row, peer.name, runner.notes[-1], target=peer.target)]
    start = measured(label, "engine start", "s", Samples(values=_loads(ours)))
    rates = rates_of([run.batches[0] for run in theirs])
    same = 1.0 if engine == "mapped" else None
    first = measured(label, "first token of a cold engine", "s", _first_tokens(ours))
    rows = [
        compared(row, peer.name, rates, target=peer.target),
        compared(start, peer.name, Samples(values=_loads(theirs)), lower_is_better=True),
        compared(first, peer.name, _first_tokens(theirs), lower_is_better=True),
        *_costs(label, peer.name, ours, theirs),
        _same_tokens(label, peer.name, ours[0].batches[0], theirs[0].batches[0], same),
    ]
    if wide:
        rows += _wide_rows(engine, peer, wide, theirs)
    return rows if engine != "mapped" else [*rows, *_own_rows(label, ours, runner, setting)]


def _wide_rows(
    engine: str, peer: Peer, wide: Sequence[ChildResult], theirs: Sequence[ChildResult]
) -> list[Row]:
    """Both under the limit that the peer needs: ours keeps more layers in memory."""
    label = f"{engine}: batch {wide[0].batches[0].rows}, 2600 MB for both"
    row = measured(label, "rate", "tok/s", rates_of([run.batches[0] for run in wide]))
    rates = rates_of([run.batches[0] for run in theirs])
    return [
        compared(row, peer.name, rates, target=peer.target),
        *_costs(label, peer.name, wide, theirs),
    ]


def _costs(
    label: str, name: str, ours: Sequence[ChildResult], theirs: Sequence[ChildResult]
) -> list[Row]:
    """What a pass over the model takes of the disk and of the processor, the prompts' included."""

    def reads(runs: Sequence[ChildResult]) -> Samples:
        batches = [run.batches[0] for run in runs]
        return Samples(values=tuple(each.read_bytes / _passes(each) / 1e9 for each in batches))

    def cpu(runs: Sequence[ChildResult]) -> Samples:
        batches = [run.batches[0] for run in runs]
        return Samples(values=tuple(each.cpu_s / _passes(each) for each in batches))

    rows = []
    for metric, unit, of in (("read in a pass", "GB", reads), ("processor time", "s/pass", cpu)):
        row = measured(label, metric, unit, of(ours))
        rows.append(compared(row, name, of(theirs), lower_is_better=True))
    return rows


def _passes(batch: BatchResult) -> int:
    return 1 + len(batch.step_s)


def _own_rows(
    label: str, ours: Sequence[ChildResult], runner: Runner, setting: Setting
) -> list[Row]:
    """Start and memory of ours."""
    start = measured(label, "engine start", "s", Samples(values=_loads(ours)))
    whole = measured(label, "process start", "s", Samples(values=tuple(run.load_s for run in ours)))
    peak = measured(label, "peak memory", "MB", Samples(values=(runner.peak_bytes / 1e6,)))
    limit = Samples(values=(setting.limit_bytes / 1e6,))
    return [
        compared(start, "aim", Samples(values=(2.0,)), target=1.0, lower_is_better=True),
        whole,
        compared(peak, "limit", limit, target=1.0, lower_is_better=True),
    ]


def step_s(batch: BatchResult) -> float:
    """The median step while all rows decode."""
    return statistics.median(batch.step_s)


def rates_of(batches: Sequence[BatchResult]) -> Samples:
    """Tokens per second while all rows decode."""
    return Samples(values=tuple(batch.rows / step_s(batch) for batch in batches))


def _loads(runs: Sequence[ChildResult]) -> tuple[float, ...]:
    return tuple(run.engine_load_s for run in runs)


def _first_tokens(runs: Sequence[ChildResult]) -> Samples:
    """Of the first batch, from when the engine began to open."""
    return Samples(values=tuple(run.engine_load_s + run.batches[0].first_token_s for run in runs))


def _same_tokens(
    label: str, name: str, ours: BatchResult, theirs: BatchResult, target: float | None
) -> Row:
    """Share of rows with equal tokens; other kernels round bf16 logits to other ties."""
    equal = [mine == other for mine, other in zip(ours.token_ids, theirs.token_ids, strict=True)]
    share = sum(equal) / len(equal)
    return Row(
        case=label,
        metric="rows with equal tokens",
        unit="",
        ours=share,
        samples=len(equal),
        spread=0.0,
        against=name,
        theirs=1.0,
        ratio=share,
        target=target,
    )
