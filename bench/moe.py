"""Dispatch and combine of a mixture layer over 4 nodes of 4 ranks, on links that are shaped.

    python -m bench.moe [--repeats 5] [--cases thin:64 thin:64:2 ...]

Cases are LINK:ROWS[:NODES], rows per rank and how many nodes a token may reach; all of them by
default. Figures of a few are printed and not recorded.

The nodes are network namespaces of this machine (bench/netrig), the ranks 16 processes with one
thread; links are in slow motion, because 16 processes on few cores cannot resolve microseconds.
Baseline in every row: our own flat exchange (counts, then rows, straight to each rank), measured in
turns with the others. Experts do nothing. Needs root.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.moe_rows import case_rows, probe_rows, worst_choice
from bench.netrig.rig import NetRig, why_not
from bench.report import Row, format_table, write_report
from moe.exchange.schemes import DEFAULT_PROBE_S

NODES, LOCAL = 4, 4
DIM, EXPERTS, TOP_K, SLOT_ROWS = 1024, 64, 8, 128
DEADLINE_S = 400.0
PROBE_S = 4.0
"""What the probe may take here: one timing of ranks that share a core eightfold says too little.
The default is measured as well."""
LINKS: dict[str, dict[str, float]] = {
    "thin": {"delay_s": 0.002, "bytes_per_s": 500e6 / 8},
    "message-bound": {"delay_s": 0.020, "message_s": 0.001},
    "free": {},
}
Case = tuple[str, int, int]
"""Link, rows per rank, and how many nodes a token may reach (0: any)."""
ALL_CASES: list[Case] = [
    ("thin", 64, 0),
    ("thin", 64, 2),
    ("thin", 8, 0),
    ("thin", 256, 0),
    ("message-bound", 8, 0),
    ("message-bound", 64, 0),
    ("message-bound", 1, 0),
    ("free", 8, 0),
    ("free", 64, 0),
    ("free", 256, 0),
]
# Freed buffers stay with the process: else every large tensor is zeroed by the kernel anew.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**31)}


def main() -> None:
    """Run the benchmark and write its report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cases", nargs="+", type=case_of, default=ALL_CASES)
    arguments = parser.parse_args()
    if reason := why_not():
        sys.exit(f"bench.moe cannot run: {reason}")
    answers = run(arguments.cases, arguments.repeats)
    rows: list[Row] = []
    for answer in answers:
        rows += case_rows(answer)
    rows.append(worst_choice(rows))
    rows += probe_rows(answers)
    if arguments.cases != ALL_CASES:
        print(format_table(rows))
        return
    write_report(
        "moe",
        rows,
        notes=[
            f"{NODES} nodes x {LOCAL} ranks in network namespaces, one thread each, gloo",
            f"{EXPERTS} experts top-{TOP_K}, hidden {DIM} fp32, uniform routing, idle experts",
            "thin: 500 Mbit/s a node, 2 ms; message-bound: 20 ms, 1 ms a message; free: no limit",
            "times are of dispatch + combine, processors at work before, to the last rank",
            f"virtual time and choice after a probe of {PROBE_S:g} s, and of the default below",
            "bytes and messages on the wire",
        ],
    )


def case_of(text: str) -> Case:
    """One of the cases, from LINK:ROWS[:NODES]; an `ArgumentTypeError` if it is none."""
    link, rows, nodes = (*text.split(":"), "0", "0")[:3]
    found = [case for case in ALL_CASES if (link, rows, nodes) == tuple(map(str, case))]
    if not found:
        names = ", ".join(":".join(map(str, case)) for case in ALL_CASES)
        raise argparse.ArgumentTypeError(f"{text!r} is none of {names}")
    return found[0]


def run(cases: list[Case], repeats: int) -> list[dict[str, Any]]:
    """Start the ranks on their nodes and return what they measured."""
    setting = {
        "nodes": NODES,
        "local": LOCAL,
        "dim": DIM,
        "experts": EXPERTS,
        "top_k": TOP_K,
        "slot_rows": SLOT_ROWS,
        "repeats": repeats,
        "probes_s": [PROBE_S, DEFAULT_PROBE_S],
        "links": [
            {
                "name": name,
                "shape": LINKS[name],
                "cases": [
                    {"rows": rows, "max_nodes": most} for link, rows, most in cases if link == name
                ],
            }
            for name in dict.fromkeys(link for link, _, _ in cases)
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


if __name__ == "__main__":
    main()
