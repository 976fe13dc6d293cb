"""Expert-parallel ranks on a device: rows through pinned memory, experts in Triton's kernels.

The ranks are processes that share the one device, and do what they would do on one of their own.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.offload_engines.batches import generator_of
from cluster.dist.communicator import SingleRank
from replicas.api import GenerationRequest, SamplingParams
from replicas.worker.assembly import RankSpec, build_runner
from replicas.worker.device import pin_host_memory
from replicas.worker.device_streams import TorchStreams
from replicas.worker.host_stage import HostStage
from tests.support.lockstep_ranks import LockstepRanks, model_plan

MODEL = Path(__file__).parents[2] / "examples" / "models" / "demo-moe"
PROMPTS = [[5 + i, 6, 7] * (1 + 6 * i) for i in range(5)]
NUM_TOKENS = 12


def tokens_of_one_rank(cuda: torch.device) -> list[list[int]]:
    spec = RankSpec(
        model_path=str(MODEL),
        dtype="float32",
        kv_dtype="float32",
        block_size=16,
        num_blocks=64,
        max_context=512,
    )
    runner = build_runner(spec, SingleRank(), cuda)
    return generator_of(runner, spec)(PROMPTS, NUM_TOKENS)[1]


def requests() -> list[GenerationRequest]:
    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    return [
        GenerationRequest(request_id=f"r{i}", prompt_token_ids=tuple(prompt), params=params)
        for i, prompt in enumerate(PROMPTS)
    ]


@pytest.mark.parametrize("scheme", ["flat", "hierarchical", "preposted", "auto"])
def test_tokens_are_those_of_one_rank(cuda: torch.device, scheme: str) -> None:
    expected = tokens_of_one_rank(cuda)
    plan = model_plan(MODEL, dp=4, tp=1, exchange=scheme, device="cuda")
    ranks = LockstepRanks(plan, ("a", "a", "b", "b"))
    try:
        assert [each.token_ids for each in ranks.engine().generate(requests())] == expected
    finally:
        ranks.close()


def test_copies_come_after_what_makes_them_and_before_what_needs_them(cuda: torch.device) -> None:
    stage = HostStage(TorchStreams(cuda), lambda memory: pin_host_memory(memory, cuda))
    large = torch.randn(2048, 2048, device=cuda)
    for turn in range(20):
        slow = large
        for _ in range(4):
            slow = (slow @ large).clamp(-1, 1)
        rows = torch.full((64 + turn, 128), float(turn), device=cuda) + 0 * slow[0, 0]
        (host,) = stage.to_host([rows])
        assert (host == turn).all()
        (back,) = stage.to_device([host.double()])
        host.fill_(-1)
        assert (back + 1 == turn + 1).all()
