"""The key-value store where a group's ranks find each other, and the gloo devices they bind.

Rank 0 hosts the store and binds the socket itself: torch would listen on every interface.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, cast

import torch.distributed as dist
from torch._C._distributed_c10d import Store, TCPStore

from cluster.dist.rendezvous import Rendezvous, listen


def open_store(rank: int, place: Rendezvous) -> Store:
    """Host the store (rank 0) or connect to it.

    Raises:
        OSError: rank 0 cannot listen there.
        RuntimeError: nobody listens within `place.connect_timeout_s`.
    """
    deadline = timedelta(seconds=place.connect_timeout_s)
    if rank:
        return TCPStore(place.host, place.port, world_size=None, is_master=False, timeout=deadline)
    listener = listen(place.host, place.port)
    return TCPStore(
        place.host,
        place.port,
        world_size=None,
        is_master=True,
        timeout=deadline,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def gloo_options(bind_host: str, connect_timeout_s: float) -> Any:
    """Options of a gloo group that listens on one address only."""
    options: Any = cast("Any", dist.ProcessGroupGloo)._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=bind_host)]
    options._timeout = timedelta(seconds=connect_timeout_s)
    return options
