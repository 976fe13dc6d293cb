"""A communicator whose waits a `PeerWatch` looks after, as it does after the exchanges'.

In an expert-parallel replica a rank also waits for its tensor-parallel peers. When one of them is
stopped there, only the watch can say so before the deadline; the wait itself ends at its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from cluster.base.errors import CollectiveTimeoutError, InternalError, WorkerDiedError
from cluster.dist.communicator import Communicator
from cluster.dist.peer_watch import PeerWatch

if TYPE_CHECKING:
    import torch

ResultT = TypeVar("ResultT")


class WatchedCommunicator:
    """A `Communicator` over one that may be exchanged; errors name ranks as the watch does.

    Layers keep this object while the group behind it ends and is made anew.

    Args:
        rank: this rank's index on the axis, in every group.
        size: number of ranks on the axis.
    """

    def __init__(self, rank: int, size: int) -> None:
        self._rank = rank
        self._size = size
        self._group: tuple[Communicator, PeerWatch] | None = None

    @property
    def rank(self) -> int:
        """This rank's index on the axis."""
        return self._rank

    @property
    def size(self) -> int:
        """Number of ranks on the axis."""
        return self._size

    def join(self, group: Communicator, watch: PeerWatch) -> None:
        """Use a group; the one before must have been left."""
        self._group = (group, watch)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over ranks."""
        return self._watched("all-reduce", lambda group: group.all_reduce(tensor))

    def all_gather(self, tensor: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """Concatenate all ranks' tensors along `dim`."""
        return self._watched("all-gather", lambda group: group.all_gather(tensor, dim))

    def broadcast(self, tensor: torch.Tensor, src: int = 0) -> torch.Tensor:
        """Copy `src`'s tensor into everybody's."""
        return self._watched("broadcast", lambda group: group.broadcast(tensor, src))

    def barrier(self) -> None:
        """Return when every rank has called it."""
        self._watched("barrier", lambda group: group.barrier())

    def close(self) -> None:
        """Leave the group; the watch stays. Safe to call twice."""
        group, self._group = self._group, None
        if group is not None:
            group[0].close()

    def _watched(self, operation: str, call: Callable[[Communicator], ResultT]) -> ResultT:
        if self._group is None:
            raise InternalError(f"Rank {self._rank} of {self._size} has no group for {operation}.")
        group, watch = self._group
        with watch.waiting(f"a tensor-parallel {operation}"):
            try:
                return call(group)
            except (WorkerDiedError, CollectiveTimeoutError) as error:
                # What the watch takes for a broken transport: it finds out who is at fault.
                raise RuntimeError(error.cause) from error
