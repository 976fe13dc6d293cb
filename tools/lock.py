"""Writes requirements.lock: the exact version of everything the `dev` extra needs.

Asks pip to resolve without installing (`--dry-run --report`). Local build labels (`+cpu`) are cut
off and the accelerator libraries that a CUDA build of torch asks for are left out, so the same
file installs the CPU or the CUDA build, whichever the reader's index offers.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

HEADER = """\
# Exact versions of all development and runtime dependencies. Made by `make lock`; do not edit.
# torch carries no build label: the index that pip is configured with decides between CPU and CUDA.
"""
PLATFORM_ONLY = re.compile(r"^(nvidia-.*|cuda-.*|penstock)$")


def pins(report: dict[str, list[dict[str, dict[str, str]]]]) -> list[str]:
    """Sorted `name==version` lines of a pip installation report."""
    lines = []
    for item in report["install"]:
        name = item["metadata"]["name"].lower().replace("_", "-")
        if not PLATFORM_ONLY.match(name):
            lines.append(f"{name}=={item['metadata']['version'].partition('+')[0]}")
    return sorted(lines)


def resolve(target: str) -> dict[str, list[dict[str, dict[str, str]]]]:
    """Pip's report on what installing `target` into an empty environment would bring.

    Raises:
        subprocess.CalledProcessError: pip could not resolve; its message is on stderr.
    """
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed"]
    command += ["--quiet", "--report", "-", target]
    result = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    report: dict[str, list[dict[str, dict[str, str]]]] = json.loads(result.stdout)
    return report


def main() -> None:
    """Entry point of `make lock`."""
    parser = argparse.ArgumentParser(description="Resolve and pin all dependencies.")
    parser.add_argument("--output", type=Path, default=Path("requirements.lock"))
    options = parser.parse_args()
    lines = pins(resolve(".[dev]"))
    options.output.write_text(HEADER + "\n".join(lines) + "\n", encoding="utf-8")
    sys.stdout.write(f"{options.output}: {len(lines)} packages\n")


if __name__ == "__main__":
    main()
