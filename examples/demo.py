"""The demo: one YAML, a trained model on two tensor-parallel ranks, tokens over gRPC and HTTP.

Runs the very commands of the README, one after the other, and shows them. Takes everything down
again whatever happens.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
CLUSTER = HERE / "demo.yaml"
PENSTOCK = str(Path(sys.executable).with_name("penstock"))

STEPS = (
    ("Where would everything run, and why?", ["plan", str(CLUSTER)]),
    ("What runs: pids, ranks, memory blocks", ["status"]),
    (
        "A completion over gRPC, streamed",
        ["generate", "def read_lines(path):\n", "--max-tokens", "96", "--temperature", "0"],
    ),
    (
        "The same request with a seed: run it twice, get the same tokens",
        ["generate", "class Queue:\n", "--max-tokens", "64", "--temperature", "0.8", "--seed", "7"],
    ),
    (
        "A chat turn",
        ["chat", "--message", "Write a function that sorts a list.", "--max-tokens", "64"],
    ),
)


def show(title: str, arguments: list[str]) -> None:
    """Print a command the way a user would type it, then run it.

    Raises:
        CalledProcessError: the command failed.
    """
    command = shlex.join(["penstock", *arguments]).replace("\n", "\\n")
    print(f"\n\033[1m# {title}\033[0m\n$ {command}", flush=True)
    subprocess.run([PENSTOCK, *arguments], check=True)


def main() -> int:
    """Run the demo; the exit code of the first command that failed, else 0."""
    started = False
    try:
        show(*STEPS[0])
        show("Start it (detached; Ctrl-C ends a foreground one)", ["up", str(CLUSTER), "--detach"])
        started = True
        for title, arguments in STEPS[1:]:
            show(title, arguments)
    except subprocess.CalledProcessError as error:
        return error.returncode
    except KeyboardInterrupt:
        return 130
    finally:
        if started:
            show("Take it down; nothing stays behind", ["down", "demo"])
    print("\nThat was a cluster. Keep one with:  penstock up examples/demo.yaml")
    return 0


if __name__ == "__main__":
    sys.exit(main())
