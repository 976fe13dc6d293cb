"""Tokens and logits of every mixture family at 1, 2, 4 and 8 expert-parallel ranks, busy or idle.

Ranks are threads with queues between them (`tests/support/thread_peers.py`); each has a request of
its own, and takes part with zero rows when that has ended. Some ranks hold no expert of a layer.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from cluster.dist.rank_topology import RankTopology
from moe.exchange.exchanges import Exchanges
from moe.exchange.schemes import Scheme
from moe.exchange.staged import StagedExperts
from moe.exchange.wire import WireFormat
from moe.expert_table import starting_tables
from moe.layout import ExpertLayout
from moe.spread_experts import SpreadExperts
from replicas.kernels.cpu_ops import CpuKernels
from replicas.models.arch import ArchConfig
from replicas.models.context import torch_dtype
from replicas.models.hf_config import arch_from_hf
from replicas.worker.host_stage import HostStage
from tests.support.fake_streams import FakeDevice
from tests.support.stepping import Stepper
from tests.support.thread_peers import Hub, ThreadPeers, on_threads
from tests.support.tiny_models import prompt_tokens, reference_greedy, tiny_model

Checkpoint = Callable[[str], Path]
FAMILIES = (
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "gpt_oss",
    "deepseek_v2",
    "deepseek_v3",
    "mixtral_uneven",
    "qwen3_moe_uneven",
    "pr_moe",
)
LAYOUTS = {1: (1, 1), 2: (2, 1), 4: (2, 2), 8: (2, 4)}
"""Nodes and ranks on each, by ranks."""
SCHEMES = {1: "flat", 2: "preposted", 4: "hierarchical", 8: "preposted"}
NUM_STEPS = 14
STEPS = [prompt_tokens(9), [3], [5]]


def _length(rank: int) -> int:
    """Tokens that a rank's request gives; the first rank's runs longest."""
    return NUM_STEPS - rank


@cache
def _expected(name: str, rank: int) -> list[int]:
    return reference_greedy(tiny_model(name), prompt_tokens(9 + rank, rank), _length(rank))


def _layout(
    arch: ArchConfig, peers: ThreadPeers, topology: RankTopology, rank: int, dtype: torch.dtype
) -> SpreadExperts:
    gates = {index: layer.moe.gate for index, layer in enumerate(arch.layers) if layer.moe}
    wire = WireFormat(
        dim=arch.model_dim, dtype=dtype, top_k=max(gate.top_k for gate in gates.values())
    )
    exchanges = Exchanges(peers, topology, wire, slot_rows=4)
    sizes = [(index, gate.num_experts) for index, gate in gates.items()]
    # With a copy per rank some rows go to another rank than before.
    return SpreadExperts(starting_tables(sizes, topology.num_ranks, 1), exchanges, rank)


def _arch(path: Path) -> ArchConfig:
    return arch_from_hf(json.loads((path / "config.json").read_text()))


def _greedy_tokens(
    path: Path, ep_size: int, seen: Callable[[ExpertLayout], ExpertLayout]
) -> list[list[int]]:
    """What each rank's request gives; `seen`: the layout as the model takes it."""
    topology = RankTopology.regular(*LAYOUTS[ep_size])

    def body(rank: int, peers: ThreadPeers) -> list[int]:
        layout = _layout(_arch(path), peers, topology, rank, torch.float32)
        layout.exchanges.use(SCHEMES[topology.num_ranks])
        stepper = Stepper.load(path, expert_layout=seen(layout))
        tokens, fed = [], prompt_tokens(9 + rank, rank)
        for _ in range(NUM_STEPS):
            if len(tokens) == _length(rank):
                stepper.idle()
                continue
            tokens.append(int(stepper.step({"r": fed})["r"][-1].argmax()))
            fed = tokens[-1:]
        return tokens

    return on_threads(Hub(topology), body)


@pytest.mark.parametrize("ep_size", LAYOUTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens_at_any_number_of_ranks(checkpoint: Checkpoint, name: str, ep_size: int):
    answers = _greedy_tokens(checkpoint(name), ep_size, lambda layout: layout)
    assert answers == [_expected(name, rank) for rank in range(ep_size)]


@pytest.mark.parametrize(
    "name", ["qwen2_moe", "deepseek_v3", "gpt_oss", "mixtral_uneven", "pr_moe"]
)
def test_greedy_tokens_with_experts_behind_copies(checkpoint: Checkpoint, name: str):
    """As ranks on devices have them; the copies are done as late as events allow."""

    def staged(layout: ExpertLayout) -> ExpertLayout:
        device = FakeDevice(computes_at_once=True)
        return StagedExperts(layout, HostStage(device, lambda memory: lambda: None))

    answers = _greedy_tokens(checkpoint(name), 4, staged)
    assert answers == [_expected(name, rank) for rank in range(4)]


def _logits_of_rank_0(
    path: Path, topology: RankTopology, scheme: Scheme, dtype: str
) -> list[torch.Tensor]:
    """Logits of one request's steps, with other ranks' requests beside it or none."""

    def body(rank: int, peers: ThreadPeers) -> list[torch.Tensor]:
        layout = _layout(_arch(path), peers, topology, rank, torch_dtype(dtype))
        layout.exchanges.use(scheme)
        stepper = Stepper.load(path, dtype=dtype, expert_layout=layout)
        logits = []
        for number, fed in enumerate(STEPS):
            if rank and (rank + number) % 3 == 0:
                stepper.idle()
                continue
            logits.append(stepper.step({"r": fed[rank:] or [rank]})["r"])
        return logits

    return on_threads(Hub(topology), body)[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_have_the_same_bits_at_any_number_of_ranks(
    checkpoint: Checkpoint, cpu_kernels: CpuKernels, name: str, dtype: str
) -> None:
    path = checkpoint(name)
    alone = Stepper.load(path, dtype=dtype)
    expected = [alone.step({"r": fed})["r"] for fed in STEPS]
    for layout, scheme in itertools.product(LAYOUTS.values(), Scheme):
        got = _logits_of_rank_0(path, RankTopology.regular(*layout), scheme, dtype)
        for step, (logits, wanted) in enumerate(zip(got, expected, strict=True)):
            assert torch.equal(logits, wanted), (layout, scheme, step)
