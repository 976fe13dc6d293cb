"""Named budgets of bytes: what is allocated is reserved first; what does not fit is refused.

The refusal shows the sum, so that the user sees which part to make smaller. Plain arithmetic; what
the machine has is measured in `offload.host_memory`.
"""

from __future__ import annotations

from collections.abc import Mapping

from cluster.base.amount_text import size_text
from cluster.base.errors import ConfigError


class BudgetError(ConfigError):
    """A budget cannot hold what it has to."""


class Budget:
    """Bytes of one kind of memory.

    Args:
        name: what is limited, as the user knows it: "device_memory".
        limit_bytes: the bound.
        remedy: what the user can do when it is too small.
    """

    def __init__(self, name: str, limit_bytes: int, *, remedy: str = "") -> None:
        self.name = name
        self.limit_bytes = limit_bytes
        self._remedy = remedy or f"Raise {name}, or make one of the parts smaller."
        self._parts: dict[str, int] = {}

    @property
    def reserved_bytes(self) -> int:
        """The sum of all parts."""
        return sum(self._parts.values())

    @property
    def parts(self) -> Mapping[str, int]:
        """What was reserved, by name."""
        return dict(self._parts)

    def reserve(self, part: str, num_bytes: int) -> None:
        """Add `num_bytes` to `part`.

        Raises:
            BudgetError: it does not fit; nothing is reserved.
        """
        wanted = self._parts | {part: self._parts.get(part, 0) + num_bytes}
        total = sum(wanted.values())
        if total > self.limit_bytes:
            sums = " + ".join(f"{name} {size_text(size)}" for name, size in wanted.items())
            raise BudgetError(
                f"{self.name} is {size_text(self.limit_bytes)} and {size_text(total)} are needed: "
                f"{sums}.",
                self._remedy,
                param=self.name,
            )
        self._parts = wanted

    def release(self, part: str) -> None:
        """Give back all of `part`."""
        self._parts.pop(part, None)
