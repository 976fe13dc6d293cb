"""What a model whose weights move may use of a node: its memory, its disk. Arithmetic only."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from cluster.base.amount_text import size_text
from cluster.base.env import default_cache_dir
from cluster.base.errors import ConfigError
from cluster.base.offload_spec import OffloadSpec
from cluster.planner.drafts import Draft
from cluster.planner.kv_sizing import MIN_AUTO_CONTEXT
from cluster.planner.memory import blocks_for
from offload.search_space import Budgets


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What one rank may use on the emptiest node, processes not counted."""

    device_bytes: int
    alone_bytes: int
    """What one rank of a single replica could use."""
    replicas: int
    """Of the model on that node."""
    auto_share: float
    """Part of a node's memory that an automatic budget takes; of a GPU it takes all."""
    num_threads: int
    host_bytes: int = 0
    """Of the node, beside a device; 0 on the CPU, which has one memory."""
    device_kind: str = ""
    """As its driver names it."""


def disk_path(asked: OffloadSpec, directory: Path) -> str:
    """Where weights go on disk; `directory` anchors a relative path."""
    if asked.disk_path == "auto":
        return str(default_cache_dir() / "weights")
    return str((directory / Path(asked.disk_path).expanduser()).absolute())


def shares_resident(draft: Draft, asked: OffloadSpec, room: Room) -> bool:
    """Whether replicas of a node have the layers that stay in common.

    Raises:
        ConfigError: it is asked for and each has a device's memory of its own.
    """
    if draft.on_gpu:
        if asked.share_resident == "always":
            raise ConfigError(
                "share_resident is always, and layers that stay are in each GPU's own memory.",
                "Leave share_resident out.",
                param=draft.source.param("offload.share_resident"),
            )
        return False
    if draft.layout.dp_size > 1:  # whose ranks have more than that in common
        return False
    if asked.share_resident == "auto":  # compressed records have no pages that could be shared
        return room.replicas > 1 and asked.pack and asked.compression != "lossless"
    return asked.share_resident == "always"


def least_draft(draft: Draft) -> Draft:
    """The draft with the smallest cache that could serve anybody, to see whether it fits."""
    kv = draft.kv
    wanted = kv.max_context if isinstance(kv.max_context, int) else None
    context = wanted or min(MIN_AUTO_CONTEXT, kv.max_position)
    least = blocks_for(context, kv.block_size) * kv.block_bytes
    return replace(draft, kv=replace(kv, memory=max(kv.fixed_bytes, least)))


def memory_budgets(draft: Draft, asked: OffloadSpec, room: Room) -> Budgets:
    """What a rank may use; the workspace in it is filled in later.

    Raises:
        ConfigError: more was asked than the machine has.
    """
    if not draft.on_gpu:
        # A CPU has one memory: weights in the host's part of it would be resident.
        return Budgets(
            device_bytes=device_budget(draft, asked, room),
            workspace_bytes=0,
            host_bytes=host_budget(asked),
            host_holds_weights=False,
        )
    usable = int(room.host_bytes * room.auto_share)
    return Budgets(
        device_bytes=_asked(draft, "device_memory", asked.device_memory, room.device_bytes),
        workspace_bytes=0,
        host_bytes=_asked(draft, "host_memory", asked.host_memory, usable, room.host_bytes),
    )


def _asked(draft: Draft, key: str, wanted: int | str, usable: int, have: int | None = None) -> int:
    """Bytes of a budget beside or on a GPU: those asked for, else what is usable."""
    if isinstance(wanted, str):
        return max(0, usable)
    left = usable if have is None else have
    if wanted > left:
        raise ConfigError(
            f"{key} {size_text(wanted)} is asked for each rank, and {size_text(max(0, left))} are "
            "left for it.",
            f"Lower it to {size_text(max(0, left))}, or leave it to auto.",
            param=draft.source.param(f"offload.{key}"),
        )
    return wanted


def device_budget(draft: Draft, asked: OffloadSpec, room: Room) -> int:
    """Bytes of `device_memory`, beside `host_memory` in the same node.

    Raises:
        ConfigError: more was asked than the machine has.
    """
    host = host_budget(asked)
    have = room.alone_bytes if shares_resident(draft, asked, room) else room.device_bytes
    left = max(0, have - host)
    if isinstance(asked.device_memory, str):
        if host and not left:
            raise ConfigError(
                f"host_memory {size_text(host)} is asked for each rank, and {size_text(have)} are "
                "left for it and the device's part together.",
                "Lower it.",
                param=draft.source.param("offload.host_memory"),
            )
        return max(0, min(left, int(room.device_bytes * room.auto_share) - host))
    if asked.device_memory > left:
        beside = f" beside host_memory {size_text(host)}" if host else ""
        raise ConfigError(
            f"device_memory {size_text(asked.device_memory)} is asked for each rank{beside}, and "
            f"{size_text(left)} are left for it.",
            f"Lower it to {size_text(left)}, or leave it to auto.",
            param=draft.source.param("offload.device_memory"),
        )
    return asked.device_memory


def host_budget(asked: OffloadSpec) -> int:
    """Bytes of `host_memory` on a CPU."""
    return 0 if isinstance(asked.host_memory, str) else asked.host_memory
