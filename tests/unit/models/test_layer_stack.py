"""All layers in one call against the layers one by one: the same bits, whatever the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest
import torch

from replicas.kernels import select
from replicas.kernels.cpu_ops import CpuKernels
from replicas.kernels.cpu_shapes import LAYER_PARTS
from replicas.kernels.loader import CpuLibrary
from replicas.layers.cpu_stack import CpuLayerStack
from replicas.layers.weights import WeightProvider
from replicas.models.llama import LlamaModel
from tests.support.compiled_kernels import lesser_library
from tests.support.stepping import Stepper
from tests.support.tiny_models import prompt_tokens

Checkpoint = Callable[[str], Path]
DENSE = ["llama", "mistral", "qwen2", "qwen3", "llama_biased"]
MIXTURES = ["mixtral", "mixtral_window", "qwen2_moe_blocks", "qwen3_moe_sparse", "qwen3_moe_many"]


@pytest.fixture(params=["this machine's", "no matrix tiles", "avx2"])
def library(
    request: pytest.FixtureRequest, cpu_kernels: CpuKernels, monkeypatch: pytest.MonkeyPatch
) -> Iterator[CpuLibrary]:
    """The kernels as built for this machine, and for lesser ones whose code it runs."""
    built = cpu_kernels.library
    if request.param != "this machine's":
        if built.isa not in ("amx_bf16", "avx512_bf16", "avx512"):
            pytest.skip(f"{built.isa} is tested by itself")
        built = lesser_library("x86-64-v3" if request.param == "avx2" else "native")
    monkeypatch.setattr(select, "_library", lambda _: built)
    yield built
    torch.set_num_threads(1)


def stack_of(stepper: Stepper) -> CpuLayerStack:
    stack = cast("LlamaModel", stepper._model)._stack
    assert stack is not None
    return stack


def steppers(path: Path, dtype: str) -> tuple[Stepper, Stepper]:
    """With and without the stack."""
    whole, single = (Stepper.load(path, dtype=dtype) for _ in range(2))
    assert stack_of(whole)
    cast("LlamaModel", single._model)._stack = None
    return whole, single


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", DENSE + MIXTURES)
def test_one_call_is_the_layers_one_by_one(
    checkpoint: Checkpoint, library: CpuLibrary, name: str, dtype: str
) -> None:
    whole, single = steppers(checkpoint(name), dtype)
    works = [{f"r{index}": prompt_tokens(3 * index + 1, index) for index in range(9)}]
    works += [{f"r{index}": [index + turn] for index in range(9)} for turn in range(2)]
    works += [{"r3": [5]}, {"r4": [7], "r0": prompt_tokens(40)}, {"r0": [1], "r8": [2]}]
    for turn, work in enumerate(works):
        torch.set_num_threads(1 + turn % 3)
        expected = single.step(work)
        for key, logits in whole.step(work).items():
            assert torch.equal(logits, expected[key]), (turn, key)
    assert any(stack_of(whole).seconds.values())


@pytest.mark.parametrize(("name", "parts"), [("llama", LAYER_PARTS[:-1]), ("mixtral", LAYER_PARTS)])
def test_the_parts_add_up(
    checkpoint: Checkpoint, library: CpuLibrary, name: str, parts: tuple[str, ...]
) -> None:
    whole, _ = steppers(checkpoint(name), "bfloat16")
    whole.step({"a": prompt_tokens(20)})
    seconds = stack_of(whole).seconds
    assert tuple(seconds) == parts
    assert all(spent > 0 for spent in seconds.values())


def test_more_rows_than_one_wave_holds(checkpoint: Checkpoint, library: CpuLibrary) -> None:
    whole, single = steppers(checkpoint("qwen3_moe_many"), "bfloat16")
    work = {f"r{index}": prompt_tokens(120, index) for index in range(3)}
    torch.set_num_threads(2)
    expected = single.step(work)
    for key, logits in whole.step(work).items():
        assert torch.equal(logits, expected[key]), key


def test_experts_of_odd_widths_pass_layer_by_layer(
    checkpoint: Checkpoint, cpu_kernels: CpuKernels
) -> None:
    stepper = Stepper.load(checkpoint("qwen3_moe"), dtype="bfloat16")
    stepper.step({"a": prompt_tokens(20)})
    assert not any(stack_of(stepper).seconds.values())


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_weights_that_come_and_go_pass_layer_by_layer(
    checkpoint: Checkpoint, cpu_kernels: CpuKernels, name: str
) -> None:
    class Passing:
        """Hands out the units of another provider, as a streaming one does."""

        def __init__(self, weights: WeightProvider) -> None:
            self.acquire, self.release = weights.acquire, weights.release

    resident, streamed = (Stepper.load(checkpoint(name), dtype="bfloat16") for _ in range(2))
    streamed._weights = Passing(streamed._weights)
    expected = resident.step({"a": prompt_tokens(20)})["a"]
    assert torch.equal(streamed.step({"a": prompt_tokens(20)})["a"], expected)
    assert not any(stack_of(streamed).seconds.values())
