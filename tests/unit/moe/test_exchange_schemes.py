"""Every scheme gives the one-process result: shapes, placements, replicas, skew, idle ranks."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

from cluster.dist.rank_topology import RankTopology
from moe.exchange.answers import answers_for
from moe.exchange.exchanges import Exchanges
from moe.exchange.reference import partial_sums, reference_pairs, reference_sums
from moe.exchange.schemes import Scheme
from moe.exchange.wire import Combine, Dispatch, WireFormat
from moe.row_moves import RowWork
from replicas.kernels.cpu_row_moves import CpuRowMoves
from replicas.kernels.cpu_row_sums import CpuRowSums
from tests.support.routed_rows import (
    DIM,
    TOP_K,
    expert,
    physical,
    placement,
    rows_of_rank,
)
from tests.support.thread_peers import STREAM_HEADER_BYTES, Hub, on_threads

SHAPES = list(itertools.product((1, 2, 3, 4), (1, 2, 3, 4)))
UNEVEN = [("a", "a", "a", "b", "b"), ("a", "a", "b", "b", "b", "b", "b"), ("a", "b", "b", "b")]
TOPOLOGIES = [RankTopology.regular(*shape) for shape in SHAPES] + [RankTopology(n) for n in UNEVEN]
SLOT_ROWS = 3
LOWER_BITS_TAG = 4


def row_counts(kind: str, rank: int) -> int:
    """How many rows a rank has."""
    return {"some": (5 * rank + 3) % 9, "idle": 7 if rank == 0 else 0, "none": 0}[kind]


def inputs_of(topology, slots, counts, routes, *, whole, dtype=torch.float32):
    inputs = []
    for rank in range(topology.num_ranks):
        hidden, logical, weights = rows_of_rank(
            rank, row_counts(counts, rank), routes, whole=whole, dtype=dtype
        )
        inputs.append((hidden, physical(slots, topology, rank, logical), weights))
    return inputs


def run_layers(topology, cases, wire=None, slot_rows=SLOT_ROWS, *, shared=True, row_work=None):
    """All cases, one after the other, over one group; per case and rank (pairs, sums)."""
    wire = wire or WireFormat(dim=DIM, dtype=torch.float32, top_k=TOP_K)

    def body(rank, peers):
        exchanges = Exchanges(peers, topology, wire, slot_rows=slot_rows, row_work=row_work)
        answers = []
        for scheme, slots, inputs in cases:
            exchanges.use(scheme)
            exchange = exchanges.for_layer(0, slots)
            hidden, chosen, weights = inputs[rank]
            arrivals = exchange.dispatch(hidden, chosen, weights).wait()
            own_expert = functools.partial(expert, slots)
            partial = partial_sums(arrivals, slots.firsts[rank], own_expert)
            answers.append((arrivals, exchange.combine(partial, arrivals)))
        return answers, exchanges.num_overflows

    hub = Hub(topology, shared=shared)
    by_rank = on_threads(hub, body)
    overflows = sum(count for _, count in by_rank)
    return [[answers[i] for answers, _ in by_rank] for i in range(len(cases))], overflows, hub


@pytest.mark.parametrize("shared", [True, False], ids=["memory", "network"])
@pytest.mark.parametrize(
    "topology", TOPOLOGIES, ids=lambda t: "-".join(map(str, map(len, t.nodes)))
)
def test_whole_numbers_come_back_bit_equal(topology, shared):
    cases, expected = [], []
    for where, counts, routes in itertools.product(
        ("even", "scattered", "replicated"), ("some", "idle", "none"), ("random", "skewed")
    ):
        slots = placement(where, topology)
        inputs = inputs_of(topology, slots, counts, routes, whole=True)
        sums = reference_sums(inputs, functools.partial(expert, slots))
        for scheme in Scheme:
            cases.append((scheme, slots, inputs))
            expected.append(sums)
    answers, overflows, _ = run_layers(topology, cases, shared=shared)
    for (scheme, slots, inputs), by_rank, sums in zip(cases, answers, expected, strict=True):
        pairs = 0
        for rank, (arrivals, got) in enumerate(by_rank):
            assert torch.equal(got, sums[rank]), (scheme, rank)
            offsets_L1 = arrivals.pairs().offsets_L1
            pairs += int(offsets_L1[-1])
            assert offsets_L1.numel() == slots.counts[rank] + 1
            assert offsets_L1[-1] == len(reference_pairs(inputs, slots, rank))
        assert pairs == sum(chosen.numel() for _, chosen, _ in inputs)
    has_slots = topology.num_nodes > 1 or (topology.num_ranks > 1 and not shared)
    assert (overflows > 0) == has_slots, "the second round must have been taken"


@pytest.fixture(params=["torch", "compiled"])
def row_work(request):
    """What handles rows on their way."""
    if request.param == "torch":
        return RowWork()
    library = request.getfixturevalue("cpu_kernels").library
    return RowWork(moves=CpuRowMoves(library), sums=CpuRowSums(library))


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [(torch.float32, "near"), (torch.bfloat16, "near"), (torch.float32, "far apart")],
)
@pytest.mark.parametrize(
    "topology", TOPOLOGIES, ids=lambda t: "-".join(map(str, map(len, t.nodes)))
)
def test_real_numbers_come_back_bit_equal(topology, dtype, kind, row_work):
    cases, expected = [], []
    for where, routes in (("even", "random"), ("scattered", "skewed"), ("replicated", "random")):
        slots = placement(where, topology)
        inputs = inputs_of(topology, slots, "some", routes, whole=False, dtype=dtype)
        if kind == "far apart":
            # Gate weights from 1 down to 1e-8: 31 bits do not hold that, second messages do.
            inputs = [(rows, chosen, 1e-8 ** (4 * gate % 1)) for rows, chosen, gate in inputs]
        sums = reference_sums(inputs, functools.partial(expert, slots))
        cases += [(scheme, slots, inputs) for scheme in Scheme]
        expected += [sums] * len(Scheme)
    wire = WireFormat(dim=DIM, dtype=dtype, top_k=TOP_K)
    answers, _, hub = run_layers(topology, cases, wire, row_work=row_work)
    for case, by_rank, sums in zip(cases, answers, expected, strict=True):
        for rank, (_, got) in enumerate(by_rank):
            assert torch.equal(got, sums[rank]), (case[0], rank)
    assert (hub.num_by_tag[LOWER_BITS_TAG] > 0) == (kind == "far apart" and topology.num_ranks > 1)


def test_a_rounding_per_row_is_all_that_parts_the_sums_from_plain_ones():
    topology = RankTopology.regular(1, 1)
    slots = placement("even", topology)
    ((hidden, chosen, weights),) = inputs_of(topology, slots, "idle", "random", whole=False)
    (sums,) = reference_sums([(hidden, chosen, weights)], functools.partial(expert, slots))
    plain = torch.zeros(hidden.shape, dtype=torch.float64)
    for row, column in itertools.product(range(len(hidden)), range(TOP_K)):
        answer = expert(slots, int(chosen[row, column]), hidden[row : row + 1])[0]
        plain[row] += weights[row, column].double() * answer.double()
    assert (sums - plain).abs().max() <= 1e-6 * plain.abs().max()


@pytest.mark.parametrize(
    ("wire", "tolerance"),
    [
        ({"dispatch": Dispatch.INT8}, 0.02),
        ({"dispatch": Dispatch.FP8}, 0.08),
        ({"combine": Combine.BF16}, 0.02),
        ({"dispatch": Dispatch.INT8, "combine": Combine.BF16}, 0.03),
    ],
)
def test_lossy_formats_are_close_and_smaller(wire, tolerance):
    topology = RankTopology.regular(2, 2)
    slots = placement("even", topology)
    inputs = inputs_of(topology, slots, "some", "random", whole=False)
    cases = [(scheme, slots, inputs) for scheme in Scheme]
    plain = WireFormat(dim=DIM, dtype=torch.float32, top_k=TOP_K)
    lossy = WireFormat(dim=DIM, dtype=torch.float32, top_k=TOP_K, **wire)
    _, _, exact_hub = run_layers(topology, cases, plain)
    answers, _, hub = run_layers(topology, cases, lossy)
    expected = reference_sums(inputs, functools.partial(expert, slots))
    for by_rank in answers:
        for (_, got), sums in zip(by_rank, expected, strict=True):
            scale = sums.abs().max().item() if sums.numel() else 1.0
            assert (got - sums).abs().max().item() <= tolerance * scale if sums.numel() else True
            assert not torch.equal(got, sums) or not sums.numel()
    assert hub.node_bytes < exact_hub.node_bytes


def test_one_row_per_node_crosses_and_messages_fall_by_the_ranks_of_a_node():
    topology = RankTopology.regular(4, 4)
    slots = placement("even", topology)
    inputs = inputs_of(topology, slots, "some", "random", whole=True)
    traffic = {}
    for scheme in (Scheme.FLAT, Scheme.HIERARCHICAL):
        _, _, hub = run_layers(topology, [(scheme, slots, inputs)])
        traffic[scheme] = hub
    rows = {Scheme.FLAT: 0, Scheme.HIERARCHICAL: 0}
    for source, (_, chosen, _) in enumerate(inputs):
        for row in chosen.tolist():
            ranks = {slots.rank_of_slot[slot] for slot in row}
            away = {r for r in ranks if topology.node_index(r) != topology.node_index(source)}
            rows[Scheme.FLAT] += len(away)
            rows[Scheme.HIERARCHICAL] += len({topology.node_index(r) for r in away})
    wire = WireFormat(dim=DIM, dtype=torch.float32, top_k=TOP_K)
    for scheme, hub in traffic.items():
        payload = rows[scheme] * (wire.row_bytes + answers_for(DIM, Combine.FP32).num_bytes)
        if scheme is Scheme.FLAT:
            assert hub.node_bytes == payload + 8 * 16 * 12  # counts
        else:
            assert hub.node_bytes == payload + STREAM_HEADER_BYTES * hub.node_messages
            assert 16 * 3 < hub.node_messages <= 2 * 16 * 3  # nobody answers to no rows


def test_rows_without_an_expert_come_back_as_zero():
    topology = RankTopology.regular(2, 2)
    slots = placement("even", topology)
    inputs = inputs_of(topology, slots, "some", "random", whole=True)
    for _, chosen, _ in inputs:
        chosen[: len(chosen) // 2] = -1
        chosen[len(chosen) // 2 :, 1] = -1
    answers, _, _ = run_layers(topology, [(s, slots, inputs) for s in Scheme])
    expected = reference_sums(inputs, functools.partial(expert, slots))
    for by_rank in answers:
        for (_, got), sums in zip(by_rank, expected, strict=True):
            assert torch.equal(got, sums)
