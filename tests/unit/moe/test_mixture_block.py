"""The block against a plain double-precision mixture: layouts, slots, shared parts, idle ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.dist.communicator import SingleRank
from moe.block import BlockParts, MixtureBlock
from moe.exchange.base import Exchange
from moe.exchange.local import LocalExchange
from moe.layout import AllHere
from moe.spec import GateSpec, MoeSpec
from tests.support.plain_mixture import HeldExperts, SiluMath, plain_mixture, random_experts

DIM, NUM_EXPERTS = 12, 6
SPEC = MoeSpec(gate=GateSpec(num_experts=NUM_EXPERTS, top_k=3, normalise=True), ffn_dim=8)
HERE = AllHere({0: NUM_EXPERTS})


class Slots:
    """All experts on one rank, in slots of any order; the layer's index is checked."""

    def __init__(self, order: tuple[int, ...]) -> None:
        self._order = order
        self._slot_E = torch.tensor(order).argsort()

    def held(self, layer: int) -> tuple[int, ...]:
        assert layer == 0
        return self._order

    def exchange(self, layer: int) -> Exchange:
        assert layer == 0
        return LocalExchange(len(self._order))

    def physical(self, layer: int, expert_TK: torch.Tensor) -> torch.Tensor:
        assert layer == 0
        return self._slot_E[expert_TK]


