"""Dispatch and combine of a mixture layer over 4 nodes of 4 ranks, on links that are shaped.

    python -m bench.moe [--repeats 5] [--links message-bound thin free]

The nodes are network namespaces of this machine (bench/netrig), the ranks 16 processes with one
thread; links are in slow motion, because 16 processes on few cores cannot resolve microseconds.
Baseline in every row: our own flat exchange (counts, then rows, straight to each rank), measured in
turns with the others. Experts do nothing. Needs root.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.netrig.rig import NetRig, why_not
from bench.report import Row, Samples, compared, measured, write_report

NODES, LOCAL = 4, 4
DIM, EXPERTS, TOP_K, SLOT_ROWS = 1024, 64, 8, 128
DEADLINE_S = 400.0
LINKS: dict[str, dict[str, float]] = {
    "thin": {"delay_s": 0.002, "bytes_per_s": 500e6 / 8},
    "message-bound": {"delay_s": 0.020, "message_s": 0.001},
    "free": {},
}
CASES: dict[str, list[tuple[int, int]]] = {
    "thin": [(64, 0), (64, 2), (8, 0), (256, 0)],
    "message-bound": [(8, 0), (64, 0), (1, 0)],
    "free": [(8, 0), (64, 0), (256, 0)],
}
"""Rows per rank, and how many nodes a token may reach (0: any)."""
FLAT = "flat"
# Freed buffers stay with the process: else every large tensor is zeroed by the kernel anew.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**31)}


def main() -> None:
    """Run the benchmark and write its report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--links", nargs="+", default=list(LINKS), choices=list(LINKS))
    arguments = parser.parse_args()
    if reason := why_not():
        sys.exit(f"bench.moe cannot run: {reason}")
    answers = run(arguments.links, arguments.repeats)
    rows: list[Row] = []
    for answer in answers:
        rows += case_rows(answer)
    rows.append(worst_choice(rows))
    write_report(
        "moe",
        rows,
        notes=[
            f"{NODES} nodes x {LOCAL} ranks in network namespaces, one thread each, gloo",
            f"{EXPERTS} experts top-{TOP_K}, hidden {DIM} fp32, uniform routing, idle experts",
            "thin: 500 Mbit/s a node, 2 ms; message-bound: 20 ms, 1 ms a message; free: no limit",
            "times are of dispatch + combine, to the last rank; bytes and messages on the wire",
        ],
    )


def run(links: list[str], repeats: int) -> list[dict[str, Any]]:
    """Start the ranks on their nodes and return what they measured."""
    setting = {
        "nodes": NODES,
        "local": LOCAL,
        "dim": DIM,
        "experts": EXPERTS,
        "top_k": TOP_K,
        "slot_rows": SLOT_ROWS,
        "repeats": repeats,
        "links": [
            {
                "name": name,
                "shape": LINKS[name],
                "cases": [{"rows": rows, "max_nodes": most} for rows, most in CASES[name]],
            }
            for name in links
        ],
    }
    return run_on_nodes(setting)


def run_on_nodes(setting: dict[str, Any]) -> list[dict[str, Any]]:
    """Build the nodes that a setting asks for, and run its cases on their ranks."""
    nodes, local = setting["nodes"], setting["local"]
    with NetRig(nodes) as rig, tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "conductor").write_bytes(bytes(8 * (1 + 2 * nodes * local)))
        plan = {
            **setting,
            "hosts": [rig.address(node) for node in range(nodes)],
            "port": 29500,
            "control": str(rig.control_path),
            "conductor": str(folder / "conductor"),
            "answers": str(folder / "answers.json"),
        }
        (folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
        commands = [
            rig.command(
                rank // local,
                *(sys.executable, "-m", "bench.moe_ranks", str(folder / "plan.json"), str(rank)),
            )
            for rank in range(nodes * local)
        ]
        run_to_the_end(commands)
        answers: list[dict[str, Any]] = json.loads((folder / "answers.json").read_text("utf-8"))
        return answers


def run_to_the_end(commands: list[list[str]]) -> None:
    """Run all ranks; one that fails or hangs takes the others down."""
    ranks = [subprocess.Popen(command, env={**os.environ, **MALLOC}) for command in commands]
    try:
        for rank in ranks:
            if rank.wait(timeout=DEADLINE_S):
                raise RuntimeError(f"a rank ended with status {rank.returncode}")
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


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
        rows.append(compared(row, FLAT, count[FLAT], target=float(LOCAL), lower_is_better=True))
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
    chosen = times[answer["chosen"]]
    row = measured(case, f"chosen: {answer['chosen']}", "ms", chosen)
    best_samples = Samples(values=(best,))
    rows = [compared(row, "best", best_samples, target=1 / 1.1, lower_is_better=True)]
    for scheme, expected_s in answer["expected_s"].items():
        expected = Samples(values=(1e3 * expected_s,))
        row = measured(case, f"{scheme}: virtual time", "ms", expected)
        off = compared(row, "measured", times[scheme])
        # Too short is as wrong as too long: the ratio is the smaller over the larger.
        nearer = min(off.ratio or 0.0, 1 / off.ratio if off.ratio else 0.0)
        rows.append(dataclasses.replace(off, ratio=nearer, target=1 / 1.2))
    return rows


if __name__ == "__main__":
    main()
