"""Keeps the directory informed: this replica's record on every change and once a second.

Reports are best effort and off the request path; a directory that is down hears the next one. The
record lives here and nowhere else.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import Callable
from typing import Any

from ray.exceptions import RayError

from cluster.base.plan import to_json
from replicas.leader.record import LoadRecord, ReplicaRecord

log = logging.getLogger(__name__)

PERIOD_S = 1.0
_CALL_TIMEOUT_S = 5.0


class DirectoryReporter:
    """Reports one replica's record to the directory actor; lives on the leader's asyncio loop.

    Args:
        find_directory: gives the actor's handle; raises ValueError while there is none.
        record: the first record.
        read_load: the engine's load at the moment of a report.
    """

    def __init__(
        self,
        find_directory: Callable[[], Any],
        record: ReplicaRecord,
        read_load: Callable[[], LoadRecord],
    ) -> None:
        self._find_directory = find_directory
        self._record = record
        self._read_load = read_load
        self._wake = asyncio.Event()
        self._task = asyncio.get_running_loop().create_task(self._run())

    @property
    def record(self) -> ReplicaRecord:
        """What was last set."""
        return self._record

    def update(self, **changes: Any) -> None:
        """Change fields of the record; reported at once."""
        changed = dataclasses.replace(self._record, **changes)
        if changed != self._record:
            self._record = changed
            self._wake.set()

    async def flush(self) -> None:
        """Report now and wait for it, at most a few seconds."""
        record = dataclasses.replace(self._record, load=self._read_load())
        try:
            call = self._find_directory().report.remote(to_json(record))
            await asyncio.wait_for(call, _CALL_TIMEOUT_S)
        except (RayError, ValueError, TimeoutError) as error:
            log.warning("the directory did not take a report: %s", error)

    async def goodbye(self) -> None:
        """Take the record out of the directory and stop reporting."""
        self._task.cancel()
        try:
            call = self._find_directory().remove.remote(self._record.replica_id, self._record.epoch)
            await asyncio.wait_for(call, _CALL_TIMEOUT_S)
        except (RayError, ValueError, TimeoutError) as error:
            log.warning("the directory did not take the goodbye: %s", error)

    async def _run(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):  # time for a heartbeat
                await asyncio.wait_for(self._wake.wait(), PERIOD_S)
            self._wake.clear()
            await self.flush()
