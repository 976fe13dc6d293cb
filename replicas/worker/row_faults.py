"""Live requests of a rank that must fail, and why.

A row whose sampling failed stays in the plans made before that was known: it goes on with a
stand-in for the token, and whoever asks hears the error.
"""

from __future__ import annotations

from cluster.base.errors import InternalError
from replicas.engine.scheduler_output import SchedulerOutput


class RowFaults:
    """Errors by request; the first one of a request stays."""

    def __init__(self) -> None:
        self._errors: dict[int, str] = {}
        self._failed_steps: dict[int, int] = {}

    def __bool__(self) -> bool:
        return bool(self._errors)

    def note(self, key: int, error: str) -> None:
        """The request is faulty in itself, on every rank."""
        self._errors[key] = error

    def fail(self, key: int, error: str, step: int) -> None:
        """Sampling for the request failed in `step`."""
        if key not in self._errors:
            self._errors[key], self._failed_steps[key] = error, step

    def forget(self, key: int) -> None:
        """The request is gone."""
        self._errors.pop(key, None)
        self._failed_steps.pop(key, None)

    def of(self, key: int) -> str:
        """Why the request must fail; empty when it is sound."""
        return self._errors.get(key, "")

    def check(self, plan: SchedulerOutput) -> None:
        """A plan made when a failure was known names no failed row: else only this rank failed.

        Then the ranks' rows have parted, and every further token would be wrong.

        Raises:
            InternalError: it does.
        """
        if not self._failed_steps:
            return
        for key in plan.keys:
            step = self._failed_steps.get(key)
            if step is not None and plan.step > step + 1:
                raise InternalError(
                    f"Sampling for request {key} failed in step {step} on this rank only: "
                    f"{self._errors[key]}"
                )
