"""The FlashInfer backend over a stand-in for the library with the same signatures."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import inspect
import sys
from typing import Any

import pytest
import torch

from cluster.base.errors import ConfigError
from replicas.attention.flashinfer import FlashInferAttention
from replicas.attention.select import select_backend
from replicas.attention.torch_ref import TorchReferenceAttention
from tests.support import fake_flashinfer
from tests.support.attention_cases import AttentionCase

pytest.importorskip("triton", reason="Triton's kernels need triton (part of the dev extra)")


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = fake_flashinfer.fake_module()
    module.__spec__ = importlib.machinery.ModuleSpec("flashinfer", None)
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    return module


def Step(**fields: Any) -> AttentionCase:  # noqa: N802 - reads as the class it makes
    return AttentionCase(
        **{"head_dim": 64, "block_size": 16, "seed": 2, "dtype": "float16"} | fields
    )


@pytest.mark.parametrize(
    "step",
    [
        Step(requests=((5, 0), (1, 70), (30, 3), (2, 30))),
        Step(requests=((40, 25),), group=4, kv_heads=1),
        Step(requests=((1, 3), (1, 40))),
        Step(requests=((9, 26), (1, 29), (20, 12)), window=33),
        Step(requests=((3, 4), (1, 17)), window=1, block_size=4),
    ],
    ids=range(5),
)
def test_equals_the_oracle(step: AttentionCase, library: Any) -> None:
    expected, expected_cache = step.run(TorchReferenceAttention(step.spec))
    output, cache = step.run(FlashInferAttention(step.spec))
    assert torch.equal(cache, expected_cache)
    torch.testing.assert_close(output, expected, atol=4e-3, rtol=4e-3)


def test_a_step_is_planned_once_per_window(library: Any) -> None:
    step = Step(requests=((5, 3), (1, 7)))
    backend = FlashInferAttention(step.spec)
    query, key, value, cache = step.tensors()
    for metadata in (step.metadata(), step.metadata()):
        for window in (None, 4, None, 4):
            backend.forward(query, key, value, cache, metadata, window)
    assert [wrapper.num_plans for wrapper in fake_flashinfer.MADE] == [2, 2]


def test_decodes_ask_for_no_plan(library: Any) -> None:
    step = Step(requests=((1, 3), (1, 40)))
    step.run(FlashInferAttention(step.spec))
    assert fake_flashinfer.MADE == []


def test_it_is_taken_by_name_only(library: Any) -> None:
    spec = Step(requests=()).spec
    assert select_backend(spec, "flashinfer").name == "flashinfer"
    assert select_backend(spec).name != "flashinfer"


def test_every_reason_is_given() -> None:
    if importlib.util.find_spec("flashinfer"):
        pytest.skip("flashinfer is installed")
    spec = AttentionCase(requests=(), head_dim=24, sinks=True).spec
    with pytest.raises(ConfigError) as caught:
        select_backend(spec, "flashinfer")
    for part in (
        "pip install flashinfer-python",
        "not in float32",
        "not of 24",
        "without sinks",
    ):
        assert part in str(caught.value)


def test_the_stand_in_has_the_true_signatures() -> None:
    true = pytest.importorskip("flashinfer", reason="flashinfer is not installed").prefill
    ours = fake_flashinfer.BatchPrefillWithPagedKVCacheWrapper
    theirs = true.BatchPrefillWithPagedKVCacheWrapper
    for name in ("__init__", "plan", "run"):
        known = inspect.signature(getattr(theirs, name)).parameters
        assert set(inspect.signature(getattr(ours, name)).parameters) <= set(known)
