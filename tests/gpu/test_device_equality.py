"""What the device computes is what the oracles compute: kernels, graphs, steps on top of steps."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bench.gpu.ours import GpuEngine
from replicas.attention.torch_ref import TorchReferenceAttention
from replicas.attention.triton_paged import TritonPagedAttention
from replicas.worker.device import host_waits_refused
from tests.support.attention_cases import AttentionCase


def test_greedy_tokens_equal_those_of_torch(cuda: torch.device) -> None:
    """Two steps in flight, decodes from graphs, against torch's kernels on the same device."""
    ours = GpuEngine("tiny", "float32", cuda, "triton")
    theirs = GpuEngine("tiny", "float32", cuda, "off", "torch_ref")
    for batch in (1, 5):
        expected = theirs.tokens(batch, prompt_tokens=300, new_tokens=20)
        assert ours.tokens(batch, prompt_tokens=300, new_tokens=20) == expected


@pytest.mark.parametrize("kernels", ["triton", "fp8"])
def test_runs_are_repeatable(cuda: torch.device, kernels: str) -> None:
    engine = GpuEngine("tiny", "bfloat16", cuda, kernels)
    first = engine.tokens(3, prompt_tokens=70, new_tokens=16)
    assert engine.tokens(3, prompt_tokens=70, new_tokens=16) == first


def test_no_launch_waits_for_the_device(cuda: torch.device) -> None:
    engine = GpuEngine("tiny", "bfloat16", cuda, "triton")
    assert engine.decode_without_waiting(batch=4, steps=6) == 6
    with pytest.raises(RuntimeError), host_waits_refused(cuda):
        torch.ones(1, device=cuda).item()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_paged_attention_equals_the_oracle(cuda: torch.device, dtype: str) -> None:
    requests = ((1, 300), (40, 250), (1, 5), (70, 3))
    step = AttentionCase(requests=requests, head_dim=64, block_size=16, seed=2, dtype=dtype)
    expected, _ = step.run(TorchReferenceAttention(step.spec))
    query, key, value, cache = (tensor.to(cuda) for tensor in step.tensors())
    metadata = step.metadata()
    on_device = {
        name: getattr(metadata, name).to(cuda)
        for name in ("query_start_R1", "seq_lens_R", "block_tables_RN", "slot_mapping_T")
    }
    metadata = dataclasses.replace(metadata, **on_device)
    actual = TritonPagedAttention(step.spec).forward(query, key, value, cache, metadata, None)
    tolerance = 2e-5 if dtype == "float32" else 4e-3
    torch.testing.assert_close(actual.cpu(), expected, atol=tolerance, rtol=tolerance)
