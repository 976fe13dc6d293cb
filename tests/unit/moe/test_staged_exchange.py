"""Experts on devices behind every exchange: order of copies, tensors' homes, bits of the sums."""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Sequence

import pytest
import torch

from cluster.dist.communicator import SingleRank
from cluster.dist.rank_topology import RankTopology
from moe.block import BlockParts, MixtureBlock
from moe.exchange.base import Arrivals
from moe.exchange.exchanges import Exchanges
from moe.exchange.reference import partial_sums, reference_sums
from moe.exchange.schemes import Scheme
from moe.exchange.staged import StagedExperts
from moe.exchange.wire import WireFormat
from moe.expert_table import ExpertTable
from moe.experts import DOWN, UP, ExpertRunner
from moe.spec import GateSpec, MoeSpec
from moe.spread_experts import SpreadExperts
from replicas.kernels.triton_ops import TritonKernels
from replicas.layers.mixture import ExpertUnits, KernelMath
from replicas.layers.weights import ResidentWeights
from replicas.worker.device_streams import Event
from replicas.worker.host_stage import HostStage
from tests.support.fake_streams import FakeDevice, FakeEvent
from tests.support.plain_mixture import HeldExperts, SiluMath, random_experts
from tests.support.pretend_device import DEVICE, PretendDevice, PretendTensor, pretend_device
from tests.support.routed_rows import (
    DIM,
    NUM_EXPERTS,
    TOP_K,
    expert,
    physical,
    placement,
    rows_of_rank,
)
from tests.support.thread_peers import Hub, ThreadPeers, on_threads

TOPOLOGY = RankTopology.regular(2, 2)
WIRE = WireFormat(dim=DIM, dtype=torch.float32, top_k=TOP_K)
ROWS = (5, 0, 3, 9)
"""Of each rank; one idles."""


def spread(peers: ThreadPeers, rank: int, kind: str = "replicated") -> SpreadExperts:
    slots = placement(kind, TOPOLOGY)
    table = ExpertTable(layer=0, logical_by_rank=slots.logical_by_rank)
    return SpreadExperts([table], Exchanges(peers, TOPOLOGY, WIRE, slot_rows=3), rank)


def not_pinned(memory: torch.Tensor) -> Callable[[], object]:
    """Zeros, which are ids of experts too: whoever reads too early goes on with them."""
    memory.zero_()
    return lambda: memory.fill_(0xA5)


def sums_of_devices(
    scheme: Scheme, seed: int, spoil: Callable[[HostStage, FakeDevice], None] | None = None
) -> list[list[torch.Tensor]]:
    """What three layers give each rank, whose device does its work as late as events allow."""
    slots = placement("replicated", TOPOLOGY)

    def body(rank: int, peers: ThreadPeers) -> list[torch.Tensor]:
        device = FakeDevice(seed=10 * seed + rank)
        stage = HostStage(device, not_pinned)
        if spoil is not None:
            spoil(stage, device)
        host = spread(peers, rank)
        host.exchanges.use(scheme)
        exchange, queue, sums = StagedExperts(host, stage).exchange(0), device.computing(), []
        for turn in range(3):
            rows = given(rank, turn)
            routed = [torch.full_like(tensor, 1) for tensor in rows]
            queue.work(functools.partial(copy_all, routed, rows))
            arrivals = exchange.dispatch(*routed).wait()
            partial_AD = torch.full(arrivals.hidden_AD.shape, -66.0, dtype=torch.float64)
            compute = functools.partial(
                partial_sums, arrivals, slots.firsts[rank], functools.partial(expert, slots)
            )
            queue.work(lambda into=partial_AD, compute=compute: into.copy_(compute()))
            home_TD = exchange.combine(partial_AD, arrivals)
            sums.append(torch.full_like(home_TD, -77.0))
            queue.work(functools.partial(copy_all, sums[-1:], [home_TD]))
        device.finish()
        return sums

    return on_threads(Hub(TOPOLOGY), body)


def given(rank: int, turn: int) -> list[torch.Tensor]:
    """A rank's rows in a layer."""
    hidden, ids, weight = rows_of_rank(rank, ROWS[rank], "random", whole=False)
    return [hidden + turn, ids, weight]


