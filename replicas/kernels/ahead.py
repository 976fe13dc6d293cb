"""Compiles the CPU kernels before a replica has to wait for them: part of `make ops`."""

from __future__ import annotations

import sys

import torch

from cluster.base.env import default_cache_dir
from cluster.base.errors import ConfigError
from replicas.kernels.select import select_kernels


def main() -> int:
    """Build the library that replicas of this machine load, and say what there is now."""
    try:
        select_kernels("native", torch.float32, "cpu", default_cache_dir() / "kernels")
    except ConfigError as error:
        print(f"kernels: not available, because {error}")  # noqa: T201 - a command's answer
        return 1
    print("kernels: built")  # noqa: T201 - a command's answer
    return 0


if __name__ == "__main__":
    sys.exit(main())
