"""What an exchange of tokens asks of its peers: bytes to all, bytes to one, and honest failures.

Everything is bytes (contiguous one-dimensional uint8 tensors); what they mean is the caller's. A
call starts a transfer, `wait` ends it. Waiting names the operation, because a receive may be posted
long before anybody knows for what.

Raises (every wait and every start): WorkerDiedError naming a peer that is gone or does not answer,
CollectiveTimeoutError naming one that lives and does not arrive. After either the group is of no
use any more, here and at every peer; a new group has a new epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class Transfer(Protocol):
    """Bytes on their way; the tensors involved must not be touched before `wait` returns."""

    def wait(self, what: str) -> None:
        """Return when the bytes have left (a send) or are here (anything else).

        Args:
            what: the operation as an error will name it, e.g. `layer 3 dispatch`.
        """
        ...


class PeerGroup(Protocol):
    """Some ranks that exchange bytes; collectives are called by all of them in the same order."""

    @property
    def rank(self) -> int:
        """This rank's index in the group."""
        ...

    @property
    def ranks(self) -> tuple[int, ...]:
        """The members, as ranks of the whole expert-parallel group, ascending."""
        ...

    @property
    def size(self) -> int:
        """Number of members."""
        ...

    def all_to_all(
        self,
        received: torch.Tensor,
        sent: torch.Tensor,
        received_splits: Sequence[int],
        sent_splits: Sequence[int],
    ) -> Transfer:
        """Send consecutive pieces of `sent` to the members in order and fill `received` alike."""
        ...

    def send(self, data: torch.Tensor, peer: int, tag: int) -> Transfer:
        """Send to one member; messages of one tag arrive in the order sent."""
        ...

    def receive(self, into: torch.Tensor, peer: int, tag: int) -> Transfer:
        """Post a receive; a shorter message fills the beginning of `into`."""
        ...

    def all_gather_bytes(self, own: bytes, what: str) -> list[bytes]:
        """Everybody's bytes, in member order; all give equally many."""
        ...


Note = tuple[int, int, int]
"""Three numbers; what they mean is the caller's."""


class NodeMemory(Protocol):
    """Memory of the ranks of one node that all of them can read; raises as above."""

    @property
    def rank(self) -> int:
        """This rank's index in the node."""
        ...

    @property
    def size(self) -> int:
        """Number of members."""
        ...

    def box(self, index: int, num_bytes: int) -> torch.Tensor:
        """This rank's box of that number: uint8, for peers to read once they have been told.

        Nothing of it survives the next call for the same box; who calls knows that nobody reads it
        any more.
        """
        ...

    def tell(self, peer: int, index: int, note: Note) -> None:
        """Say something about a box to one other member; notes arrive in the order told."""
        ...

    def hear(self, peer: int, what: str) -> tuple[torch.Tensor, Note]:
        """Wait for a member's next note: the whole box that it is about, and the note."""
        ...


class Streams(Protocol):
    """A connection to every other rank of a group, for messages that nobody has to ask for."""

    @property
    def rank(self) -> int:
        """This rank's index among the members."""
        ...

    @property
    def size(self) -> int:
        """Number of members."""
        ...

    def send(self, peer: int, note: Note, data: torch.Tensor) -> None:
        """Send to one other member; messages arrive in the order sent.

        Returns at once. Nobody may write to `data` any more: it may leave later.
        """
        ...

    def receive(self, peer: int, place: Callable[[Note], torch.Tensor], what: str) -> None:
        """Wait for a member's next message: its note to `place`, which says where its bytes go.

        They must be exactly as many as there is place for.
        """
        ...
