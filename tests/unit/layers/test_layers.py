"""Linears, norms, activations and vocabulary layers against torch's own modules."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from cluster.base.errors import ConfigError
from cluster.dist.communicator import SingleRank
from replicas.layers.activations import activation
from replicas.layers.linear import GatedMlp, PlainMlp, RowLinear
from replicas.layers.norms import LayerNorm, RmsNorm
from replicas.layers.vocab import VocabEmbedding, VocabHead
from replicas.layers.weights import ResidentWeights, acquired
from replicas.models.hf_fields import ACTIVATIONS


class RecordedPeers:
    """One rank of several whose peers' contributions were computed beforehand."""

    def __init__(self, rank: int, size: int, peers: list[torch.Tensor]) -> None:
        self.rank = rank
        self.size = size
        self._peers = peers

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor + sum(self._peers)

    def all_gather(self, tensor: torch.Tensor, dim: int = -1) -> torch.Tensor:
        parts = [*self._peers[: self.rank], tensor, *self._peers[self.rank :]]
        return torch.cat(parts, dim=dim)

    def broadcast(self, tensor: torch.Tensor, src: int = 0) -> torch.Tensor:
        raise AssertionError("layers do not broadcast")

    def barrier(self) -> None:
        raise AssertionError("layers do not wait")

    def close(self) -> None:
        raise AssertionError("layers do not own the group")


def test_row_linear_adds_its_bias_once() -> None:
    weight, bias, hidden = torch.randn(4, 6), torch.randn(4), torch.randn(3, 6)
    expected = nn.functional.linear(hidden, weight, bias)
    peer = hidden[:, 3:] @ weight[:, 3:].t()
    layer = RowLinear("down", RecordedPeers(0, 2, [peer]))
    split = {"down.weight": weight[:, :3], "down.bias": bias}
    torch.testing.assert_close(layer.forward(hidden[:, :3], split), expected)
    alone = RowLinear("down", SingleRank())
    whole = {"down.weight": weight, "down.bias": bias}
    torch.testing.assert_close(alone.forward(hidden, whole), expected)


def test_mlps() -> None:
    hidden = torch.randn(5, 8)
    gate, up, down = torch.randn(6, 8), torch.randn(6, 8), torch.randn(8, 6)
    tensors = {"up.weight": torch.cat((gate, up)), "down.weight": down}
    expected = (nn.functional.silu(hidden @ gate.t()) * (hidden @ up.t())) @ down.t()
    gated = GatedMlp(activation("silu"), SingleRank())
    torch.testing.assert_close(gated.forward(hidden, tensors), expected)
    plain = PlainMlp("relu", SingleRank())
    expected = torch.relu(hidden @ up.t()) @ down.t()
    tensors = {"up.weight": up, "down.weight": down}
    torch.testing.assert_close(plain.forward(hidden, tensors), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms(dtype: torch.dtype) -> None:
    hidden = (3 * torch.randn(4, 16) + 1).to(dtype)
    weight, bias = torch.randn(16).to(dtype), torch.randn(16).to(dtype)
    theirs = LlamaRMSNorm(16, eps=1e-6).to(dtype)
    theirs.weight.data.copy_(weight)
    ours = RmsNorm("norm", 1e-6).forward(hidden, {"norm.weight": weight})
    torch.testing.assert_close(ours, theirs(hidden))
    affine = {"norm.weight": weight, "norm.bias": bias}
    expected = nn.functional.layer_norm(hidden, (16,), weight, bias, 1e-5)
    torch.testing.assert_close(LayerNorm("norm", 1e-5).forward(hidden, affine), expected)
    expected = nn.functional.layer_norm(hidden, (16,), None, None, 1e-5)
    torch.testing.assert_close(LayerNorm("norm", 1e-5).forward(hidden, {}), expected)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_of_transformers(name: str) -> None:
    values = torch.linspace(-6, 6, 101)
    torch.testing.assert_close(activation(name)(values), ACT2FN[name](values))


def test_unknown_activations_are_refused() -> None:
    with pytest.raises(ConfigError, match="mish"):
        activation("mish")


def test_vocabulary_over_ranks() -> None:
    """Five words over two ranks: the second has one row of padding."""
    table = torch.randn(5, 4)
    padded = torch.cat((table, torch.zeros(1, 4)))
    token_ids, hidden = torch.tensor([4, 0, 2, 3]), torch.randn(3, 4)
    for rank in range(2):
        own, other = padded[3 * rank : 3 * rank + 3], padded[3 * (1 - rank) :][:3]
        elsewhere = torch.where((token_ids // 3 == rank)[:, None], 0.0, table[token_ids])
        embedding = VocabEmbedding(RecordedPeers(rank, 2, [elsewhere]))
        assert torch.equal(embedding.forward(token_ids, {"tokens": own}), table[token_ids])
        head = VocabHead(5, RecordedPeers(rank, 2, [hidden @ other.t()]))
        logits = head.forward(hidden, {"lm_head": own})
        torch.testing.assert_close(logits, hidden @ table.t())


def test_logits_are_fp32_whatever_the_model() -> None:
    head = VocabHead(3, SingleRank())
    logits = head.forward(torch.ones(1, 2).bfloat16(), {"lm_head": torch.ones(4, 2).bfloat16()})
    assert (logits.dtype, logits.shape) == (torch.float32, (1, 3))


def test_units_are_released_on_errors_too() -> None:
    class Counting(ResidentWeights):
        released = 0

        def release(self, unit: str) -> None:
            self.released += 1

    weights = Counting({"embed": {}})
    with pytest.raises(KeyError), acquired(weights, "embed") as tensors:
        tensors["tokens"]
    assert weights.released == 1
