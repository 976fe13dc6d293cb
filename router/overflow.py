"""Which entry of the cluster file runs a generation: the one asked for, or that it overflows to.

Both serve the same checkpoint, so the choice is one of place and speed. Pure: what replicas have to
do now is read from the snapshot of the same moment that routing is done with.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence

from router.api import Tier
from router.policies.snapshot import ReplicaView
from router.served_model import ServedModel

ReadViews = Callable[[str], Sequence[ReplicaView]]
"""Replicas of a model that can take a request now."""


class Overflow(enum.StrEnum):
    """Why a request left the model it asked for."""

    TOO_LONG = "too_long"
    BUSY = "busy"
    UNAVAILABLE = "unavailable"


def choose_tier(
    model: ServedModel, num_tokens: int, read_views: ReadViews
) -> tuple[ServedModel, Overflow | None]:
    """The model that runs a request of `num_tokens` tokens, output included.

    It stays with `model` unless its replicas cannot take it and those of the overflow can. What
    neither can hold goes to the larger one, whose refusal names the larger limit.
    """
    other, plan = model.overflow, model.plan.overflow
    if other is None or plan is None:
        return model, None
    if num_tokens > model.max_tokens_per_choice:
        larger = other.max_tokens_per_choice > model.max_tokens_per_choice
        return (other, Overflow.TOO_LONG) if larger else (model, None)
    if num_tokens > other.max_tokens_per_choice or _is_full(
        other, read_views(other.plan.name), other.plan.scheduler.max_waiting_requests
    ):
        return model, None
    views = read_views(model.plan.name)
    if not views:
        return other, Overflow.UNAVAILABLE
    return (other, Overflow.BUSY) if _is_full(model, views, plan.waiting) else (model, None)


def tier_of(model: ServedModel, reason: Overflow | None) -> Tier:
    """What a client is told of the place where its request runs."""
    speed = model.plan.speed
    return Tier(
        model=model.plan.name,
        engine=model.plan.engine.value,
        overflow=reason.value if reason is not None else "",
        tokens_per_s=1 / speed.chosen.tpot_s if speed is not None else 0.0,
    )


def _is_full(model: ServedModel, views: Sequence[ReplicaView], limit: int) -> bool:
    """Whether in every replica at least `limit` requests wait; one without replicas is full."""
    return all(_num_waiting(model, view) >= limit for view in views)


def _num_waiting(model: ServedModel, view: ReplicaView) -> int:
    """Requests that wait in a replica, with those of ours that its report may not hold yet."""
    plan = model.plan
    return max(
        view.num_waiting, view.num_requests - plan.dp_size * plan.scheduler.max_running_requests
    )
