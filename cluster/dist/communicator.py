"""What a layer may ask of its peers: a handful of collectives over one mesh axis.

A layer takes its `Communicator` in the constructor and never looks at a global process group.
Every call has the deadline the communicator was built with; none waits for ever. `SingleRank` is
the axis of size one: every collective is the identity.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class Communicator(Protocol):
    """Collectives over the ranks of one axis, called by all of them in the same order.

    Raises (every collective): CollectiveTimeoutError when a peer does not arrive in time,
    WorkerDiedError when a peer's connection is gone.
    """

    @property
    def rank(self) -> int:
        """This rank's index on the axis."""
        ...

    @property
    def size(self) -> int:
        """Number of ranks on the axis."""
        ...

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over ranks; may work in place and returns the result."""
        ...

    def all_gather(self, tensor: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """Concatenate equal-shaped tensors of all ranks along `dim`, in rank order."""
        ...

    def broadcast(self, tensor: torch.Tensor, src: int = 0) -> torch.Tensor:
        """Copy `src`'s tensor into everybody's; works in place and returns it."""
        ...

    def barrier(self) -> None:
        """Return when every rank has called it."""
        ...

    def close(self) -> None:
        """Leave the group; safe to call twice."""
        ...


class SingleRank:
    """A communicator of one rank."""

    rank = 0
    size = 1

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over one rank is the tensor itself."""
        return tensor

    def all_gather(self, tensor: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """One rank's share is the whole."""
        return tensor

    def broadcast(self, tensor: torch.Tensor, src: int = 0) -> torch.Tensor:
        """Nobody to send to."""
        return tensor

    def barrier(self) -> None:
        """Nobody to wait for."""

    def close(self) -> None:
        """Nothing to leave."""
