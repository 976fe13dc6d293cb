"""A cluster file in which what runs already stays as it was decided.

A running replica cannot be decided anew: its cache has its size and its ranks their device. So when
a file is planned again beside what runs, every `auto` of a running model is replaced by what it
became; the planner then gives the others what is left.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.base.offload_spec import OffloadSpec
from cluster.base.plan import ClusterPlan, EngineKind, ModelPlan
from cluster.base.spec import ClusterSpec, ModelSpec


def pin(spec: ClusterSpec, running: ClusterPlan) -> ClusterSpec:
    """The file with the decisions of `running` written out, for models that both have."""
    plans = {model.name: model for model in running.models}
    models = tuple(
        _pin_model(model, plans[model.name]) if model.name in plans else model
        for model in spec.models
    )
    return spec.model_copy(update={"models": models})


def _pin_model(spec: ModelSpec, plan: ModelPlan) -> ModelSpec:
    changes: dict[str, Any] = {
        "engine": plan.engine.value,
        "device": plan.device,
        "dtype": plan.dtype,
        "resources": _filled(spec.resources, {"threads_per_rank": plan.num_threads}),
        "limits": _filled(
            spec.limits,
            {
                "max_context": plan.scheduler.max_context,
                "max_step_tokens": plan.scheduler.max_step_tokens,
            },
        ),
    }
    if plan.engine is not EngineKind.OFFLOAD:
        memory = {"memory": plan.kv.bytes_per_rank}
        changes["kv_cache"] = _filled(spec.kv_cache, memory)
    elif plan.offload is not None:
        changes["offload"] = _filled(
            spec.offload or OffloadSpec(),
            {
                "device_memory": plan.offload.device_bytes,
                "host_memory": plan.offload.host_bytes or "auto",
                "host_experts": "always" if plan.offload.host_experts else "never",
            },
        )
    return spec.model_copy(update=changes)


def _filled(section: Any, decided: Mapping[str, Any]) -> Any:
    """A section with what was decided where the file says `auto`."""
    left_open = {key: value for key, value in decided.items() if getattr(section, key) == "auto"}
    return section.model_copy(update=left_open)
