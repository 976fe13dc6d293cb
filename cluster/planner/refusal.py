"""Why a model does not fit, with the arithmetic, and the smallest change that would make it fit.

A remedy is only named after it was tried: each one redrafts the model with one setting lowered
and is kept when the result fits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cluster.base.amount_text import size_text
from cluster.base.errors import ConfigError
from cluster.planner.drafts import Draft, redraft
from cluster.planner.memory import (
    CPU_USABLE,
    FRONT_PROCESS_BYTES,
    NODE_OVERHEAD_BYTES,
    blocks_for,
    sum_text,
)
from cluster.planner.sources import possible_tp_sizes

_MIN_STEP_TOKENS = 16


def node_full(draft: Draft, num_placed: int, room_bytes: int) -> ConfigError:
    """One more replica fits on no node.

    Args:
        num_placed: replicas of this model that did fit.
        room_bytes: what is left on the emptiest node, for one replica's ranks.
    """
    spec, tp = draft.source.spec, draft.layout.num_ranks
    parts = draft.parts()
    if num_placed and draft.shared_bytes:
        held = "resident weights and ring"
        parts[f"{held} but for what is shared"] = parts.pop(held) - draft.shared_bytes
    need = tp * sum(parts.values())
    ordinal = f"replica {num_placed + 1} of {spec.replicas}" if spec.replicas > 1 else "the model"
    cause = (
        f"Not enough memory for {ordinal}: {tp} ranks x ({sum_text(parts)}) = "
        f"{size_text(need)}, but {size_text(max(0, room_bytes))} are left on the emptiest node "
        f"({CPU_USABLE:.0%} of its memory without Ray's "
        f"{size_text(NODE_OVERHEAD_BYTES)} and {size_text(FRONT_PROCESS_BYTES)} per gateway "
        "and leader)."
    )
    remedies = [f"lower replicas to {num_placed}"] if num_placed else []
    remedies += list(_lighter(draft, room_bytes // tp))
    remedies = remedies[:2] or [f"use a machine with {size_text(need - room_bytes)} more memory"]
    param = draft.source.param("replicas" if num_placed else "kv_cache.memory")
    if not num_placed and not draft.kv.fixed_bytes:
        param = draft.source.param("parallel")
    return ConfigError(cause, f"{_sentence(remedies)}.", param=param)


def nodes_full(draft: Draft, num_placed: int, rooms_bytes: Sequence[int]) -> ConfigError:
    """One more expert-parallel replica fits on all nodes together not.

    Args:
        num_placed: replicas of this model that did fit.
        rooms_bytes: what is left on each node.
    """
    spec, layout = draft.source.spec, draft.layout
    ordinal = f"replica {num_placed + 1} of {spec.replicas}" if spec.replicas > 1 else "the model"
    group_bytes = layout.tp_size * draft.fixed_bytes
    room = ", ".join(size_text(room) for room in rooms_bytes)
    cause = (
        f"Not enough memory for {ordinal}: {layout.num_ranks} ranks x "
        f"({sum_text(draft.parts())}) = {size_text(layout.num_ranks * draft.fixed_bytes)} in "
        f"groups of {size_text(group_bytes)} that share a node, but the nodes have {room} left."
    )
    remedies = [f"lower replicas to {num_placed}"] if num_placed else []
    remedies += list(_lighter(draft, sum(rooms_bytes) // layout.num_ranks))
    remedies = remedies[:2] or ["use more ranks or machines with more memory"]
    param = draft.source.param("replicas" if num_placed else "parallel")
    return ConfigError(cause, f"{_sentence(remedies)}.", param=param)


def device_full(draft: Draft, budget_bytes: int, num_devices: int) -> ConfigError:
    """A rank does not fit on its GPU.

    Args:
        budget_bytes: what a rank may use of the smallest device.
        num_devices: GPUs of the node, for a wider split.
    """
    cause = (
        f"Not enough GPU memory: each rank needs {sum_text(draft.parts())}, and "
        f"{size_text(budget_bytes)} of the device may be used."
    )
    wider = (
        tp
        for tp in possible_tp_sizes(draft.source.arch)
        if not draft.layout.spreads_experts
        and draft.tp_size < tp <= num_devices
        and redraft(draft, tp_size=tp).fixed_bytes <= budget_bytes
    )
    remedies = [f"raise parallel.tp to {tp}" for tp in list(wider)[:1]]
    remedies += list(_lighter(draft, budget_bytes))
    remedies = remedies[:2] or ["use more or larger GPUs, or set device: cpu"]
    key = "dp" if draft.layout.spreads_experts else "tp"
    return ConfigError(
        cause, f"{_sentence(remedies)}.", param=draft.source.param(f"parallel.{key}")
    )


def host_full(draft: Draft, room_bytes: int) -> ConfigError:
    """The host has no room for what a group's rows pass through on their way between devices.

    Args:
        room_bytes: what is left on the node.
    """
    return ConfigError(
        f"Not enough host memory: the rows of {draft.tp_size} rank(s) on GPUs pass through "
        f"{size_text(draft.space.host_bytes)} each on their way to their experts, and "
        f"{size_text(max(0, room_bytes))} of the node are left.",
        "Lower limits.max_step_tokens, or use nodes with more memory.",
        param=draft.source.param("limits.max_step_tokens"),
    )


def _lighter(draft: Draft, rank_bytes: int) -> Iterator[str]:
    """Single changes after which a rank fits into `rank_bytes`."""
    if draft.kv.fixed_bytes:
        room = rank_bytes - draft.weights_bytes - draft.space.total_bytes
        context = draft.kv.max_context if isinstance(draft.kv.max_context, int) else 1
        blocks = blocks_for(context, draft.kv.block_size)
        if room >= max(64 * 1024, blocks * draft.kv.block_bytes):
            yield f"lower kv_cache.memory to {_floor_size(room)}"
    if draft.layout.lost_groups and redraft(draft, lost_groups=0).fixed_bytes <= rank_bytes:
        yield "set moe.failover.lost_groups to 0"
    if draft.dtype.value == "float32":
        half = "bfloat16" if draft.source.arch.dtype != "float16" else "float16"
        if redraft(draft, dtype=half).fixed_bytes <= rank_bytes:
            yield f"set dtype: {half}"
    tokens = draft.max_step_tokens // 2
    while tokens >= _MIN_STEP_TOKENS:
        if redraft(draft, max_step_tokens=tokens).fixed_bytes <= rank_bytes:
            yield f"lower limits.max_step_tokens to {tokens}"
            return
        tokens //= 2


def _floor_size(num_bytes: int) -> str:
    if num_bytes >= 2**20:
        return f"{num_bytes // 2**20}MiB"
    return f"{num_bytes // 2**10}KiB"


def _sentence(remedies: list[str]) -> str:
    text = ", or ".join(remedies)
    return text[0].upper() + text[1:]
