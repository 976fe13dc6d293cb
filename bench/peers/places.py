"""Where peers live on this machine: one folder each below the user's cache directory.

Peers are bench-only: nothing here is ever imported by Penstock or written into its environment.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cluster.base.env import default_cache_dir

VLLM = "vllm"
LLAMA_CPP = "llama.cpp"
TRANSFORMERS = "transformers"
PEERS = (VLLM, LLAMA_CPP, TRANSFORMERS)
HOSTS = Path(__file__).parent / "hosts"
"""Programs that run inside a peer's own environment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One peer's folder."""

    root: Path

    @property
    def python(self) -> Path:
        """The interpreter of its own environment."""
        return self.root / "venv" / "bin" / "python"

    @property
    def log(self) -> Path:
        """All output of its installation."""
        return self.root / "install.log"

    @property
    def stamp(self) -> Path:
        """Names what is installed; written last."""
        return self.root / "installed"

    def installed(self) -> str:
        """What is installed, or an empty string."""
        return self.stamp.read_text(encoding="utf-8").strip() if self.stamp.is_file() else ""

    def why_not(self) -> str:
        """Why it cannot be used; empty when it can."""
        if self.installed():
            return ""
        return f"not installed (python -m bench.peers install {self.root.name})"


def place_of(peer: str, cache_dir: Path | None = None) -> Place:
    """The folder of a peer; it need not exist."""
    return Place(root=(cache_dir or default_cache_dir()) / "peers" / peer)


def checkpoints_dir(cache_dir: Path | None = None) -> Path:
    """Where the seeded models are kept between runs."""
    return (cache_dir or default_cache_dir()) / "bench-models"
