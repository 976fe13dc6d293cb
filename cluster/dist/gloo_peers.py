"""Bytes between some ranks over gloo; see peer_group.py for the contract.

gloo sends a message only once it knows that the receiver has posted its receive, so a transfer that
both begin together costs two one-way delays; one whose receive was posted earlier costs one.
A blocked gloo wait cannot be cancelled. It ends when any wait of the same group times out, because
gloo then closes all connections of the group. So each group holds a fuse: a receive that nobody
answers, which a thread waits for with a timeout of a millisecond to end all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store, Work

from cluster.base.errors import InternalError
from cluster.dist.peer_group import Transfer
from cluster.dist.peer_watch import PeerWatch
from cluster.dist.store import gloo_options

_FUSE_TAG = 2**30
_FUSE_TIMEOUT = timedelta(milliseconds=1)
# The watch gives its verdict at the deadline; gloo's own, which names nobody, must come later.
_GLOO_MARGIN_S = 20.0


class _Gloo(Protocol):
    """The part of torch's gloo group used here; its stubs leave it out."""

    def alltoall_base(
        self,
        output: torch.Tensor,
        own: torch.Tensor,
        output_splits: list[int],
        input_splits: list[int],
        options: dist.AllToAllOptions,
    ) -> Work: ...

    def _allgather_base(self, output: torch.Tensor, own: torch.Tensor) -> Work: ...

    def send(self, tensors: list[torch.Tensor], peer: int, tag: int) -> Work: ...

    def recv(self, tensors: list[torch.Tensor], peer: int, tag: int) -> Work: ...

    def shutdown(self) -> None: ...


class GlooPeers:
    """One group of ranks; usable when the constructor returns.

    Args:
        keys: where the members meet; unique to the group and epoch.
        rank: this rank, as a rank of the whole expert-parallel group.
        ranks: the members, ascending, `rank` among them.
        host: address to listen on.
        watch: who names what goes wrong; also holds the deadline.
        timeouts_s: for meeting, and for a wait.

    Raises:
        RuntimeError: not all members came in time.
    """

    def __init__(
        self,
        *,
        keys: Store,
        rank: int,
        ranks: tuple[int, ...],
        host: str,
        watch: PeerWatch,
        timeouts_s: tuple[float, float],
    ) -> None:
        self.ranks = ranks
        self.rank = ranks.index(rank)
        self.size = len(ranks)
        self._watch = watch
        connect_s, wait_s = timeouts_s
        self._timeout = timedelta(seconds=wait_s + _GLOO_MARGIN_S)
        self._group: _Gloo | None = None
        self._fuse: Work | None = None
        if self.size > 1:
            options = gloo_options(host, connect_s)
            gloo = dist.ProcessGroupGloo(keys, self.rank, self.size, options)
            gloo._set_default_timeout(self._timeout)
            self._group = cast("_Gloo", gloo)
            never_filled = torch.empty(1, dtype=torch.uint8)
            self._fuse = self._group.recv([never_filled], (self.rank + 1) % self.size, _FUSE_TAG)
            watch.add_breaker(self._break)

    def all_to_all(
        self,
        received: torch.Tensor,
        sent: torch.Tensor,
        received_splits: Sequence[int],
        sent_splits: Sequence[int],
    ) -> Transfer:
        """Start the exchange of consecutive pieces; zero bytes to or from anybody are fine."""
        _check(received, sum(received_splits))
        _check(sent, sum(sent_splits))
        self._watch.check()
        if self._group is None:
            received.copy_(sent)
            return _Done()
        work = self._start(
            "alltoall_base",
            received,
            sent,
            list(received_splits),
            list(sent_splits),
            dist.AllToAllOptions(),
        )
        return _GlooTransfer(work, self._watch, self._timeout)

    def send(self, data: torch.Tensor, peer: int, tag: int) -> Transfer:
        """Start a message to one other member."""
        _check(data, data.numel())
        self._watch.check()
        return _GlooTransfer(self._start("send", [data], peer, tag), self._watch, self._timeout)

    def receive(self, into: torch.Tensor, peer: int, tag: int) -> Transfer:
        """Post a receive from one other member."""
        _check(into, into.numel())
        self._watch.check()
        return _GlooTransfer(self._start("recv", [into], peer, tag), self._watch, self._timeout)

    def all_gather_bytes(self, own: bytes, what: str) -> list[bytes]:
        """Everybody's bytes, in member order."""
        self._watch.check()
        if self._group is None:
            return [own]
        mine = torch.frombuffer(bytearray(own), dtype=torch.uint8)
        everybody = torch.empty(self.size * len(own), dtype=torch.uint8)
        work = self._start("_allgather_base", everybody, mine)
        _GlooTransfer(work, self._watch, self._timeout).wait(what)
        data = everybody.numpy().tobytes()
        return [data[len(own) * i : len(own) * (i + 1)] for i in range(self.size)]

    def close(self) -> None:
        """Leave the group; safe to call twice. The watch must have been closed before."""
        group, self._group, self._fuse = self._group, None, None
        if group is not None:
            group.shutdown()

    def _start(self, call: str, *arguments: Any) -> Work:
        if self._group is None:
            raise InternalError(f"A group of {self.size} that is closed or alone cannot {call}.")
        with self._watch.waiting(f"the start of {call}"):
            work: Work = getattr(self._group, call)(*arguments)
        return work

    def _break(self) -> None:
        fuse, self._fuse = self._fuse, None
        if fuse is None:
            return
        try:
            fuse.wait(_FUSE_TIMEOUT)
        except RuntimeError:
            return  # as intended


class _GlooTransfer:
    """One piece of gloo's work; holds its tensors until it has ended."""

    def __init__(self, work: Work, watch: PeerWatch, timeout: timedelta) -> None:
        self._work = work
        self._watch = watch
        self._timeout = timeout

    def wait(self, what: str) -> None:
        """Return when it has ended."""
        with self._watch.waiting(what):
            self._work.wait(self._timeout)


class _Done:
    def wait(self, what: str) -> None:
        """Nothing was on its way."""


def _check(tensor: torch.Tensor, num_bytes: int) -> None:
    # gloo reports some of these only at the next collective, at another rank.
    if tensor.dtype != torch.uint8 or tensor.dim() != 1 or not tensor.is_contiguous():
        raise InternalError("Only contiguous one-dimensional uint8 tensors travel between ranks.")
    if tensor.numel() != num_bytes:
        raise InternalError(f"A buffer of {tensor.numel()} bytes does not hold {num_bytes}.")
