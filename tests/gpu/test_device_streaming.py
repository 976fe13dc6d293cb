"""Weights streamed to a real device: the tokens of a resident model, and the rate of the link."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.offload_engines.batches import generator_of
from cluster.base.env import default_cache_dir
from cluster.dist.communicator import SingleRank
from offload.assembly import kernel_adapter, streamed_weights
from offload.device_copier import DeviceCopier
from offload.host_memory import block_on_demand
from offload.runtime import Runtime
from replicas.worker.assembly import RankSpec, WeightsFactory, build_runner, resident_weights
from replicas.worker.device import pin_host_memory, synchronize
from replicas.worker.device_streams import TorchStreams
from tests.support.offload_engine import PLENTY, offload_plan
from tests.support.tiny_models import prompt_tokens, write_checkpoint

LAYERS = ("layer.0", "layer.1", "layer.2")
ENDS = ("embed", "norm", "head")
NEW_TOKENS = 16


def tokens_of(path: Path, factory: WeightsFactory, cuda: torch.device) -> list[list[int]]:
    spec = RankSpec(
        model_path=str(path),
        dtype="float32",
        kv_dtype="float32",
        block_size=16,
        num_blocks=32,
        max_context=96,
    )
    runner = build_runner(spec, SingleRank(), cuda, weights_factory=factory)
    _, tokens = generator_of(runner, spec)([prompt_tokens(5), prompt_tokens(40, 1)], NEW_TOKENS)
    return tokens


@pytest.mark.parametrize(
    ("resident", "host"),
    [((), ()), (ENDS, LAYERS), ((*ENDS, "layer.1"), ("layer.0",)), ((), (*ENDS, *LAYERS))],
)
def test_tokens_are_those_of_a_resident_model_on_every_tier(
    cuda: torch.device, tmp_path: Path, resident: tuple[str, ...], host: tuple[str, ...]
) -> None:
    """Slots that were left are full of NaN, so what is used too early or late changes them."""
    path = write_checkpoint("llama", tmp_path / "llama")
    plan = offload_plan(
        tmp_path / "store",
        host_bytes=PLENTY,
        resident_units=resident,
        host_units=host,
        ring_slots=2,
        prefetch_depth=2,
    )
    factory = streamed_weights(plan, Runtime(cache_dir=default_cache_dir(), poison=True))
    expected = tokens_of(path, resident_weights, cuda)
    for _ in range(3):
        assert tokens_of(path, factory, cuda) == expected


def test_codes_are_brought_back_on_the_device(cuda: torch.device, tmp_path: Path) -> None:
    """int8 weights are the same weights wherever they were: host memory or disk."""
    path = write_checkpoint("llama", tmp_path / "llama")
    told = []
    for host in ((), LAYERS):
        plan = offload_plan(
            tmp_path / "store",
            host_bytes=PLENTY,
            resident_units=ENDS,
            host_units=host,
            precision="int8",
        )
        spec = RankSpec(
            model_path=str(path),
            dtype="float32",
            kv_dtype="float32",
            block_size=16,
            num_blocks=32,
            max_context=96,
        )
        runner = build_runner(
            spec,
            SingleRank(),
            cuda,
            weights_factory=streamed_weights(plan),
            adapt_kernels=kernel_adapter(plan),
        )
        told.append(generator_of(runner, spec)([prompt_tokens(5)], NEW_TOKENS)[1])
    assert told[0] == told[1]


def test_pinned_memory_has_the_size_that_was_asked_for(cuda: torch.device) -> None:
    """torch's own pinned blocks are powers of two; nothing of ours comes from there."""
    before = torch.cuda.host_memory_stats().get("allocated_bytes.current", 0)
    memory = block_on_demand(3 * 2**20 + 4096)
    unpin = pin_host_memory(memory, cuda)
    assert memory.numel() == 3 * 2**20 + 4096
    assert memory.is_pinned()
    assert torch.cuda.host_memory_stats().get("allocated_bytes.current", 0) == before
    unpin()


def test_copies_go_on_while_the_device_computes(cuda: torch.device) -> None:
    """Both together take about as long as the longer of them, and the host waits for neither."""
    source = block_on_demand(256 * 2**20)
    unpin = pin_host_memory(source, cuda)
    slots = torch.empty(2 * source.numel(), dtype=torch.uint8, device=cuda).split(source.numel())
    left_DD = torch.randn(4096, 4096, device=cuda)

    def seconds(rounds: int, *, copies: bool, computes: bool) -> float:
        copier = DeviceCopier(TorchStreams(cuda), 2)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        synchronize(cuda)
        start.record()
        for index in range(rounds):
            slot = index % 2
            if copies:
                copier.copy(slot, slots[slot], source)
                copier.before_use(slot)
            if computes:
                for _ in range(4):
                    left_DD @ left_DD
            copier.after_use(slot, slots[slot])
        end.record()
        synchronize(cuda)
        return start.elapsed_time(end) / 1e3

    seconds(2, copies=True, computes=True)
    alone = seconds(12, copies=True, computes=False), seconds(12, copies=False, computes=True)
    assert seconds(12, copies=True, computes=True) <= max(alone) + 0.3 * min(alone)
    unpin()
