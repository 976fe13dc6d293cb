"""The demo: one YAML, a trained model on two tensor-parallel ranks, tokens over gRPC and HTTP.

Runs the very commands of the README, one after the other, and shows them. Takes everything down
again whatever happens.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import urllib.request
from pathlib import Path

CLUSTER = Path(os.path.relpath(Path(__file__).with_name("demo.yaml")))
PENSTOCK = str(Path(sys.executable).with_name("penstock"))
NAME = "demo"
HTTP = "http://127.0.0.1:8000/v1/completions"
SEEDED = ["generate", "class Queue:", "--max-tokens", "48", "--temperature", "0.7", "--seed", "3"]

BEFORE = (
    ("Where would everything run?", ["plan", str(CLUSTER)]),
    ("Start it in the background", ["up", str(CLUSTER), "--detach"]),
)
STEPS = (
    ("What runs: replicas, ranks, process ids, cache blocks", ["status"]),
    (
        "A completion over gRPC, streamed from two tensor-parallel ranks",
        ["generate", "def ", "--echo", "--max-tokens", "72", "--temperature", "0"],
    ),
    ("Sampled, with a seed ...", SEEDED),
    ("... and again: the same tokens", SEEDED),
    (
        "A chat turn",
        ["chat", "--message", "Write a function that sorts a list.", "--max-tokens", "64"],
    ),
)


def headline(title: str, command: str) -> None:
    """Print what comes next and the command for it."""
    bold, plain = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
    print(f"\n{bold}# {title}{plain}\n$ {command}", flush=True)


def show(title: str, arguments: list[str]) -> None:
    """Print a command the way a user would type it, then run it.

    Raises:
        CalledProcessError: the command failed.
    """
    headline(title, shlex.join(["penstock", *arguments]))
    subprocess.run([PENSTOCK, *arguments], check=True)


def show_http() -> None:
    """The same model through the OpenAI HTTP API."""
    body = {"model": "demo-dense", "prompt": "import ", "max_tokens": 24, "temperature": 0}
    headline(
        "The OpenAI HTTP API",
        f"curl {HTTP} -H 'content-type: application/json' -d '{json.dumps(body)}'",
    )
    request = urllib.request.Request(
        HTTP, json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        print(json.dumps(json.load(answer), indent=1), flush=True)


def main() -> int:
    """Run the demo; the exit code of the first command that failed, else 0."""
    try:
        for title, arguments in BEFORE:
            show(title, arguments)
    except subprocess.CalledProcessError as error:
        return error.returncode
    try:
        for title, arguments in STEPS:
            show(title, arguments)
        show_http()
    except subprocess.CalledProcessError as error:
        return error.returncode
    finally:
        show("Take it down; nothing stays behind", ["down", NAME])
    print(f"\nThat was a cluster. Keep one with:  penstock up {CLUSTER}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
