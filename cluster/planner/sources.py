"""A model entry -> its checkpoint and architecture, checked against what the entry asks.

The only part of planning that touches the file system or the network; the rest is arithmetic on
what this returns.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cluster.base.errors import ConfigError
from cluster.base.problems import shown
from cluster.base.spec import ModelSpec
from cluster.base.zero3_plan import ForeignModel
from cluster.planner.checkpoint_info import CheckpointInfo, read_checkpoint
from cluster.planner.foreign_source import InspectSource, read_architecture, refuse_settings
from cluster.planner.hub import Hub
from cluster.planner.layout import Layout, choose_layout
from replicas.models.arch import ArchConfig

_MAX_TP = 64
_MAX_LAYERS = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """One model entry with everything known about its checkpoint."""

    index: int
    spec: ModelSpec
    checkpoint: CheckpointInfo
    arch: ArchConfig
    layout: Layout
    foreign: ForeignModel | None = None
    """Set when transformers computes the model; `arch` then has its sizes and nothing else."""

    @property
    def written(self) -> str:
        """What the user wrote to name the checkpoint."""
        if self.spec.repo is None:
            return self.spec.path or ""
        return f"{self.spec.repo}@{self.spec.revision}" if self.spec.revision else self.spec.repo

    def param(self, key: str) -> str:
        """Key path of one of this entry's keys."""
        return f"models[{self.index}].{key}"


def open_source(
    index: int, spec: ModelSpec, directory: Path, hub: Hub, inspect: InspectSource
) -> ModelSource:
    """Find and read the checkpoint of `models[index]`.

    Args:
        directory: what a relative `path` is relative to.
        inspect: what transformers makes of a checkpoint, where that is asked for.

    Raises:
        ConfigError: no such checkpoint, an incomplete or unsupported one, or one that cannot be
            split or stretched as the entry asks.
    """
    key = "path" if spec.repo is None else "repo"
    try:
        if spec.repo is None:
            folder = (directory / Path(spec.path or "").expanduser()).resolve()
        else:
            folder = hub.resolve(spec.repo, spec.revision)
        checkpoint = read_checkpoint(folder)
        _check_depth(checkpoint)
        arch, foreign = read_architecture(spec, checkpoint, inspect)
    except ConfigError as error:
        inner = f" (config.json: {error.param})" if error.param else ""
        raise ConfigError(
            f"{error.cause}{inner}", error.remedy, param=f"models[{index}].{key}"
        ) from None
    layout = choose_layout(spec, arch, f"models[{index}]")
    if foreign is not None:
        refuse_settings(spec, f"models[{index}]")
    source = ModelSource(
        index=index, spec=spec, checkpoint=checkpoint, arch=arch, layout=layout, foreign=foreign
    )
    _check_moe_section(source)
    _check_split(source)
    _check_context(source)
    return source


def possible_tp_sizes(arch: ArchConfig, *, whole_experts: bool = False) -> list[int]:
    """Every number of ranks up to 64 that the model can be split over."""
    sizes = range(1, _MAX_TP + 1)
    return [tp for tp in sizes if not arch.why_not_tp(tp, whole_experts=whole_experts)]


def _check_depth(checkpoint: CheckpointInfo) -> None:
    """An absurd number of layers is refused before anybody makes a list of them."""
    for key in ("num_hidden_layers", "n_layer"):
        value = checkpoint.config.get(key)
        if isinstance(value, int) and value > _MAX_LAYERS:
            raise ConfigError(
                f"{key} is {shown(value)}.", f"At most {_MAX_LAYERS} are supported.", param=key
            )


def _check_split(source: ModelSource) -> None:
    tp = source.spec.parallel.tp
    whole_experts = source.layout.spreads_experts
    reasons = source.arch.why_not_tp(tp, whole_experts=whole_experts)
    if not reasons:
        return
    possible = possible_tp_sizes(source.arch, whole_experts=whole_experts)
    nearest = sorted(possible, key=lambda size: (abs(size - tp), size))[:2]
    raise ConfigError(
        f"The model cannot be split over {tp} ranks: {'; '.join(reasons)}.",
        f"Set tp to {' or '.join(str(size) for size in sorted(nearest))} "
        f"(possible: {', '.join(str(size) for size in possible)}).",
        param=source.param("parallel.tp"),
    )


def _check_moe_section(source: ModelSource) -> None:
    if source.spec.moe is not None and not source.layout.spreads_experts:
        raise ConfigError(
            "`moe` says how ranks exchange tokens, but this replica's ranks do not: it is not "
            "expert-parallel.",
            "Delete it, or set parallel.dp above 1 or engine: expert_parallel.",
            param=source.param("moe"),
        )
    moe = source.spec.moe
    if moe is not None and "probe_budget" in moe.model_fields_set and moe.exchange != "auto":
        raise ConfigError(
            f"Links are not measured with `exchange: {moe.exchange}`, so they need no budget.",
            "Delete probe_budget, or set exchange: auto.",
            param=source.param("moe.probe_budget"),
        )


def _check_context(source: ModelSource) -> None:
    wanted, most = source.spec.limits.max_context, source.arch.max_position
    if wanted != "auto" and wanted > most:
        raise ConfigError(
            f"max_context {wanted} is more than the model's {most} positions.",
            f"Set it to {most} or less.",
            param=source.param("limits.max_context"),
        )
