"""The engine's own cases: decode against the memory's rate, prefill against the multiplier's."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from bench.gpu.cases import Case, Lab, Setting, one
from bench.gpu.ours import GpuEngine
from bench.gpu.shapes import linear_parameters
from bench.report import Row, Samples, compared, measured

_DECODE_TARGETS = {1: 0.85, 64: 0.75}
_PREFILL_TARGET = 0.65
_ABOUT_S = {"first": 40.0, "decode": 8.0, "prefill": 8.0, "no-sync": 6.0}


def engine_cases(setting: Setting, label: str, kernels: str) -> list[Case]:
    """Decode for each batch size, prefill, and steps in which the host may not wait."""
    names = [f"{label}-decode-{batch}" for batch in setting.batches]
    decodes = [
        Case(
            name=name,
            about_s=_ABOUT_S["first"] if index == 0 else _ABOUT_S["decode"],
            run=partial(_decode, label, kernels, batch),
        )
        for index, (name, batch) in enumerate(zip(names, setting.batches, strict=True))
    ]
    return [
        *decodes,
        Case(
            name=f"{label}-prefill",
            about_s=_ABOUT_S["prefill"],
            run=lambda lab: _prefill(lab, label, kernels),
        ),
        Case(
            name=f"{label}-no-sync",
            about_s=_ABOUT_S["no-sync"],
            run=lambda lab: _no_sync(lab, label, kernels),
        ),
    ]


def rate_fact(label: str, batch: int) -> str:
    """Name of the fact that holds our tokens per second."""
    return f"{label}-decode-{batch}"


def _engine(lab: Lab, kernels: str) -> GpuEngine:
    engine = lab.held.get("engine")
    if not isinstance(engine, GpuEngine):
        setting = lab.setting
        engine = GpuEngine(setting.size, setting.dtype, lab.device, kernels)
        lab.held["engine"] = engine
    return engine


def _decode(label: str, kernels: str, batch: int, lab: Lab) -> Iterator[Row]:
    engine = _engine(lab, kernels)
    run = engine.decode(batch, lab.setting.prompt_tokens, lab.setting.steps)
    graphs = "" if run.graphed or lab.device.type != "cuda" else " (no graphs)"
    rates = Samples(values=tuple(batch / step_s for step_s in run.step_s))
    lab.facts[rate_fact(label, batch)] = rates.median
    row = measured(f"{lab.setting.size} {label} decode {batch}{graphs}", "tokens/s", "1/s", rates)
    if "read" in lab.facts:
        ceiling = one(batch * lab.facts["read"] / run.bytes_per_step)
        row = compared(row, "memory roofline", ceiling, target=_DECODE_TARGETS.get(batch))
    yield row
    host = Samples(values=tuple(time_s * 1e3 for time_s in run.launch_s))
    yield measured(f"{lab.setting.size} {label} decode {batch}", "host's part", "ms", host)


def _prefill(lab: Lab, label: str, kernels: str) -> Iterator[Row]:
    engine = _engine(lab, kernels)
    tokens = lab.setting.prefill_tokens
    times = engine.prefill(tokens, lab.setting.repeats)
    work = 2 * linear_parameters(engine.model.units) * tokens
    rate = Samples(values=tuple(work / time_s / 1e12 for time_s in times))
    row = measured(f"{lab.setting.size} {label} prefill {tokens}", "linears", "TFLOP/s", rate)
    fact = "matmul fp8" if label == "fp8" else "matmul"
    if fact in lab.facts:
        ceiling = one(lab.facts[fact] / 1e12)
        row = compared(row, f"measured {fact}", ceiling, target=_PREFILL_TARGET)
    yield row


def _no_sync(lab: Lab, label: str, kernels: str) -> Iterator[Row]:
    """Fails when anything between launch and answer makes the host wait for the device."""
    steps = _engine(lab, kernels).decode_without_waiting(min(8, max(lab.setting.batches)))
    yield measured(
        f"{lab.setting.size} {label} steps without a host sync", "steps", "", one(float(steps))
    )
