"""Calls from a leader to its worker actors: with a deadline each, and failures as our errors."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Any

from ray.exceptions import RayActorError, RayTaskError

from cluster.base.errors import InternalError, PenstockError, UnavailableError, WorkerDiedError


async def call(ref: Any, timeout_s: float, doing: str, rank: int) -> Any:
    """The answer of an actor's call.

    Args:
        doing: what an error says that the rank is not done with.

    Raises:
        UnavailableError: there is none in time.
        PenstockError: the root cause of the rank's failure.
    """
    try:
        return await asyncio.wait_for(ref, timeout_s)
    except TimeoutError:
        raise UnavailableError(
            f"Worker rank {rank} is not done with {doing} after {timeout_s:.0f} s.",
            "See its log in the Ray dashboard.",
        ) from None
    except (RayActorError, RayTaskError) as error:
        raise as_error(error, rank) from error


async def all_or_first_error(calls: Sequence[Awaitable[Any]]) -> list[Any]:
    """All answers; what fails first ends the wait for the others."""
    tasks = [asyncio.ensure_future(each) for each in calls]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


async def outcome(ref: Any) -> Exception | None:
    """How a call ended; None: it returned."""
    try:
        await ref
    except Exception as error:
        return error
    return None


def as_error(error: BaseException | None, rank: int) -> PenstockError:
    """The root cause behind what Ray reports of a rank."""
    cause = getattr(error, "cause", None)
    for candidate in (cause, error):
        if isinstance(candidate, PenstockError):
            return candidate
    if isinstance(error, RayTaskError):
        return InternalError(f"Worker rank {rank} failed: {cause or error}.")
    return WorkerDiedError(
        f"Worker rank {rank} died.",
        "The replica restarts by itself; retry the request.",
    )
