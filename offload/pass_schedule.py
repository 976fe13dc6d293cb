"""The schedule of one pass: what computes in which order, and when the KV cache moves. Pure.

    zig-zag         layer 0            layer 1            layer 2
    weights         take ------- give  take ------- give  take ...
    micro-batches   0    1    2        0    1    2        0
    KV loading      1    2    0'       1'   2'   0''      1''

A layer is taken once and computes all micro-batches of the step before the next one is taken (the
block schedule of FlexGen, Sheng et al. 2023, arXiv 2303.06865, section 4.1). A request joins at
layer 0 only: a step's micro-batches are fixed when it begins.

Where the KV cache is in host memory, the blocks of a micro-batch are loaded into a window ahead of
its turn, and what it has written is stored back. The link does loads and stores in the order given
here, so a window may be loaded again as soon as its store has been asked for.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache


class PassOpKind(enum.StrEnum):
    """What happens in a pass."""

    TAKE = "take"
    """Wait for the layer's weights and hold them."""
    LOAD_KV = "load kv"
    """Start to copy the micro-batch's blocks of the layer into the window."""
    COMPUTE = "compute"
    """Compute the layer for the micro-batch, on the KV cache or in its window once loaded."""
    STORE_KV = "store kv"
    """Start to copy the blocks that were written back; the window is free."""
    GIVE = "give"
    """The layer's weights are not used again in this pass."""


@dataclass(frozen=True, slots=True)
class PassOp:
    """One operation; `part` and `window` are -1 where they mean nothing."""

    kind: PassOpKind
    layer: int
    part: int = -1
    window: int = -1


@lru_cache(maxsize=256)
def build_pass(num_layers: int, joins: tuple[bool, ...], num_windows: int) -> tuple[PassOp, ...]:
    """The operations of one pass.

    Args:
        joins: for each micro-batch whether it goes on with a request of the one before, whose
            keys and values it needs.
        num_windows: places for a micro-batch's blocks of one layer; 0: the cache is on the device.

    Raises:
        ValueError: there is nothing to compute.
    """
    num_parts = len(joins)
    if num_layers < 1 or num_parts < 1 or num_windows < 0:
        raise ValueError(f"no pass has {num_layers} layers and {num_parts} micro-batches")
    ops: list[PassOp] = []
    loads = _Loads(num_layers, joins, num_windows)
    for layer in range(num_layers):
        ops.append(PassOp(PassOpKind.TAKE, layer))
        for part in range(num_parts):
            turn = layer * num_parts + part
            ops += loads.until(turn)
            window = turn % num_windows if num_windows else -1
            ops.append(PassOp(PassOpKind.COMPUTE, layer, part, window))
            if num_windows:
                ops.append(PassOp(PassOpKind.STORE_KV, layer, part, window))
        ops.append(PassOp(PassOpKind.GIVE, layer))
    return tuple(ops)


class _Loads:
    """Turns (layer by layer, part by part) whose blocks are still to be loaded, in order."""

    def __init__(self, num_layers: int, joins: Sequence[bool], num_windows: int) -> None:
        self._joins = joins
        self._num_windows = num_windows
        self._num_turns = num_layers * len(joins) if num_windows else 0
        self._next = 0

    def until(self, turn: int) -> list[PassOp]:
        """The loads that can begin before `turn` computes, its own among them at the latest."""
        ops = []
        last = min(turn + self._num_windows, self._num_turns)
        while self._next < last:
            layer, part = divmod(self._next, len(self._joins))
            if self._joins[part] and self._next > turn:
                break
            window = self._next % self._num_windows
            ops.append(PassOp(PassOpKind.LOAD_KV, layer, part, window))
            self._next += 1
        return ops
