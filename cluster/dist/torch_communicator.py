"""Collectives over torch process groups (gloo, NCCL): the only user of torch.distributed.

The group is built directly on its own store, never as torch's global default, so one process may
hold many. Every wait has the deadline given here. gloo listens only on `bind_host`; NCCL follows
its own NCCL_SOCKET_IFNAME, and its deadline is enforced by torch's watchdog because a wait on a
CUDA collective does not block the host.
A group that failed once stays failed: a new epoch is the only way back.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Protocol, cast

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, Work

from cluster.base.errors import (
    CollectiveTimeoutError,
    ConfigError,
    InternalError,
    PenstockError,
    WorkerDiedError,
)
from cluster.dist.rendezvous import Rendezvous, local_address_towards
from cluster.dist.store import gloo_options, open_store

BACKENDS = ("gloo", "nccl")
_TIMEOUT_WORDS = ("timed out", "timeout")


class _Group(Protocol):
    """The part of torch's process-group backends that is used here; its stubs leave it out."""

    def allreduce(self, tensors: list[torch.Tensor]) -> Work: ...

    def _allgather_base(self, output: torch.Tensor, own: torch.Tensor) -> Work: ...

    def broadcast(self, tensors: list[torch.Tensor], options: dist.BroadcastOptions) -> Work: ...

    def barrier(self) -> Work: ...

    def shutdown(self) -> None: ...


class TorchCommunicator:
    """One axis of ranks; usable when the constructor returns.

    Args:
        backend: `gloo` (CPU tensors) or `nccl` (CUDA tensors of the current device).
        rendezvous: the same on all ranks; rank 0 listens there.
        timeout_s: deadline of every collective.
        bind_host: this rank's own address; None means the one that faces the rendezvous.

    Raises:
        ConfigError: unknown backend, or rank and size do not fit.
        CollectiveTimeoutError: not all ranks came within `rendezvous.connect_timeout_s`.
        InternalError: rank 0 cannot listen at the rendezvous.
    """

    def __init__(
        self,
        *,
        rank: int,
        size: int,
        backend: str,
        rendezvous: Rendezvous,
        timeout_s: float,
        bind_host: str | None = None,
    ) -> None:
        if backend not in BACKENDS:
            raise ConfigError(
                f"There is no communication backend {backend!r}.", f"Use one of {BACKENDS}."
            )
        if backend == "nccl" and not dist.is_nccl_available():
            raise ConfigError("This torch has no NCCL.", "Use gloo, or a CUDA build of torch.")
        if not 0 <= rank < size:
            raise ConfigError(f"Rank {rank} does not exist among {size} ranks.")
        self._rank = rank
        self._size = size
        self._timeout_s = timeout_s
        self._closed = False
        self._failure: PenstockError | None = None
        try:
            self._store = open_store(rank, rendezvous)
            keys = PrefixStore(rendezvous.prefix, self._store)
            if backend == "gloo":
                self._group = self._gloo(keys, rendezvous, bind_host)
            else:
                self._group = self._nccl(keys)
        except (RuntimeError, OSError) as error:
            raise self._explain("joining the group", error) from error

    @property
    def rank(self) -> int:
        """This rank's index on the axis."""
        return self._rank

    @property
    def size(self) -> int:
        """Number of ranks on the axis."""
        return self._size

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over ranks; works in place on a contiguous tensor. All ranks get the same bits."""
        summed = tensor.contiguous()
        self._run("all_reduce", lambda: self._group.allreduce([summed]))
        return summed

    def all_gather(self, tensor: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """Concatenate equal-shaped tensors of all ranks along `dim`; the result is contiguous."""
        own = tensor.contiguous()
        gathered = torch.empty(self._size * own.numel(), dtype=own.dtype, device=own.device)
        flat = own.reshape(-1)
        self._run("all_gather", lambda: self._group._allgather_base(gathered, flat))
        by_rank = gathered.view(self._size, *own.shape)
        dim = dim % own.dim()
        joined = list(own.shape)
        joined[dim] *= self._size
        return by_rank.movedim(0, dim).reshape(joined).contiguous()

    def broadcast(self, tensor: torch.Tensor, src: int = 0) -> torch.Tensor:
        """Copy `src`'s tensor into everybody's, in place.

        Raises:
            InternalError: the tensor is not contiguous, so it could not be filled in place.
        """
        if not tensor.is_contiguous():
            raise InternalError("Only a contiguous tensor can be broadcast in place.")
        options = dist.BroadcastOptions()
        options.rootRank = src
        options.rootTensor = 0
        self._run("broadcast", lambda: self._group.broadcast([tensor], options))
        return tensor

    def barrier(self) -> None:
        """Return when every rank has called it."""
        self._run("barrier", lambda: self._group.barrier())

    def close(self) -> None:
        """Leave the group; safe to call twice. Rank 0 takes the store with it."""
        if self._closed:
            return
        self._closed = True
        try:
            self._group.shutdown()
        except RuntimeError as error:
            raise self._explain("leaving the group", error) from error
        finally:
            del self._group, self._store

    def _gloo(self, keys: Store, place: Rendezvous, bind_host: str | None) -> _Group:
        host = bind_host or local_address_towards(place.host, place.port)
        options = gloo_options(host, place.connect_timeout_s)
        group = dist.ProcessGroupGloo(keys, self._rank, self._size, options)
        group._set_default_timeout(timedelta(seconds=self._timeout_s))
        return cast("_Group", group)

    def _nccl(self, keys: Store) -> _Group:
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=self._timeout_s)
        group = dist.ProcessGroupNCCL(keys, self._rank, self._size, options)
        return cast("_Group", group)

    def _run(self, name: str, start: Callable[[], Work]) -> None:
        if self._failure is not None:
            raise type(self._failure)(self._failure.cause, self._failure.remedy)
        if self._closed:
            raise InternalError(f"Rank {self._rank} called {name} after it left its group.")
        try:
            start().wait()
        except RuntimeError as error:
            self._failure = self._explain(name, error)
            raise self._failure from error

    def _explain(self, what: str, error: Exception) -> PenstockError:
        """Our error for a failure of torch, gloo or the store; their text names the peer."""
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        who = f"Rank {self._rank} of {self._size}, {what}"
        if any(word in text.lower() for word in _TIMEOUT_WORDS):
            return CollectiveTimeoutError(f"{who}: a peer did not arrive in time ({text}).")
        if isinstance(error, OSError) and not isinstance(error, ConnectionError):
            return InternalError(f"{who}: {text}.", "Choose another rendezvous address or port.")
        return WorkerDiedError(f"{who}: the connection to a peer is gone ({text}).")
