"""Penstock on the CPU beside its peers: llama.cpp, vLLM's CPU build, transformers.

    python -m bench.peers install vllm llama.cpp      # once; transformers is in the environment
    python -m bench.cpu [--models dense-160m] [--cases decode-1 online] [--peers vllm] [--repeats 3]

Makes the seeded models, then measures case by case; all engines take turns in each case and the
memory's own speed is probed in between. bench/results/cpu.json is written after each case, so an
interrupted run keeps what it has; `--add` keeps the other cases of a file of this machine, and each
names its commit if that is another. A peer that cannot be measured has a row that says why.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence

import torch

from bench.cpu_cases.left_out import LeftOut
from bench.cpu_cases.offline import NEW_TOKENS, OFFLINE_CASES, PREFILL_TOKENS, offline_rows
from bench.cpu_cases.online import CLIENTS, OUTPUT_TOKENS, PROMPT_TOKENS, online_rows
from bench.cpu_cases.ours import Ours, why_not_serve
from bench.peers.llama_cpp import LlamaCpp
from bench.peers.places import LLAMA_CPP, TRANSFORMERS, VLLM, checkpoints_dir, place_of
from bench.peers.protocol import Engine
from bench.peers.transformers import Transformers
from bench.peers.vllm import Vllm
from bench.random_checkpoint import SHAPES, random_checkpoint
from bench.report import Row, kept_rows, save_report, write_report

ONLINE = "online"
TORCH_KERNELS = "torch-kernels"
CASES = (*(case.name for case in OFFLINE_CASES), ONLINE)
PEERS = (LLAMA_CPP, VLLM, TRANSFORMERS, TORCH_KERNELS)
DEFAULT_PEERS = PEERS[:3]


def main() -> None:
    """Run the chosen cases and write the report."""
    arguments = _parser().parse_args()
    # Peers are children in sessions of their own: they end when this process unwinds.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    torch.set_num_threads(arguments.threads)
    rows = kept_rows("cpu") if arguments.add else []
    notes = _notes(arguments)
    for model in arguments.models:
        if reason := why_not_serve(dict(SHAPES[model])):
            print(f"{model}: not run, {reason}", flush=True)
            notes.append(f"{model}: not run, {reason}")
            continue
        for found in _model_rows(model, arguments):
            cases = {row.case for row in found}
            rows = [row for row in rows if row.case not in cases] + found
            rows.sort(key=_place_in_table)
            save_report("cpu", rows, notes=notes)
    write_report("cpu", rows, notes=notes)


def _model_rows(model: str, arguments: argparse.Namespace) -> Iterator[list[Row]]:
    print(f"{model}:", flush=True)
    checkpoint = random_checkpoint(model, checkpoints_dir())
    engines = _engines(arguments.peers, arguments.threads)
    offline = [case for case in OFFLINE_CASES if case.name in arguments.cases]
    if offline:
        yield from offline_rows(checkpoint, engines, offline, arguments.repeats, arguments.threads)
    if ONLINE in arguments.cases:
        yield online_rows(checkpoint, engines, arguments.repeats, arguments.requests)


def _engines(peers: Sequence[str], threads: int) -> list[Engine]:
    """Ours first, then the peers in the order of the flag."""
    known: Mapping[str, Engine] = {
        LLAMA_CPP: LlamaCpp(threads),
        VLLM: Vllm(),
        TRANSFORMERS: Transformers(threads),
        TORCH_KERNELS: Ours(threads, kernels="off"),
    }
    left_out = [LeftOut(known[peer].name) for peer in DEFAULT_PEERS if peer not in peers]
    return [Ours(threads), *(known[peer] for peer in dict.fromkeys(peers)), *left_out]


def _place_in_table(row: Row) -> tuple[int, int]:
    model, _, case = row.case.partition(" ")
    return list(SHAPES).index(model), CASES.index(case)


def _notes(arguments: argparse.Namespace) -> list[str]:
    installed = [place_of(peer).installed() for peer in (LLAMA_CPP, VLLM)]
    return [
        f"bf16 weights, seeded at random, {arguments.threads} threads, greedy, end ignored; peers: "
        + ", ".join([*filter(None, installed), "transformers"]),
        f"prefill: one prompt of {PREFILL_TOKENS} tokens; decode-N: {PROMPT_TOKENS}-token prompts, "
        f"{NEW_TOKENS} tokens each, batch N, time to the first token taken off",
        f"online: each engine's own OpenAI server, {CLIENTS} clients in a closed loop, "
        f"{PROMPT_TOKENS}-token prompts, {OUTPUT_TOKENS} tokens, streaming; ours with the gateway",
        "engines take turns; memory read: the best rate at which the bytes of one token (weights "
        "and KV) could be read again and again, probed around each batch",
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--peers", nargs="*", default=list(DEFAULT_PEERS), choices=PEERS)
    parser.add_argument("--repeats", type=int, default=3, help="rounds that count")
    parser.add_argument("--requests", type=int, default=2 * CLIENTS, help="of an online round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--add", action="store_true", help="keep other cases of the result file")
    return parser


if __name__ == "__main__":
    main()