def copy_all(into: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    for target, source in zip(into, values, strict=True):
        target.copy_(source)


@functools.cache
def expected_sums() -> list[list[torch.Tensor]]:
    slots, by_turn = placement("replicated", TOPOLOGY), []
    for turn in range(3):
        inputs = []
        for rank in range(TOPOLOGY.num_ranks):
            hidden, ids, weight = given(rank, turn)
            inputs.append((hidden, physical(slots, TOPOLOGY, rank, ids), weight))
        by_turn.append(reference_sums(inputs, functools.partial(expert, slots)))
    return [list(of_rank) for of_rank in zip(*by_turn, strict=True)]


def is_right(sums: list[list[torch.Tensor]]) -> bool:
    pairs = zip(itertools.chain(*sums), itertools.chain(*expected_sums()), strict=True)
    return all(torch.equal(actual, wanted) for actual, wanted in pairs)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("scheme", Scheme)
def test_nothing_is_read_before_the_copy_or_the_computation_that_makes_it(
    scheme: Scheme, seed: int
) -> None:
    assert is_right(sums_of_devices(scheme, seed))


def copies_at_once(stage: HostStage, device: FakeDevice) -> None:
    """Forgets that rows and sums have to be computed before they are copied."""
    stage._copying.wait = lambda event: None


def computes_at_once(stage: HostStage, device: FakeDevice) -> None:
    """Forgets that what arrives has to be copied before it is computed with."""
    device.computing().wait = lambda event: None


def reads_at_once(stage: HostStage, device: FakeDevice) -> None:
    """Forgets to wait on the host: for copies that it reads, and for those it writes over."""

    class Ignored(FakeEvent):
        def synchronize(self) -> None:
            """Goes on."""

    record = stage._copying.record

    def recorded() -> Event:
        event = record()
        event.__class__ = Ignored
        return event

    stage._copying.record = recorded


@pytest.mark.parametrize("spoil", [copies_at_once, computes_at_once, reads_at_once])
def test_each_rule_of_the_stage_is_needed(spoil) -> None:
    """Else the test above would prove nothing."""
    assert not all(is_right(sums_of_devices(Scheme.FLAT, seed, spoil)) for seed in range(4))


class PretendStage:
    """`Stage` of a device whose tensors the host cannot look at."""

    def __init__(self, device: PretendDevice) -> None:
        self._device = device

    def to_host(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        read = [self._device.read_back(tensor) for tensor in tensors]
        self._device.mark().wait()
        return read

    def to_device(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [tensor.to(DEVICE, non_blocking=True) for tensor in tensors]


def test_a_block_keeps_what_is_on_the_device_apart_from_what_the_host_has() -> None:
    spec = MoeSpec(gate=GateSpec(num_experts=NUM_EXPERTS, top_k=TOP_K, normalise=True), ffn_dim=8)
    router = torch.randn((NUM_EXPERTS, DIM), generator=torch.Generator().manual_seed(3))
    weights = random_experts(spec, DIM)
    inputs = [given(rank, 0)[0] for rank in range(TOPOLOGY.num_ranks)]

    def layer(layout, rows_TD, tensors, experts):
        parts = BlockParts(
            layer=0, layout=layout, math=SiluMath(), communicator=SingleRank(), sliced=False
        )
        block = MixtureBlock(spec, parts)
        if rows_TD.shape[0]:
            return block.forward(rows_TD, tensors, HeldExperts(experts))
        return block.forward_idle(rows_TD, HeldExperts(experts))

    def on_host(rank: int, peers: ThreadPeers):
        return layer(spread(peers, rank), inputs[rank], {"router.weight": router}, weights)

    def on_device(rank: int, peers: ThreadPeers):
        with pretend_device(strict=False) as device:
            there = {
                number: {name: t.to(DEVICE, non_blocking=True) for name, t in tensors.items()}
                for number, tensors in weights.items()
            }
            layout = StagedExperts(spread(peers, rank), PretendStage(device))
            rows_TD = inputs[rank].to(DEVICE, non_blocking=True)
            gate = {"router.weight": router.to(DEVICE, non_blocking=True)}
            output = layer(layout, rows_TD, gate, there)
            assert output is None or isinstance(output, PretendTensor)
            return None if output is None else output.held

    expected = on_threads(Hub(TOPOLOGY), on_host)
    for output, wanted in zip(on_threads(Hub(TOPOLOGY), on_device), expected, strict=True):
        assert (output is None and wanted is None) or torch.equal(output, wanted)


@pytest.mark.parametrize("kind", ["even", "scattered", "replicated"])
def test_grouped_kernels_give_the_same_bits_wherever_experts_are(kind: str) -> None:
    """Triton's kernels over two nodes of two ranks, against all experts and rows on one."""
    spec = MoeSpec(gate=GateSpec(num_experts=NUM_EXPERTS, top_k=TOP_K), ffn_dim=8)
    tensors = random_experts(spec, DIM)
    units = ResidentWeights({f"layer.0.expert.{e}": tensors[e] for e in tensors})
    assert set(tensors[0]) == {UP, DOWN}
    runner = ExpertRunner(KernelMath(TritonKernels(), spec, "silu"))
    routed = [given(rank, 0) for rank in range(TOPOLOGY.num_ranks)]
    one_at_a_time = threading.Lock()  # Triton's interpreter is one per process

    def computed(arrivals: Arrivals, held: tuple[int, ...]) -> torch.Tensor:
        with one_at_a_time:
            return runner.forward(arrivals, held, ExpertUnits(units, 0))

    def body(rank: int, peers: ThreadPeers) -> torch.Tensor:
        host = spread(peers, rank, kind)
        host.exchanges.use(Scheme.HIERARCHICAL)
        stage = HostStage(FakeDevice(computes_at_once=True), not_pinned)
        exchange = StagedExperts(host, stage).exchange(0)
        arrivals = exchange.dispatch(*routed[rank]).wait()
        return exchange.combine(computed(arrivals, host.held(0)), arrivals)

    for (hidden, ids, weight), home_TD in zip(routed, on_threads(Hub(TOPOLOGY), body), strict=True):
        alone = Arrivals(hidden_AD=hidden, slot_AK=ids, weight_AK=weight, num_local=NUM_EXPERTS)
        assert torch.equal(home_TD, computed(alone, tuple(range(NUM_EXPERTS))).float())
