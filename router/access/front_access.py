"""The gateway's guard and certificates, kept as their files are.

Files are looked at every few seconds, so that a key is known, or refused, and a certificate renewed
without a restart and without a stream that notices. A state that cannot be used changes nothing and
is logged once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from pathlib import Path

from cluster.base.errors import ConfigError
from cluster.base.front_plan import GatewayPlan
from router.access.api_keys import ApiKeys, read_keys
from router.access.guard import AccessGuard
from router.access.tls import GatewayTls

log = logging.getLogger(__name__)

LOOK_S = 2.0


class FrontAccess:
    """Who may call, and over what; made on the gateway's loop.

    Raises:
        ConfigError: a file cannot be used.
    """

    def __init__(self, plan: GatewayPlan) -> None:
        keys_file, tls = plan.api_keys_file, plan.tls
        keys = None if keys_file is None else ApiKeys(read_keys(keys_file))
        self.guard = AccessGuard(keys, needs_certificate=bool(tls and tls.client_ca))
        self.tls = None if tls is None else GatewayTls(tls)
        self._files: list[_Followed] = []
        if keys_file is not None:
            take = self._take_keys
            self._files.append(_Followed([keys_file], lambda: take(keys_file)))
        if self.tls is not None and tls is not None:
            self._files.append(_Followed([*tls.files], self.tls.reload))
        self._task: asyncio.Task[None] | None = None

    def start(self, look_s: float = LOOK_S) -> None:
        """Look at the files every `look_s` seconds; without files there is nothing to do."""
        if self._files:
            self._task = asyncio.get_running_loop().create_task(self._follow(look_s))

    async def stop(self) -> None:
        """Look no more."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _follow(self, look_s: float) -> None:
        while True:
            await asyncio.sleep(look_s)
            for files in self._files:
                await asyncio.to_thread(files.look)

    def _take_keys(self, file: str) -> None:
        keys = ApiKeys(read_keys(file))
        self.guard.replace_keys(keys)
        log.warning("API keys of %s: %s", file, ", ".join(keys.names) or "none: nobody may call")


class _Followed:
    """Files that are taken together when one of them is another than before."""

    def __init__(self, files: list[str], take: Callable[[], None]) -> None:
        self._files = files
        self._take = take
        self._seen = self._state()

    def look(self) -> None:
        """Take them if they changed."""
        state = self._state()
        if state == self._seen:
            return
        self._seen = state
        names = " and ".join(self._files)
        try:
            self._take()
        except ConfigError as error:
            log.error(
                "%s changed and cannot be used, what was there before holds: %s", names, error
            )
        else:
            log.info("%s changed and is in use", names)

    def _state(self) -> tuple[object, ...]:
        return tuple(map(_identity, self._files))


def _identity(file: str) -> object:
    """What differs after every change, a symlink that was turned included; None: no such file."""
    try:
        state = Path(file).stat()
    except OSError:
        return None
    return state.st_dev, state.st_ino, state.st_mtime_ns, state.st_size
