"""A communicator whose waits a `PeerWatch` looks after, as it does after the exchanges'.

In an expert-parallel replica a rank also waits for its tensor-parallel peers. When one of them is
stopped there, only the watch can say so before the deadline; the wait itself ends at its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from cluster.base.errors import CollectiveTimeoutError, WorkerDiedError
from cluster.dist.communicator import Communicator
from cluster.dist.peer_watch import PeerWatch

if TYPE_CHECKING:
    import torch

ResultT = TypeVar("ResultT")


class WatchedCommunicator:
    """Implements `Communicator` over another one; errors name ranks as the watch knows them."""

    def __init__(self, inner: Communicator, watch: PeerWatch) -> None:
        self._inner = inner
        self._watch = watch

    @property
    def rank(self) -> int:
        """This rank's index on the axis."""
        return self._inner.rank

    @property
    def size(self) -> int:
        """Number of ranks on the axis."""
        return self._inner.size

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over ranks."""
        return self._watched("all-reduce", lambda: self._inner.all_reduce(tensor))

    def all_gather(self, tensor: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """Concatenate all ranks' tensors along `dim`."""
        return self._watched("all-gather", lambda: self._inner.all_gather(tensor, dim))

    def broadcast(self, tensor: torch.Tensor, src: int = 0) -> torch.Tensor:
        """Copy `src`'s tensor into everybody's."""
        return self._watched("broadcast", lambda: self._inner.broadcast(tensor, src))

    def barrier(self) -> None:
        """Return when every rank has called it."""
        self._watched("barrier", self._inner.barrier)

    def close(self) -> None:
        """Leave the group; the watch stays."""
        self._inner.close()

    def _watched(self, operation: str, call: Callable[[], ResultT]) -> ResultT:
        with self._watch.waiting(f"a tensor-parallel {operation}"):
            try:
                return call()
            except (WorkerDiedError, CollectiveTimeoutError) as error:
                # What the watch takes for a broken transport: it finds out who is at fault.
                raise RuntimeError(error.cause) from error
