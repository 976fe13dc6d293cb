"""What the planner knows of an architecture that only transformers computes. Torch-free.

A process of its own (`offload.zero3.inspect`) builds the model without memory and runs it once on
tensors that have shapes and no values; the sizes it saw are kept in the cache directory by
configuration and library version. Nothing is guessed from the names of configuration keys.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

from cluster.base.errors import ConfigError
from cluster.base.plan import from_json
from cluster.base.zero3_plan import ForeignModel
from offload.machine_rates import Run, run_probe
from replicas.models.arch import ArchConfig, LayerSpec, NormKind, PositionKind

FAMILY = "transformers"
"""`ArchConfig.family` of such a model; no row of the registry has that name."""
DEADLINE_S = 120.0
"""Importing transformers takes 3 to 10 s, building a model without memory a few more."""
_VERSION = 1
"""Changes when the inspection looks at something else."""


def foreign_arch(model: ForeignModel) -> ArchConfig:
    """The sizes in the form that planner and runner read; no model code of ours computes them."""
    widest = max(model.kv, key=lambda layer: layer.num_heads * layer.width)
    ffn_dim = -(-model.layer_values // (3 * model.model_dim))
    return ArchConfig(
        family=FAMILY,
        vocab_size=model.vocab_size,
        model_dim=model.model_dim,
        num_heads=model.num_heads,
        num_kv_heads=widest.num_heads,
        head_dim=widest.width,
        layers=tuple(LayerSpec(ffn_dim=ffn_dim) for _ in model.kv),
        max_position=model.max_position,
        norm=NormKind.LAYER,
        norm_eps=0.0,
        activation="",
        gated_mlp=False,
        position=PositionKind.LEARNED,
        rope=None,
        dtype=model.dtype,
        eos_token_ids=model.eos_token_ids,
    )


def inspect_checkpoint(directory: Path, cache_dir: Path, run: Run = run_probe) -> ForeignModel:
    """What transformers makes of a checkpoint's configuration.

    Raises:
        ConfigError: transformers is missing, does not know the architecture either, or computes it
            in a way that cannot be served.
    """
    entry = cache_dir / "architectures" / f"{_fingerprint(directory)}.json"
    if (cached := _read(entry)) is not None:
        return cached
    command = [sys.executable, "-m", "offload.zero3.inspect", str(directory)]
    try:
        answer = json.loads(run(command, DEADLINE_S).splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, LookupError) as error:
        raise ConfigError(
            f"{directory} could not be inspected: {_why(error)}.",
            f"Run it by hand to see more: {' '.join(command[1:])}",
        ) from error
    if "refusal" in answer:
        raise ConfigError(*answer["refusal"])
    model = from_json(ForeignModel, answer)
    _write(entry, model)
    return model


def _fingerprint(directory: Path) -> str:
    try:
        version = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(
            "transformers is not installed, and only it computes this architecture.",
            "Install it: pip install 'penstock[transformers]'.",
        ) from None
    config = (directory / "config.json").read_bytes()
    return hashlib.sha256(b"%d %s " % (_VERSION, version.encode()) + config).hexdigest()[:24]


def _read(entry: Path) -> ForeignModel | None:
    try:
        return from_json(ForeignModel, json.loads(entry.read_text(encoding="utf-8")))
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _write(entry: Path, model: ForeignModel) -> None:
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        part = entry.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(dataclasses.asdict(model)), encoding="utf-8")
        part.rename(entry)
    except OSError:
        return  # inspected again next time


def _why(error: Exception) -> str:
    if isinstance(error, subprocess.TimeoutExpired):
        return f"transformers took longer than {error.timeout:.0f} s"
    if isinstance(error, subprocess.CalledProcessError):
        lines = (error.stderr or "").strip().splitlines() or [f"exit status {error.returncode}"]
        return lines[-1]
    return f"{type(error).__name__}: {error}"
