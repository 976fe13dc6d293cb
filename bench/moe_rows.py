"""What the exchange benchmark reports: times, wire, choice and virtual time, beside the aims."""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

from bench.report import Row, Samples, compared, measured
from moe.exchange.schemes import DEFAULT_PROBE_S

FLAT = "flat"


def case_rows(answer: dict[str, Any]) -> list[Row]:
    """Times, wire and choice of one case."""
    limit = f", {answer['max_nodes']} nodes a token" if answer["max_nodes"] else ""
    case = f"{answer['link']}, {answer['rows']} rows{limit}"
    times = {
        scheme: Samples(values=tuple(1e3 * taken for taken in samples))
        for scheme, samples in answer["times_s"].items()
    }
    rows = []
    for scheme, samples in times.items():
        if scheme != FLAT:
            row = measured(case, f"{scheme}: time", "ms", samples)
            rows.append(
                compared(
                    row,
                    FLAT,
                    times[FLAT],
                    target=time_target(answer, scheme),
                    lower_is_better=True,
                )
            )
    return rows + wire_rows(case, answer) + model_rows(case, answer, times)


def time_target(answer: dict[str, Any], scheme: str) -> float | None:
    """The aims: the link decides which scheme is meant."""
    key = (answer["link"], answer["rows"], answer["max_nodes"], scheme)
    return {
        ("message-bound", 8, 0, "preposted"): 3.0,
        ("thin", 64, 0, "hierarchical"): 1.27,
        ("thin", 64, 2, "hierarchical"): 2.1,
    }.get(key)


def worst_choice(rows: list[Row]) -> Row:
    """The case in which the automatic choice is furthest from the best scheme."""
    choices = [row for row in rows if row.metric.startswith("chosen")]
    worst = min(choices, key=lambda row: row.ratio or 0.0)
    case = f"all {len(choices)} sizes and links"
    metric = f"{worst.metric}, furthest from the best: {worst.case}"
    return dataclasses.replace(worst, case=case, metric=metric)


def message_rows(case: str, answer: dict[str, Any]) -> list[Row]:
    """Messages between nodes, where each is one packet: with few rows."""
    if (answer["link"], answer["rows"]) != ("message-bound", 8):
        return []
    count = {
        scheme: Samples(values=tuple(float(wire[0]) for wire in wires))
        for scheme, wires in answer["wires"].items()
    }
    rows = []
    for scheme in ("hierarchical", "preposted"):
        row = measured(case, f"{scheme}: messages between nodes", "", count[scheme])
        rows.append(
            compared(row, FLAT, count[FLAT], target=float(answer["local"]), lower_is_better=True)
        )
    return rows


def wire_rows(case: str, answer: dict[str, Any]) -> list[Row]:
    """What crossed between nodes: hierarchical beside flat, which have the same steps."""
    if (answer["link"], answer["rows"]) != ("thin", 64):
        return message_rows(case, answer)
    mega = {
        scheme: Samples(values=tuple(wire[1] / 1e6 for wire in wires))
        for scheme, wires in answer["wires"].items()
    }
    count = {
        scheme: Samples(values=tuple(float(wire[0]) for wire in wires))
        for scheme, wires in answer["wires"].items()
    }
    rows = []
    for scheme in ("hierarchical", "preposted"):
        row = measured(case, f"{scheme}: between nodes", "MB", mega[scheme])
        target = 2.8 if answer["max_nodes"] else 1.85
        rows.append(compared(row, FLAT, mega[FLAT], target=target, lower_is_better=True))
        row = measured(case, f"{scheme}: packets with data", "", count[scheme])
        rows.append(compared(row, FLAT, count[FLAT], lower_is_better=True))
    return rows


def model_rows(case: str, answer: dict[str, Any], times: dict[str, Samples]) -> list[Row]:
    """The chosen scheme beside the best one, and virtual time beside measured time."""
    best = min(samples.median for samples in times.values())
    chosen = answer["chosen"][0]
    row = measured(case, f"chosen: {chosen}", "ms", times[chosen])
    best_samples = Samples(values=(best,))
    rows = [compared(row, "best", best_samples, target=1 / 1.1, lower_is_better=True)]
    for scheme, expected_s in answer["expected_s"][0].items():
        expected = Samples(values=(1e3 * expected_s,))
        row = measured(case, f"{scheme}: virtual time", "ms", expected)
        off = compared(row, "measured", times[scheme])
        # Too short is as wrong as too long: the ratio is the smaller over the larger.
        nearer = min(off.ratio or 0.0, 1 / off.ratio if off.ratio else 0.0)
        rows.append(dataclasses.replace(off, ratio=nearer, target=1 / 1.2))
    return rows


def probe_rows(answers: list[dict[str, Any]]) -> list[Row]:
    """How long the default probe took on each link, and what its virtual time is worth."""
    rows = []
    for answer in answers:
        if "probes_s" in answer:
            took = Samples(values=(answer["probes_s"][-1],))
            row = measured(f"{answer['link']}, default probe", "time", "s", took)
            budget = Samples(values=(DEFAULT_PROBE_S,))
            rows.append(compared(row, "budget", budget, lower_is_better=True))
    medians = [
        {scheme: statistics.median(times) for scheme, times in answer["times_s"].items()}
        for answer in answers
    ]
    cells = [
        expected_s / median_s[scheme]
        for answer, median_s in zip(answers, medians, strict=True)
        for scheme, expected_s in answer["expected_s"][-1].items()
    ]
    near = Samples(values=(float(sum(1 / 1.2 <= ratio <= 1.2 for ratio in cells)),))
    row = measured("default probe", "virtual time within 20 %", "cells", near)
    rows.append(compared(row, "all", Samples(values=(float(len(cells)),))))
    worst = max(
        median_s[answer["chosen"][-1]] / min(median_s.values())
        for answer, median_s in zip(answers, medians, strict=True)
    )
    row = measured("default probe", "worst choice over the best", "", Samples(values=(worst,)))
    one = Samples(values=(1.0,))
    rows.append(compared(row, "best", one, target=1 / 1.1, lower_is_better=True))
    return rows
