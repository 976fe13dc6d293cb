"""What ranks do in the tests of exchanges over gloo; each function runs on every rank."""

from __future__ import annotations

import functools
import os
import signal
import tempfile
import time
from typing import Any

import torch

from cluster.base.errors import InternalError, PenstockError
from cluster.dist.communicator import Communicator
from cluster.dist.expert_peers import ExpertPeers, join_expert_peers
from cluster.dist.rank_topology import RankTopology
from cluster.dist.rendezvous import Rendezvous, pick_port
from moe.exchange.exchanges import Exchanges
from moe.exchange.reference import partial_sums, reference_sums
from moe.exchange.schemes import Scheme
from moe.exchange.wire import WireFormat
from tests.support.routed_rows import DIM, TOP_K, expert, physical, placement, rows_of_rank

WIRE = WireFormat(dim=DIM, dtype=torch.float32, top_k=TOP_K)


def join(
    communicator: Communicator, topology: RankTopology, timeout_s: float = 20.0, epoch: int = 0
) -> ExpertPeers:
    """All ranks' expert peers, on a port that rank 0 finds."""
    port = torch.tensor([pick_port("127.0.0.1") if communicator.rank == 0 else 0])
    place = Rendezvous(
        host="127.0.0.1", port=int(communicator.broadcast(port)), group="ep", epoch=epoch
    )
    return join_expert_peers(
        rank=communicator.rank, topology=topology, rendezvous=place, timeout_s=timeout_s
    )


def one_layer(exchanges: Exchanges, slots: Any, inputs: Any, rank: int) -> torch.Tensor:
    """Dispatch, expert sums and combine of one layer."""
    exchange = exchanges.for_layer(3, slots)
    arrivals = exchange.dispatch(*inputs[rank]).wait()
    own = functools.partial(expert, slots)
    return exchange.combine(partial_sums(arrivals, slots.firsts[rank], own), arrivals)


def all_schemes(
    communicator: Communicator, node_of_W: list[str], rows: list[int], without_memory: int | None
) -> Any:
    """Every scheme and placement over one group; True where it equals the one-process result.

    Rank `without_memory` cannot make what the ranks of a node share memory through.
    """
    topology = RankTopology(tuple(node_of_W))
    if communicator.rank == without_memory:
        tempfile.tempdir = "/nowhere"
    peers = join(communicator, topology)
    exchanges = Exchanges(peers, topology, WIRE, slot_rows=4)
    answers = {}
    for where in ("even", "scattered", "replicated"):
        for routes in ("random", "skewed"):
            slots = placement(where, topology)
            inputs = []
            for rank, count in enumerate(rows):
                hidden, logical, weights = rows_of_rank(rank, count, routes, whole=True)
                inputs.append((hidden, physical(slots, topology, rank, logical), weights))
            expected = reference_sums(inputs, functools.partial(expert, slots))
            for scheme in [*Scheme, *reversed(Scheme)]:
                exchanges.use(scheme)
                got = one_layer(exchanges, slots, inputs, communicator.rank)
                same = torch.equal(got, expected[communicator.rank])
                answers[f"{where} {routes} {scheme}"] = same
    gathered = peers.world.all_gather_bytes(bytes([communicator.rank]) * 3, "header")
    overflows = exchanges.num_overflows
    peers.close()
    peers.close()
    return {
        "equal": answers,
        "header": [list(piece) for piece in gathered],
        "overflows": overflows,
        "memory": peers.shared is not None,
    }


def layers_until_failure(
    communicator: Communicator,
    node_of_W: list[str],
    scheme: str,
    victim: int,
    fault: str,
    patience_s: float = 10.0,
) -> Any:
    """Run layers; the victim kills, stops or delays itself in the middle of one.

    Survivors say what they were told, when, and whether they can form the next epoch.
    """
    topology = RankTopology(tuple(node_of_W))
    peers = join(communicator, topology, patience_s)
    pids = [int(pid) for pid in peers.world.all_gather_bytes(b"%16d" % os.getpid(), "pids")]
    exchanges = Exchanges(peers, topology, WIRE, slot_rows=4)
    exchanges.use(scheme)
    slots = placement("even", topology)
    inputs = []
    for rank in range(topology.num_ranks):
        hidden, logical, weights = rows_of_rank(rank, 6, "random", whole=True)
        inputs.append((hidden, physical(slots, topology, rank, logical), weights))
    rank = communicator.rank
    for _ in range(3):
        one_layer(exchanges, slots, inputs, rank)
    exchange = exchanges.for_layer(3, slots)
    pending = exchange.dispatch(*inputs[rank])
    if rank == victim:
        _suffer(fault)
    begin_s = time.monotonic()
    try:
        arrivals = pending.wait()
        own = functools.partial(expert, slots)
        exchange.combine(partial_sums(arrivals, slots.firsts[rank], own), arrivals)
        one_layer(exchanges, slots, inputs, rank)
    except PenstockError as error:
        noticed_s = time.monotonic() - begin_s
        try:
            one_layer(exchanges, slots, inputs, rank)
        except PenstockError as again:
            closed = again.cause == error.cause
        peers.close()
        if rank == (victim + 1) % topology.num_ranks and fault == "stop":
            time.sleep(1.0)  # the others have been told by now
            os.kill(pids[victim], signal.SIGKILL)
        return {"code": error.code, "cause": error.cause, "after_s": noticed_s, "stays": closed}
    raise InternalError("nobody noticed")


def _suffer(fault: str) -> None:
    if fault == "exit":
        os._exit(7)
    if fault == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if fault == "late":
        time.sleep(4.0)
