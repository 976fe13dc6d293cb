"""Drafts of models that DeepSpeed's ZeRO-3 holds: in memory where they fit, else on disk."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from cluster.base.amount_text import size_text
from cluster.base.errors import ConfigError
from cluster.base.offload_spec import OffloadSpec
from cluster.base.zero3_plan import ForeignModel, Zero3Plan
from cluster.planner.decisions import Decision
from cluster.planner.drafts import Draft, redraft, step_tokens
from cluster.planner.foreign_memory import LEAST_COLUMNS
from cluster.planner.kernels import refuse_foreign_kernels
from cluster.planner.memory import sum_text
from cluster.planner.streaming_room import Room, device_budget, disk_path, least_draft
from replicas.models.memory import DTYPE_BYTES

_STEP_TOKENS = (512, 256, 128, 64, 32, 16)
_MARGIN_BUFFERS = 2
"""Buffers beside those that a module's own tensors need twice: one set in use, one on its way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Held:
    """What DeepSpeed has in memory, by part, for one tier."""

    tier: str
    parts: dict[str, int]


def hold_with_zero3(draft: Draft, room: Room, directory: Path) -> Draft:
    """The model as a rank under ZeRO-3 holds it.

    Args:
        directory: anchors a relative `offload.disk_path`.

    Raises:
        ConfigError: neither tier fits the budget.
    """
    refuse_foreign_kernels(draft.source)
    asked = draft.source.spec.offload or OffloadSpec()
    draft = _computable_dtype(draft)
    budget = device_budget(draft, asked, room)
    auto = draft.source.spec.limits.max_step_tokens == "auto"
    sizes = _STEP_TOKENS if auto else (step_tokens(draft.source.spec),)
    for held in _tiers(draft):
        for tokens in sizes:
            trial = _with(redraft(draft, max_step_tokens=tokens), held, budget, asked, directory)
            if trial is not None:
                return trial
    raise _too_small(draft, budget, sizes[-1])


def zero3_reason(draft: Draft) -> str:
    """Who computes the model and where its weights are."""
    plan, source = draft.zero3, draft.source
    assert plan is not None
    chosen = source.spec.offload is not None and source.spec.offload.provider != "auto"
    why = "" if chosen else "the architecture has no model code here; "
    where = "in memory" if plan.tier == "memory" else f"on disk ({plan.disk_path})"
    return (
        f"{why}{plan.model.architecture} is computed by transformers' own code under DeepSpeed "
        f"ZeRO-3 (deepspeed-zero3), weights {where}, slower than an architecture known here"
    )


def _computable_dtype(draft: Draft) -> Draft:
    """The checkpoint's own unless the user chose: mapped, not copied, while it loads."""
    own = draft.source.arch.dtype
    if draft.source.spec.dtype != "auto":
        return draft
    if own == "float16":
        reason = "the checkpoint is float16, which ZeRO-3 does not compute in on the CPU"
        return replace(
            redraft(draft, dtype="float32"), dtype=Decision(value="float32", reason=reason)
        )
    reason = "the checkpoint's own dtype: another would be a second copy while it loads"
    return replace(redraft(draft, dtype=own), dtype=Decision(value=own, reason=reason))


def _tiers(draft: Draft) -> list[_Held]:
    """What each tier takes, best first."""
    model, item = _model(draft), DTYPE_BYTES[draft.dtype.value]
    window = (model.layer_values + model.largest_values) * item
    memory = _Held(
        tier="memory",
        parts={"weights": model.num_values * item, "window of ZeRO-3": window},
    )
    if draft.dtype.value != draft.source.arch.dtype:
        return [memory]  # loaded by conversion, which needs all of it in memory anyway
    buffers = num_buffers(model) * model.largest_values * item
    disk = _Held(
        tier="disk",
        parts={f"{num_buffers(model)} read buffers": buffers, "window of ZeRO-3": window},
    )
    return [memory, disk]


def num_buffers(model: ForeignModel) -> int:
    """Read buffers of the disk tier; DeepSpeed gives each parameter tensor a whole one."""
    return 2 * model.tensors_per_module + _MARGIN_BUFFERS


def _with(
    draft: Draft, held: _Held, budget: int, asked: OffloadSpec, directory: Path
) -> Draft | None:
    """The draft with a tier; None when it does not fit the budget."""
    model, kv = _model(draft), draft.kv
    weights = sum(held.parts.values())
    space = draft.space.total_bytes - draft.space.process_bytes
    room = budget - weights - space
    least = least_draft(draft).kv.fixed_bytes
    if room < least:
        return None
    memory = kv.memory
    if isinstance(memory, str):
        memory = min(room, kv.useful_blocks * kv.block_bytes)
    context = kv.max_context if isinstance(kv.max_context, int) else kv.max_position
    plan = Zero3Plan(
        model=model,
        tier=held.tier,
        disk_path=disk_path(asked, directory),
        window_values=model.layer_values,
        num_buffers=num_buffers(model),
        max_query_columns=draft.max_step_tokens,
        max_context_columns=max(LEAST_COLUMNS, context),
    )
    return replace(draft, weights_bytes=weights, kv=replace(kv, memory=memory), zero3=plan)


def _too_small(draft: Draft, budget: int, tokens: int) -> ConfigError:
    small = redraft(draft, max_step_tokens=tokens)
    held = min(_tiers(draft), key=lambda tier: sum(tier.parts.values()))
    parts = {
        **held.parts,
        "cache of one request": least_draft(small).kv.fixed_bytes,
        "workspace": small.space.total_bytes - small.space.process_bytes,
    }
    need = sum(parts.values())
    return ConfigError(
        f"Too little device memory for ZeRO-3 (weights on {held.tier}): asked {sum_text(parts)}; "
        f"have {size_text(budget)} for the rank.",
        f"Raise offload.device_memory to {size_text(need)}, or lower limits.max_context.",
        param=draft.source.param("offload.device_memory"),
    )


def _model(draft: Draft) -> ForeignModel:
    model = draft.source.foreign
    assert model is not None
    return model
