"""Ray shell of the directory: leaders report to it, gateways and the command line watch it.

It is off every request's path: gateways keep what they last heard and their open streams if it
dies, Ray restarts it, and leaders fill it again within a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

import ray

from cluster.base import names
from cluster.base.log import log_under_ray
from cluster.base.plan import from_json, to_json
from cluster.control.directory_state import DirectoryState
from replicas.leader.record import ReplicaRecord


class DirectoryActor:
    """One per cluster, named `cluster.base.names.directory_actor(cluster)`."""

    def __init__(self) -> None:
        log_under_ray()
        self._state = DirectoryState(time.monotonic)
        self._changed = asyncio.Condition()
        self._born_s = time.monotonic()

    async def report(self, record: dict[str, Any]) -> None:
        """Store a leader's record (JSON of `ReplicaRecord`)."""
        if self._state.report(from_json(ReplicaRecord, record)):
            await self._announce()

    async def remove(self, replica_id: str, epoch: str) -> None:
        """A leader says goodbye."""
        if self._state.remove(replica_id, epoch):
            await self._announce()

    async def forget_model(self, model: str) -> None:
        """A model is no longer part of the cluster, and all its replicas are gone."""
        if self._state.forget_model(model):
            await self._announce()

    async def watch(self, version: int, timeout_s: float) -> tuple[int, list[dict[str, Any]]]:
        """Records as soon as the version differs from `version`, else after `timeout_s`.

        A directory younger than two report periods answers nothing new: after a restart it must
        not tell gateways that all replicas are gone.
        """
        settle_s = self._born_s + 2.5 - time.monotonic()
        if settle_s > 0 and version != 0:
            await asyncio.sleep(min(settle_s, timeout_s))
        if self._state.expire():
            await self._announce()
        with contextlib.suppress(TimeoutError):  # the caller learns that nothing changed
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(lambda: self._state.version != version)
        return self.snapshot()

    def snapshot(self) -> tuple[int, list[dict[str, Any]]]:
        """The version and all records."""
        return self._state.version, [to_json(record) for record in self._state.records()]

    async def _announce(self) -> None:
        async with self._changed:
            self._changed.notify_all()


def start_directory(cluster: str) -> Any:
    """The directory of a cluster: the one that is there, or a new one that outlives its maker."""
    return (
        ray.remote(DirectoryActor)
        .options(
            name=names.directory_actor(cluster),
            namespace=names.NAMESPACE,
            get_if_exists=True,
            num_cpus=0,
            max_restarts=-1,
            max_concurrency=1000,
            lifetime="detached",
        )
        .remote()
    )
