"""What all mappings of the cluster file have in common."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict

Auto = Literal["auto"]
"""Left to the planner."""


class Section(BaseModel):
    """Base of every mapping in the file: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    later_keys: ClassVar[dict[str, str]] = {}
    """Keys that are planned: refused with this reason, not as unknown."""
