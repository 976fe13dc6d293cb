"""Limits of one engine's scheduler: plain ints, checked once."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.base.errors import ConfigError
from replicas.engine.speculation import SpeculationConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Limits of one scheduler.

    Raises:
        ConfigError: a limit is below 1.
    """

    max_running_requests: int
    """Choices in a step."""
    max_step_tokens: int
    """Query tokens in a step."""
    max_context: int
    """Prompt and output tokens of one choice."""
    block_size: int
    num_blocks: int
    prefix_caching: bool = True
    max_waiting_requests: int = 256
    """Choices that may wait when another request arrives."""
    speculation: SpeculationConfig | None = None
    """How tokens are drafted; None: they are not."""

    def __post_init__(self) -> None:
        for name in (
            "max_running_requests",
            "max_step_tokens",
            "max_context",
            "block_size",
            "num_blocks",
            "max_waiting_requests",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be >= 1.", param=name)