class RankOf(SingleRank):
    """One of `size` ranks whose peers are not there: for the parts before a collective."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size


def _block(spec: MoeSpec = SPEC, **parts: Any) -> MixtureBlock:
    given = {
        "layer": 0,
        "layout": HERE,
        "math": SiluMath(),
        "communicator": SingleRank(),
        "sliced": True,
    }
    return MixtureBlock(spec, BlockParts(**(given | parts)))


def _noise(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


TENSORS = {"router.weight": _noise(NUM_EXPERTS, DIM)}


@given(rows=st.integers(0, 9), order=st.permutations(range(NUM_EXPERTS)))
def test_slots_change_no_bit_and_the_sum_is_right(rows: int, order: list[int]) -> None:
    hidden_TD = _noise(rows, DIM, seed=rows)
    experts = random_experts(SPEC, DIM)
    source = HeldExperts(experts)
    output_TD = _block(layout=Slots(tuple(order)), sliced=False).forward(hidden_TD, TENSORS, source)
    assert torch.equal(output_TD, _block().forward(hidden_TD, TENSORS, HeldExperts(experts)))
    assert source.acquired == sorted(source.acquired, reverse=True), "not in the order asked for"
    assert not source.open
    logits_TE = hidden_TD @ TENSORS["router.weight"].T
    expected = plain_mixture(hidden_TD, logits_TE, SPEC, experts)
    torch.testing.assert_close(output_TD.double(), expected, atol=1e-5, rtol=1e-5)


def test_only_experts_that_are_hit_are_asked_for() -> None:
    source = HeldExperts(random_experts(SPEC, DIM))
    _block().forward(_noise(1, DIM), TENSORS, source)
    assert len(source.acquired) == SPEC.gate.top_k


def test_weights_go_back_when_an_expert_fails() -> None:
    class Failing(SiluMath):
        def gate(self, gate_up_TF: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no")

    source = HeldExperts(random_experts(SPEC, DIM))
    with pytest.raises(RuntimeError):
        _block(math=Failing()).forward(_noise(2, DIM), TENSORS, source)
    assert not source.open


def _shared(hidden_TD: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return hidden_TD @ tensors["shared"]


@pytest.mark.parametrize("kind", ["plain", "gated", "residual"])
def test_shared_experts_join_with_their_factor(kind: str) -> None:
    spec = dataclasses.replace(
        SPEC, shared_ffn_dim=4, shared_gate=kind == "gated", residual=kind == "residual"
    )
    tensors = TENSORS | {
        "shared": _noise(DIM, DIM, seed=2),
        "shared_gate.weight": _noise(1, DIM, seed=3),
        "coefficient.weight": _noise(2, DIM, seed=4),
        "coefficient.bias": _noise(2, seed=5),
    }
    hidden_TD = _noise(5, DIM, seed=6)
    experts = random_experts(SPEC, DIM)
    output_TD = _block(spec, shared=_shared).forward(hidden_TD, tensors, HeldExperts(experts))
    routed = plain_mixture(hidden_TD, hidden_TD @ TENSORS["router.weight"].T, SPEC, experts)
    shared = (hidden_TD @ tensors["shared"]).double()
    if kind == "gated":
        shared = shared * (hidden_TD @ tensors["shared_gate.weight"].T).sigmoid()
    if kind == "residual":
        logits_T2 = hidden_TD @ tensors["coefficient.weight"].T + tensors["coefficient.bias"]
        mix_T2 = logits_T2.softmax(-1)
        routed, shared = routed * mix_T2[:, :1], shared * mix_T2[:, 1:]
    torch.testing.assert_close(output_TD.double(), routed + shared, atol=1e-5, rtol=1e-5)


def test_only_the_first_of_the_ranks_that_share_an_expert_adds_its_output_bias() -> None:
    spec = dataclasses.replace(SPEC, expert_bias=True)
    experts = random_experts(spec, DIM)
    bare = {
        expert: tensors | {"down.bias": torch.zeros(DIM)} for expert, tensors in experts.items()
    }
    hidden_TD = _noise(4, DIM)
    outputs = [
        _block(spec, communicator=RankOf(rank, 2)).forward(hidden_TD, TENSORS, HeldExperts(held))
        for rank, held in ((0, experts), (1, experts), (1, bare))
    ]
    assert torch.equal(outputs[1], outputs[2])
    assert not torch.equal(outputs[0], outputs[1])


class Recording(LocalExchange):
    """Notes how many rows were dispatched and combined."""

    def __init__(self, num_local: int) -> None:
        super().__init__(num_local)
        self.rows: list[int] = []

    def dispatch(self, hidden_TD: Any, expert_TK: Any, weight_TK: Any) -> Any:
        assert expert_TK.shape == weight_TK.shape == (hidden_TD.shape[0], SPEC.gate.top_k)
        assert expert_TK.dtype == torch.int64
        assert weight_TK.dtype == torch.float32
        self.rows.append(hidden_TD.shape[0])
        return super().dispatch(hidden_TD, expert_TK, weight_TK)


class Whole(AllHere):
    """A layout with a recording exchange."""

    def __init__(self) -> None:
        super().__init__({0: NUM_EXPERTS})
        self.recording = Recording(NUM_EXPERTS)

    def exchange(self, layer: int) -> Exchange:
        return self.recording


@pytest.mark.parametrize(
    ("rows", "shares"), [(8, [2, 2, 2, 2]), (5, [2, 2, 1, 0]), (1, [1, 0, 0, 0])]
)
def test_tensor_parallel_peers_dispatch_disjoint_shares(rows: int, shares: list[int]) -> None:
    given: list[torch.Tensor] = []

    class Peers(RankOf):
        """Gathers what the ranks before it gave."""

        def all_gather(self, tensor: torch.Tensor, dim: int = -1) -> torch.Tensor:
            assert dim == 0
            given.append(tensor)
            return torch.cat(given)

    hidden_TD = _noise(rows, DIM)
    experts = HeldExperts(random_experts(SPEC, DIM))
    sent = []
    for rank in range(4):
        layout = Whole()
        block = _block(layout=layout, sliced=False, communicator=Peers(rank, 4))
        output_TD = block.forward(hidden_TD, TENSORS, experts)
        sent += layout.recording.rows
    assert sent == shares
    assert torch.equal(output_TD, _block().forward(hidden_TD, TENSORS, experts))


def test_an_idle_rank_takes_part_without_rows() -> None:
    layout = Whole()
    source = HeldExperts({})
    block = _block(layout=layout, sliced=False)
    block.forward_idle(torch.empty(0, DIM), source)
    assert layout.recording.rows == [0]
    assert source.acquired == []


@given(rows=st.integers(0, 9))
def test_what_is_likely_is_what_the_same_rows_visit_most_weighted_first(rows: int) -> None:
    hidden_TD = _noise(rows, DIM, seed=rows)
    source = HeldExperts(random_experts(SPEC, DIM))
    block = _block()
    likely = block.likely(hidden_TD, TENSORS)
    block.forward(hidden_TD, TENSORS, source)
    assert sorted(likely) == sorted(source.acquired)
    if rows == 1:
        weights_E = (hidden_TD @ TENSORS["router.weight"].T).softmax(dim=-1)[0]
        assert likely == sorted(likely, key=lambda expert: -weights_E[expert].item())
