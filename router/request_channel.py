"""What one request has received from its replicas and nobody has read yet: a bounded buffer.

One writer (the hop's reader task) and one reader (the request's stream) on one loop; no task and
no queue object per token: a push sets a future that the reader may be waiting on. A reader that
lags gets everything that waits at once; beyond `limit` unread deltas the request is ended. It stays
the same when the request loses its replica and goes on with another: the reader sees a pause.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeAlias

from cluster.base.errors import OverloadedError, PenstockError
from replicas.api import FinishReason, GenerationDelta, GenerationRequest
from router.loss import Loss
from router.token_log import TokenLog

Cancel: TypeAlias = Callable[[int | None], None]
"""Stops one choice of a request, by index, or all of it (None)."""


class RequestChannel:
    """Deltas of one request, on their way from a replica to a client.

    Args:
        limit: most unread deltas.
        on_loss: called when its replica is lost before the request has ended; has it go on
            elsewhere (`carry`) or fail.
    """

    def __init__(
        self,
        request: GenerationRequest,
        *,
        limit: int,
        on_loss: Callable[[RequestChannel, Loss], None],
    ) -> None:
        self.request_id = request.request_id
        self.log = TokenLog(request)
        self._open = {choice.index for choice in request.choices}
        self._limit = limit
        self._on_loss = on_loss
        self._cancel: Cancel = _nobody
        self._unread: list[GenerationDelta] = []
        self._error: PenstockError | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def rest(self) -> GenerationRequest:
        """What a replica that takes over has to do."""
        return self.log.rest(self._open)

    def carry(self, cancel: Cancel) -> None:
        """Somebody works on the request from now on, and is told by `cancel` what to stop."""
        self._cancel = cancel

    def lose(self, loss: Loss) -> None:
        """Nobody works on the request any more."""
        self._cancel = _nobody
        if not self.finished:
            self._on_loss(self, loss)

    @property
    def finished(self) -> bool:
        """Whether nothing more will come: every choice has ended, or the request failed."""
        return not self._open or self._error is not None

    def push(self, delta: GenerationDelta) -> None:
        """Add what the replica sent; over the limit the request fails and is cancelled."""
        if delta.index not in self._open or self._error is not None:
            return
        if len(self._unread) >= self._limit:
            self.fail(
                OverloadedError(
                    f"The client left {self._limit} events of its stream unread.",
                    "Read faster, or ask for fewer choices.",
                )
            )
            return
        if delta.finish_reason is not None:
            self._open.discard(delta.index)
        self.log.add(delta)
        self._unread.append(delta)
        self._wake()

    def fail(self, error: PenstockError) -> None:
        """End the request with `error`, which the reader gets after what it has not read."""
        if self.finished:
            return
        self._error = error
        self._cancel(None)
        self._wake()

    def abort(self) -> bool:
        """End every open choice with finish reason ABORT; False when none was open."""
        if self.finished:
            return False
        self._cancel(None)
        self._unread.extend(
            GenerationDelta(
                request_id=self.request_id, index=index, finish_reason=FinishReason.ABORT
            )
            for index in sorted(self._open)
        )
        self._open.clear()
        self._wake()
        return True

    def cancel_choice(self, index: int) -> None:
        """Stop one choice at the replica; its later deltas are dropped."""
        if index in self._open:
            self._open.discard(index)
            self._cancel(index if self._open else None)

    def close(self) -> None:
        """The reader is gone: stop whatever still runs and drop what waits."""
        if not self.finished:
            self._cancel(None)
        self._open.clear()
        self._unread.clear()
        self._wake()

    async def receive(self) -> list[GenerationDelta]:
        """Everything unread, in order of arrival, as soon as there is something.

        Returns an empty list when the request has ended and all of it was read.

        Raises:
            PenstockError: the request failed; what came before it was returned earlier.
        """
        while not self._unread:
            if self._error is not None:
                raise self._error
            if not self._open:
                return []
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        batch, self._unread = self._unread, []
        return batch

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _nobody(index: int | None) -> None:
    """There is nothing to stop: no replica works on the request."""
