"""Why a model cannot be streamed in its memory: the least that could work, and remedies. Pure."""

from __future__ import annotations

from dataclasses import replace

from cluster.base.amount_text import size_text
from cluster.base.errors import ConfigError
from cluster.planner.memory import sum_text
from cluster.planner.streaming_trial import Trial
from offload.homes import KvHome, Placement
from offload.precision import Precision
from offload.search_space import KV_WINDOWS, Budgets, host_bytes_of, least_expert_slots


def too_small(trial: Trial) -> ConfigError:
    """The least that could work, part by part, and what would make it less."""
    draft = trial.draft
    fixed, longest = draft.kv.memory, trial.demand.max_context
    one_request = longest * trial.model.kv_bytes_per_token
    if isinstance(fixed, int) and draft.kv.fixed_bytes and fixed < one_request:
        return ConfigError(
            f"A cache of {size_text(fixed)} is asked for each rank, and one request of {longest} "
            f"tokens takes {size_text(one_request)}.",
            f"Raise kv_cache.memory to {size_text(one_request)}, or lower limits.max_context.",
            param=draft.source.param("kv_cache.memory"),
        )
    homes, host = trial.choices.kv_homes, trial.budgets.host_bytes
    if KvHome.DEVICE not in homes and host < max(one_request, draft.kv.fixed_bytes):
        return _host_too_small(trial, max(one_request, draft.kv.fixed_bytes))
    precision = min(trial.choices.precisions, key=trial.model.layer_bytes)
    if draft.on_gpu and (beside := _least_beside(trial, precision)) > host:
        return _staging_too_small(trial, beside)
    parts = _least_parts(trial, precision)
    need, have = sum(parts.values()), trial.budgets.device_bytes
    key = "offload.device_memory" if draft.source.spec.offload else "engine"
    remedies = [f"raise offload.device_memory to {size_text(need)}"]
    least = sum(_least_parts(trial, Precision.INT4).values())
    if precision is not Precision.INT4 and least <= have:
        remedies.append("set offload.precision to int4")
    if draft.kv.fixed_bytes:
        remedies.append("lower kv_cache.memory")
    elif isinstance(draft.kv.max_context, int):
        remedies.append("lower limits.max_context")
    return ConfigError(
        f"Too little device memory to stream the weights: asked {sum_text(parts)}; have "
        f"{size_text(have)} for each rank.",
        _sentence(remedies),
        param=draft.source.param(key),
    )


def _host_too_small(trial: Trial, need: int) -> ConfigError:
    draft, longest = trial.draft, trial.demand.max_context
    each, have = trial.model.kv_bytes_per_token, trial.budgets.host_bytes
    asked = f"one request of {longest} tokens takes {longest} x {size_text(each)}"
    if draft.kv.fixed_bytes == need:
        asked = "kv_cache.memory asks for it"
    return ConfigError(
        f"Too little host memory for keys and values: {size_text(need)} are needed ({asked}); have "
        f"{size_text(have)} for each rank.",
        f"Raise offload.host_memory to {size_text(need)}, or lower limits.max_context.",
        param=draft.source.param("offload.host_memory"),
    )


def _staging_too_small(trial: Trial, need: int) -> ConfigError:
    draft, have = trial.draft, trial.budgets.host_bytes
    key = "offload.host_memory" if draft.source.spec.offload else "engine"
    return ConfigError(
        f"Too little host memory to stream the weights through: {size_text(need)} are needed for "
        f"slots between disk and GPU and to load what stays; have {size_text(have)} for each rank.",
        f"Raise offload.host_memory to {size_text(need)}.",
        param=draft.source.param(key),
    )


def _least_beside(trial: Trial, precision: Precision) -> int:
    """Host bytes of the placement that needs fewest beside a device."""
    model, choices = trial.model, trial.choices
    base = Placement(
        resident_layers=choices.resident_layers or 0,
        host_layers=0,
        precision=precision,
        ring_slots=min(choices.ring_slots),
        expert_slots=least_expert_slots(model) if any(la.experts for la in model.layers) else 0,
    )
    return min(host_bytes_of(model, replace(base, fixed_resident=fixed)) for fixed in (True, False))


def _cache_part(trial: Trial, budgets: Budgets) -> tuple[str, int]:
    """The least that keys and values take of the device, wherever they may be at home."""
    context, model = trial.demand.max_context, trial.model
    whole = budgets.kv_bytes or context * model.kv_bytes_per_token
    window = -(-context * model.kv_bytes_per_token // len(model.layers))
    least = {
        KvHome.DEVICE: (f"cache of one request of {context} tokens", whole),
        KvHome.HOST: ("cache", 0),
        KvHome.STREAMED: (
            f"{KV_WINDOWS} windows of {context} tokens of a layer",
            KV_WINDOWS * window,
        ),
    }
    fits = [home for home in trial.choices.kv_homes if home is KvHome.DEVICE or budgets.host_bytes]
    return min((least[home] for home in fits), key=lambda part: part[1])


def _least_parts(trial: Trial, precision: Precision) -> dict[str, int]:
    """What the smallest placement takes, by part."""
    model, choices, tokens = trial.model, trial.choices, trial.sizes()[-1]
    budgets = trial.with_step(tokens)
    resident, slots = choices.resident_layers or 0, min(choices.ring_slots)
    layers = model.layers[resident:]
    streamed = [layer.base.record_bytes(precision) for layer in layers]
    expert = max((layer.largest_expert_bytes(precision) for layer in layers), default=0)
    experts = least_expert_slots(model) if expert else 0
    slot = max(streamed + [unit.native_bytes for unit in model.fixed_units])
    cache, cache_bytes = _cache_part(trial, budgets)
    parts = {
        f"{resident} resident layers": sum(
            layer.record_bytes(precision) for layer in model.layers[:resident]
        ),
        _ring_text(trial, slots, slot): slots * slot,
        f"{experts} x {size_text(expert)} for experts": experts * expert,
        cache: cache_bytes,
        "workspace": min(cut.workspace_bytes for cut in trial.cuts(tokens)),
    }
    return {name: size for name, size in parts.items() if size}


def _ring_text(trial: Trial, slots: int, slot: int) -> str:
    """The ring as a part of a rank's memory, which others may have a part of as well."""
    count = trial.draft.layout.dp_size
    ring = f"ring of {slots} x {size_text(count * slot)}"
    return ring if count == 1 else f"1/{count} of a {ring}"


def _sentence(remedies: list[str]) -> str:
    text = ", or ".join(remedies)
    return f"{text[0].upper()}{text[1:]}."
