"""Which architectures are computed by transformers' own code, and what does not go with that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cluster.base.env import default_cache_dir
from cluster.base.errors import ConfigError
from cluster.base.offload_spec import OffloadSpec
from cluster.base.spec import ModelSpec
from cluster.base.zero3_plan import ForeignModel
from cluster.planner.checkpoint_info import CheckpointInfo
from offload.zero3.foreign_model import foreign_arch, inspect_checkpoint
from replicas.models.arch import ArchConfig
from replicas.models.hf_config import arch_from_hf

PROVIDER = "deepspeed-zero3"

InspectSource = Callable[[Path], ForeignModel]


_STREAMING_KEYS = (
    "precision",
    "compression",
    "pack",
    "ring_slots",
    "micro_batch",
    "host_memory",
    "kv_home",
    "resident",
    "share_resident",
    "objective",
)
"""Settings of our own streaming, which mean nothing here."""


def inspected(directory: Path) -> ForeignModel:
    """Sizes of a checkpoint's model, from the cache or from transformers now."""
    return inspect_checkpoint(directory, default_cache_dir())


def read_architecture(
    spec: ModelSpec, checkpoint: CheckpointInfo, inspect: InspectSource
) -> tuple[ArchConfig, ForeignModel | None]:
    """The architecture; with what transformers says of it where its code computes the model.

    Raises:
        ConfigError: it is not known here, and the entry does not allow the other provider; or
            transformers cannot serve it either.
    """
    provider = spec.offload.provider if spec.offload else "streamed"
    if provider == PROVIDER:
        return _foreign(checkpoint, inspect)
    try:
        return arch_from_hf(checkpoint.config), None
    except ConfigError as error:
        if error.param != "architectures":
            raise
        if provider == "auto":
            return _foreign(checkpoint, inspect)
        raise ConfigError(
            error.cause,
            f"{error.remedy} Others that transformers has can be served more slowly by its own "
            "code: set engine: offload and offload.provider: auto.",
            param=error.param,
        ) from None


def refuse_settings(spec: ModelSpec, param: str) -> None:
    """What an entry may not ask of a model that transformers computes.

    Args:
        param: key path of the entry.

    Raises:
        ConfigError: a setting would have no effect.
    """
    if spec.parallel.tp > 1:
        raise _refusal("parallel.tp", spec.parallel.tp, "it has one rank", param)
    if spec.device == "cuda":
        raise _refusal("device", "cuda", "it is served on the CPU", param)
    if spec.dtype == "float16":
        raise _refusal("dtype", "float16", "it computes in float32 or bfloat16", param)
    asked, usual = spec.offload or OffloadSpec(), OffloadSpec()
    for key in (
        "precision",
        "compression",
        "pack",
        "ring_slots",
        "micro_batch",
        "host_memory",
        "kv_home",
        "resident",
        "share_resident",
        "objective",
    ):
        value = getattr(asked, key)
        if value != getattr(usual, key):
            raise _refusal(f"offload.{key}", value, "DeepSpeed decides that", param)


def _foreign(
    checkpoint: CheckpointInfo, inspect: InspectSource
) -> tuple[ArchConfig, ForeignModel | None]:
    if "quantization_config" in checkpoint.config:
        raise ConfigError(
            "The checkpoint is quantised (quantization_config).",
            "Use a float32, bfloat16 or float16 checkpoint.",
            param="quantization_config",
        )
    model = inspect(checkpoint.directory)
    return foreign_arch(model), model


def _refusal(key: str, value: object, why: str, param: str) -> ConfigError:
    return ConfigError(
        f"{key} is {value}, which the provider {PROVIDER} does not do: {why}.",
        f"Leave {key} out.",
        param=f"{param}.{key}",
    )
