"""Models that overflow to another entry of the file: what that entry has to be. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cluster.base.errors import ConfigError
from cluster.base.plan import ModelPlan, OverflowPlan
from cluster.base.spec import ModelSpec
from cluster.planner.sources import ModelSource


def check_overflows(sources: Sequence[ModelSource]) -> None:
    """Refuse an overflow to nothing, to itself, to another model, or over several entries.

    Raises:
        ConfigError: naming the key.
    """
    by_name = {source.spec.name: source for source in sources}
    for source in sources:
        overflow = source.spec.overflow
        if overflow is None:
            continue
        param, other = source.param("overflow.to"), by_name.get(overflow.to)
        if other is None or other is source:
            what = "the model itself" if other is source else "no model of this file"
            names = ", ".join(name for name in by_name if name != source.spec.name)
            raise ConfigError(
                f"{overflow.to!r} is {what}.",
                f"Name one of: {names}." if names else "Add an entry for it to overflow to.",
                param=param,
            )
        if other.checkpoint.directory != source.checkpoint.directory:
            raise ConfigError(
                f"{overflow.to!r} serves another checkpoint ({other.written}), so its answers are "
                "not this model's.",
                f"Give it the checkpoint of {source.spec.name!r} ({source.written}).",
                param=param,
            )
        if other.spec.overflow is not None:
            raise ConfigError(
                f"{overflow.to!r} overflows itself; requests go over once only.",
                f"Delete its `overflow`, or name {other.spec.overflow.to!r} here.",
                param=param,
            )


def overflow_plan(spec: ModelSpec) -> OverflowPlan | None:
    """The decided `overflow` of an entry."""
    if spec.overflow is None:
        return None
    waiting = spec.overflow.waiting
    return OverflowPlan(
        model=spec.overflow.to,
        waiting=spec.limits.max_waiting_requests if isinstance(waiting, str) else waiting,
    )


def overflow_warnings(model: ModelPlan, models: Sequence[ModelPlan]) -> Iterator[str]:
    """Where answers of the overflow can differ, or it cannot hold what is too long."""
    if model.overflow is None:
        return
    other = next(each for each in models if each.name == model.overflow.model)
    formats = [_number_format(each) for each in (model, other)]
    if formats[0] != formats[1]:
        yield (
            f"{model.name}: computes in {formats[0]}, and its overflow {other.name} in "
            f"{formats[1]}; answers can differ with the place they come from."
        )
    if other.scheduler.max_context <= model.scheduler.max_context:
        yield (
            f"{model.name}: its overflow {other.name} holds {other.scheduler.max_context} tokens "
            f"per request, no more than its own {model.scheduler.max_context}: it only helps when "
            "replicas are full."
        )


def _number_format(model: ModelPlan) -> str:
    precision = model.offload.precision if model.offload is not None else "native"
    return model.dtype if precision == "native" else f"{model.dtype} with {precision} weights"
