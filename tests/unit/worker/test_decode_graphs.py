"""Replayed decode steps equal computed ones; a recorder on the CPU stands in for CUDA's graphs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cluster.base.errors import DeviceOutOfMemoryError
from replicas.worker.decode_graphs import GraphedModel, GraphLimits
from tests.support.stepping import BLOCK_SIZE, Stepper
from tests.support.tiny_models import prompt_tokens, write_checkpoint

pytest.importorskip("triton", reason="padding rows need the Triton backend (dev extra)")


class Recorder:
    """As a CUDA graph: replays the same function on the same buffers into the same tensor."""

    def __init__(self) -> None:
        self.num_replays = 0

    def capture(self, launch: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        static = launch().clone()

        def replay() -> torch.Tensor:
            self.num_replays += 1
            return static.copy_(launch())

        return replay


LIMITS = GraphLimits(max_rows=5, max_context=32, block_size=BLOCK_SIZE)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("llama", tmp_path_factory.mktemp("llama"))


def _stepper(checkpoint: Path) -> Stepper:
    stepper = Stepper.load(checkpoint, attention_backend="triton_paged", kernels="triton")
    # The backend reads whole tiles and multiplies what lies past a context by zero.
    for cache in stepper._kv:
        cache.zero_()
    return stepper


def test_replayed_steps_equal_computed_ones(checkpoint: Path) -> None:
    plain, graphed = _stepper(checkpoint), _stepper(checkpoint)
    recorder = Recorder()
    model = GraphedModel(graphed._model, LIMITS, torch.device("cpu"), recorder.capture)
    graphed._model = model
    names = ["a", "b", "c"]
    prompts = {name: prompt_tokens(3 + index, seed=index) for index, name in enumerate(names)}
    # A prompt, then decodes of three, of three again, of one and of two that share a bucket of two.
    works = [
        prompts,
        {name: [index + 5] for index, name in enumerate(names)},
        {name: [index + 9] for index, name in enumerate(names)},
        {"b": [4]},
        {"b": [7]},
        {"c": [8], "a": [3]},
        {"a": [2], "c": [6]},
    ]
    replays = []
    for work in works:
        expected, actual = plain.step(work), graphed.step(work)
        for name in work:
            assert torch.equal(actual[name], expected[name]), (work, name)
        replays.append(recorder.num_replays)
        model.settle()
    # The first step of each size is computed; a replay stands in from the second on.
    assert replays == [0, 0, 1, 1, 2, 2, 3]
    assert model.num_captured == 3
    for expected_cache, cache in zip(plain._kv, graphed._kv, strict=True):
        assert torch.equal(cache, expected_cache)


def test_replayed_steps_with_drafts_equal_computed_ones(checkpoint: Path) -> None:
    """Rows are shared out anew in every step, beside requests that have one."""
    plain, graphed = _stepper(checkpoint), _stepper(checkpoint)
    recorder = Recorder()
    limits = dataclasses.replace(LIMITS, max_rows=8, max_query=4)
    model = GraphedModel(graphed._model, limits, torch.device("cpu"), recorder.capture)
    graphed._model = model
    prompts = {name: prompt_tokens(5 + index, seed=index) for index, name in enumerate("abc")}
    works = [
        prompts,
        {"a": [3, 4, 5], "b": [6], "c": [7, 8]},
        {"a": [9], "b": [3, 5, 2, 8], "c": [4]},
        {"c": [2, 3], "b": [7, 7, 1, 4]},
        {"b": [8, 3, 3, 3], "a": [2]},
        {"a": [2], "b": [9], "c": [1]},
        {"a": [1, 2, 3, 4, 5]},
    ]
    replays = []
    for work in works:
        expected, actual = plain.step(work), graphed.step(work)
        for name in work:
            assert torch.equal(actual[name], expected[name]), (work, name)
        replays.append(recorder.num_replays)
        model.settle()
    # Computed: the prompts, the first of each kind, and a chunk that is longer than drafts are.
    assert replays == [0, 0, 1, 2, 3, 3, 3]
    for expected_cache, cache in zip(plain._kv, graphed._kv, strict=True):
        assert torch.equal(cache, expected_cache)


def test_nothing_is_captured_while_a_step_is_waited_for(checkpoint: Path) -> None:
    stepper = _stepper(checkpoint)
    recorder = Recorder()
    model = GraphedModel(stepper._model, LIMITS, torch.device("cpu"), recorder.capture)
    stepper._model = model
    stepper.step({"a": [1, 2]})
    for token in range(3):
        stepper.step({"a": [token]})
    assert (model.num_captured, recorder.num_replays) == (0, 0)
    model.settle()
    model.settle()
    assert model.num_captured == 1


@pytest.mark.parametrize(
    ("rows", "bucket"), [(1, 1), (2, 2), (3, 4), (5, 8), (8, 8), (9, 16), (17, 20), (20, 20)]
)
def test_buckets(rows: int, bucket: int) -> None:
    limits = GraphLimits(max_rows=20, max_context=64, block_size=16)
    assert limits.bucket(rows) == (bucket, False)
    assert limits.bucket(21) is None
    assert limits.bucket(rows, longest=2) is None
    wide = dataclasses.replace(limits, max_query=3)
    assert wide.bucket(rows, longest=3) == (bucket, True)


def test_every_reason_is_given(checkpoint: Path) -> None:
    on_triton = _stepper(checkpoint)
    assert GraphedModel.why_not(on_triton._model, on_triton._weights, "cuda:0") == []
    plain = Stepper.load(checkpoint, kernels="off")
    reasons = " / ".join(GraphedModel.why_not(plain._model, object(), "cpu"))
    for part in ("no graphs on cpu", "torch kernels launch by", "the weights move"):
        assert part in reasons


def test_a_graph_that_does_not_fit_costs_no_step(checkpoint: Path) -> None:
    stepper = _stepper(checkpoint)
    tries = []

    def capture(_: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        tries.append(1)
        raise DeviceOutOfMemoryError("The device ran out of memory.")

    model = GraphedModel(stepper._model, LIMITS, torch.device("cpu"), capture)
    stepper._model = model
    stepper.step({"a": [1, 2]})
    for token in range(3):
        stepper.step({"a": [token]})
        model.settle()
    assert (len(tries), model.num_captured) == (1, 0)
