"""How a request can lose the replica that works on it."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from cluster.base.errors import PenstockError, UnavailableError


class LossReason(enum.StrEnum):
    """What became of the replica."""

    FAILED = "failed"
    """It said so itself: a rank died or hangs, or its engine broke."""
    CUT = "cut"
    """Its stream ended or fell silent: the leader, its node or the network is gone."""
    DRAINED = "drained"
    """It was taken away, and the time to finish was over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """One loss; `error` is what the client is told if the request cannot go on."""

    reason: LossReason
    error: PenstockError

    @classmethod
    def of(cls, error: PenstockError, *, is_draining: bool) -> Loss:
        """The loss that an error stands for, of a replica that may have been leaving."""
        if not isinstance(error, UnavailableError):
            return cls(reason=LossReason.FAILED, error=error)
        reason = LossReason.DRAINED if is_draining else LossReason.CUT
        return cls(reason=reason, error=error)
