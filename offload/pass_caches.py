"""What the layers of a pass compute on: the KV cache itself, or windows for blocks of it."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from cluster.base.errors import InternalError
from offload.kv_windows import KvWindows, WindowPart, in_window
from offload.pass_schedule import PassOp
from replicas.attention.backend import AttentionMetadata

if TYPE_CHECKING:
    import torch


class PassCaches(Protocol):
    """The KV cache of one pass."""

    num_windows: int
    """0: there are none, and nothing is loaded or stored."""

    def place(self, part: AttentionMetadata) -> AttentionMetadata:
        """The next micro-batch with its blocks where they are when it computes."""
        ...

    def load(self, op: PassOp) -> None:
        """Start to load the window."""
        ...

    def cache(self, op: PassOp) -> torch.Tensor:
        """What to compute on, (2, N, B, G, P)."""
        ...

    def store(self, op: PassOp) -> None:
        """Start to store what was written."""
        ...


class CachesInPlace:
    """Implements `PassCaches` where layers compute on the cache itself."""

    num_windows = 0

    def __init__(self, kv_caches: Sequence[torch.Tensor]) -> None:
        self._kv_caches = kv_caches

    def place(self, part: AttentionMetadata) -> AttentionMetadata:
        """As it is."""
        return part

    def load(self, op: PassOp) -> None:
        """Never asked for.

        Raises:
            InternalError: always.
        """
        raise InternalError(f"{op}: the cache has no windows.")

    def cache(self, op: PassOp) -> torch.Tensor:
        """The layer's."""
        return self._kv_caches[op.layer]

    def store(self, op: PassOp) -> None:
        """Never asked for.

        Raises:
            InternalError: always.
        """
        raise InternalError(f"{op}: the cache has no windows.")


class WindowedCaches:
    """Implements `PassCaches` over windows; what fails in between leaves no copy under way."""

    def __init__(self, windows: KvWindows) -> None:
        self.num_windows = len(windows)
        self._windows = windows
        self._parts: list[WindowPart] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self._windows.finish()
        else:
            self._windows.abandon()

    def place(self, part: AttentionMetadata) -> AttentionMetadata:
        """See `PassCaches.place`."""
        self._parts.append(in_window(part, self._windows.block_size))
        return self._parts[-1].metadata

    def load(self, op: PassOp) -> None:
        """See `PassCaches.load`."""
        self._windows.load(op.layer, self._parts[op.part], op.window)

    def cache(self, op: PassOp) -> torch.Tensor:
        """The window, once it is loaded."""
        return self._windows.loaded(op.window)

    def store(self, op: PassOp) -> None:
        """See `PassCaches.store`."""
        self._windows.store(op.layer, self._parts[op.part], op.window)
