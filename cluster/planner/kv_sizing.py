"""How many KV blocks a rank gets, and how long a context they carry. Pure arithmetic.

The number of blocks is one figure per model: all ranks of all its replicas have the same, so the
tightest rank decides.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.base.amount_text import size_text
from cluster.base.errors import ConfigError
from cluster.planner.decisions import Decision
from cluster.planner.memory import blocks_for

MIN_AUTO_CONTEXT = 256
"""An automatic plan that cannot hold this many tokens is refused: it could serve nobody."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KvDemand:
    """What one model asks of its cache."""

    param: str
    """Key path of the model entry, for errors."""
    token_bytes: int
    """Keys and values of one token on one rank, all layers."""
    block_size: int
    memory: int | str
    """Bytes per rank, or "auto"."""
    max_context: int | str
    max_position: int
    max_running_requests: int

    @property
    def block_bytes(self) -> int:
        """Bytes of one block on one rank."""
        return self.token_bytes * self.block_size

    @property
    def useful_blocks(self) -> int:
        """Blocks that all running requests can fill at their longest."""
        context = self.max_position if isinstance(self.max_context, str) else self.max_context
        return self.max_running_requests * blocks_for(context, self.block_size)

    @property
    def fixed_bytes(self) -> int:
        """Bytes that were asked for by number."""
        return 0 if isinstance(self.memory, str) else self.memory


@dataclass(frozen=True, slots=True, kw_only=True)
class KvSize:
    """The decided cache."""

    num_blocks: Decision[int]
    max_context: Decision[int]


def size_kv(demand: KvDemand, room_bytes: int) -> KvSize:
    """Decide blocks and context.

    Args:
        room_bytes: what an automatic cache of one rank may take at most.

    Raises:
        ConfigError: the cache cannot hold one request of the context asked for.
    """
    blocks = _num_blocks(demand, room_bytes)
    held = blocks.value * demand.block_size
    context = _max_context(demand, held)
    return KvSize(num_blocks=blocks, max_context=context)


def _num_blocks(demand: KvDemand, room_bytes: int) -> Decision[int]:
    if isinstance(demand.memory, int):
        return Decision(value=demand.memory // demand.block_bytes)
    fitting = max(0, room_bytes) // demand.block_bytes
    useful = demand.useful_blocks
    each = f"{size_text(demand.block_bytes)} per block and rank"
    if useful <= fitting:
        reason = f"what {demand.max_running_requests} requests at full context can fill; {each}"
        return Decision(value=useful, reason=reason)
    return Decision(
        value=fitting, reason=f"{size_text(room_bytes)} per rank are left for the cache; {each}"
    )


def _max_context(demand: KvDemand, held: int) -> Decision[int]:
    if isinstance(demand.max_context, int):
        if held < demand.max_context:
            raise _too_small(demand, held, demand.max_context)
        return Decision(value=demand.max_context)
    least = min(MIN_AUTO_CONTEXT, demand.max_position)
    if held < least:
        raise _too_small(demand, held, least)
    if held >= demand.max_position:
        return Decision(value=demand.max_position, reason="all positions of the model")
    return Decision(
        value=held,
        reason=f"the cache holds {held} tokens, fewer than the model's "
        f"{demand.max_position} positions",
    )


def _too_small(demand: KvDemand, held: int, wanted: int) -> ConfigError:
    blocks = blocks_for(wanted, demand.block_size)
    need = blocks * demand.block_bytes
    arithmetic = (
        f"{blocks} blocks x {demand.block_size} tokens x "
        f"{size_text(demand.token_bytes)} = {size_text(need)} per rank"
    )
    lower = f"lower limits.max_context to {held}" if held >= 1 else ""
    if isinstance(demand.memory, int):
        remedies = [f"Raise kv_cache.memory to {_ceil_size(need)}", lower]
        key = "kv_cache.memory"
    else:
        remedies = ["Give it more memory: fewer replicas, more ranks (tp) or a smaller dtype"]
        remedies += [lower] if isinstance(demand.max_context, int) else []
        key = "kv_cache"
    return ConfigError(
        f"The KV cache holds {held} tokens, but one request of {wanted} needs {arithmetic}.",
        ", or ".join(remedy for remedy in remedies if remedy) + ".",
        param=f"{demand.param}.{key}",
    )


def _ceil_size(num_bytes: int) -> str:
    """The next whole KiB, MiB or GiB (2% steps at most), as one would write it."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if num_bytes >= 50 * unit or unit == 2**10:
            return f"{-(-num_bytes // unit)}{name}"
    raise AssertionError("the last unit always matches")
