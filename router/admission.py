"""Admission: a request reserves its place before any costly work, and gives it back in `finally`.

Two bounds, counted at once and never queued behind: requests in progress, and prompt tokens whose
computation has not begun. The token count starts as an estimate, because counting exactly is
already work; a refused request costs microseconds.
"""

from __future__ import annotations

import random
from types import TracebackType

from cluster.base.errors import OverloadedError
from cluster.base.front_plan import LimitsPlan


class Admission:
    """The gateway's two counters and their limits."""

    def __init__(self, limits: LimitsPlan, *, random_source: random.Random) -> None:
        self._random = random_source
        self.active_requests = 0
        self.waiting_tokens = 0
        self.set_limits(limits)

    def set_limits(self, limits: LimitsPlan) -> None:
        """Go by other limits from now on; who has a place keeps it."""
        self._max_requests = limits.max_active_requests
        self._max_waiting_tokens = limits.max_prompt_tokens_waiting

    def reserve(self, estimated_tokens: int) -> Reservation:
        """Take a place for one request with about that many prompt tokens.

        Raises:
            OverloadedError: a limit would be passed; `retry_after_s` is spread over 1 to 3 s
                so that refused clients do not return all at once.
        """
        if self.active_requests >= self._max_requests:
            raise self._overloaded(f"{self.active_requests} requests are in progress")
        # A prompt over the bound by itself must still be able to run alone.
        if self.waiting_tokens and (
            self.waiting_tokens + estimated_tokens > self._max_waiting_tokens
        ):
            raise self._overloaded(f"{self.waiting_tokens} prompt tokens are waiting")
        self.active_requests += 1
        self.waiting_tokens += estimated_tokens
        return Reservation(self, estimated_tokens)

    def _overloaded(self, what: str) -> OverloadedError:
        retry_after_s = self._random.uniform(1.0, 3.0)
        return OverloadedError(
            f"The gateway is full: {what}.",
            f"Retry after {retry_after_s:.1f} s.",
            retry_after_s=retry_after_s,
        )


class Reservation:
    """One request's place; releasing twice is harmless."""

    def __init__(self, owner: Admission, waiting_tokens: int) -> None:
        self._owner = owner
        self._waiting_tokens = waiting_tokens
        self._held = True

    def set_waiting_tokens(self, count: int) -> None:
        """Replace the estimate; 0 once the prompt's computation has begun to show results."""
        if self._held and count != self._waiting_tokens:
            self._owner.waiting_tokens += count - self._waiting_tokens
            self._waiting_tokens = count

    def release(self) -> None:
        """Give the place back."""
        if self._held:
            self.set_waiting_tokens(0)
            self._held = False
            self._owner.active_requests -= 1

    def __enter__(self) -> Reservation:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()
