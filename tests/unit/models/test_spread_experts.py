"""Greedy tokens of every mixture family at 1, 2, 4 and 8 expert-parallel ranks, busy or idle.

Ranks are threads with queues between them (`tests/support/thread_peers.py`); each has a request of
its own, and takes part with zero rows when that has ended. Some ranks hold no expert of a layer.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from cluster.dist.rank_topology import RankTopology
from moe.exchange.exchanges import Exchanges
from moe.exchange.wire import WireFormat
from moe.expert_table import starting_tables
from moe.spread_experts import SpreadExperts
from replicas.models.arch import ArchConfig
from replicas.models.hf_config import arch_from_hf
from tests.support.stepping import Stepper
from tests.support.thread_peers import Hub, ThreadPeers, on_threads
from tests.support.tiny_models import prompt_tokens, reference_greedy, tiny_model

Checkpoint = Callable[[str], Path]
FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v2", "deepseek_v3")
LAYOUTS = {1: (1, 1), 2: (2, 1), 4: (2, 2), 8: (2, 4)}
"""Nodes and ranks on each, by ranks."""
SCHEMES = {1: "flat", 2: "preposted", 4: "hierarchical", 8: "preposted"}
NUM_STEPS = 14


def _length(rank: int) -> int:
    """Tokens that a rank's request gives; the first rank's runs longest."""
    return NUM_STEPS - rank


@cache
def _expected(name: str, rank: int) -> list[int]:
    return reference_greedy(tiny_model(name), prompt_tokens(9 + rank, rank), _length(rank))


def _layout(arch: ArchConfig, peers: ThreadPeers, topology: RankTopology, rank: int):
    gates = {index: layer.moe.gate for index, layer in enumerate(arch.layers) if layer.moe}
    wire = WireFormat(
        dim=arch.model_dim,
        dtype=torch.float32,
        top_k=max(gate.top_k for gate in gates.values()),
    )
    exchanges = Exchanges(peers, topology, wire, slot_rows=4)
    exchanges.use(SCHEMES[topology.num_ranks])
    sizes = [(index, gate.num_experts) for index, gate in gates.items()]
    # With a copy per rank some rows go to another rank than before.
    return SpreadExperts(starting_tables(sizes, topology.num_ranks, 1), exchanges, rank)


@pytest.mark.parametrize("ep_size", LAYOUTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens_at_any_number_of_ranks(checkpoint: Checkpoint, name: str, ep_size: int):
    path, topology = checkpoint(name), RankTopology.regular(*LAYOUTS[ep_size])
    arch = arch_from_hf(json.loads((path / "config.json").read_text()))

    def body(rank: int, peers: ThreadPeers) -> list[int]:
        layout = _layout(arch, peers, topology, rank)
        stepper = Stepper.load(path, expert_layout=layout)
        tokens, fed = [], prompt_tokens(9 + rank, rank)
        for _ in range(NUM_STEPS):
            if len(tokens) == _length(rank):
                stepper.idle()
                continue
            tokens.append(int(stepper.step({"r": fed})["r"][-1].argmax()))
            fed = tokens[-1:]
        return tokens

    answers = on_threads(Hub(topology), body)
    assert answers == [_expected(name, rank) for rank in range(ep_size)]
