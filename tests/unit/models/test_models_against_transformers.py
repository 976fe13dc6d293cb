"""Every family computes what transformers computes, however the tokens are cut into steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from replicas.kernels.cpu_ops import CpuKernels
from tests.support.stepping import Stepper
from tests.support.tiny_models import (
    TINY_NAMES,
    prompt_tokens,
    reference_greedy,
    reference_logits,
    tiny_model,
)

Checkpoint = Callable[[str], Path]
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v2", "deepseek_v3")
each_variant = pytest.mark.parametrize("name", TINY_NAMES)


@each_variant
@pytest.mark.parametrize(
    ("backend", "kernels"), [("auto", "auto"), ("cpu", "off"), ("torch_ref", "off")]
)
def test_prefill_logits(checkpoint: Checkpoint, name: str, backend: str, kernels: str) -> None:
    prompt = prompt_tokens(27)
    stepper = Stepper.load(checkpoint(name), attention_backend=backend, kernels=kernels)
    logits = stepper.step({"a": prompt})["a"]
    torch.testing.assert_close(
        logits, reference_logits(tiny_model(name), prompt), atol=1e-4, rtol=1e-4
    )


@each_variant
@pytest.mark.parametrize("kernels", ["auto", "off"])
def test_greedy_tokens(checkpoint: Checkpoint, name: str, kernels: str) -> None:
    prompt = prompt_tokens(19)
    expected = reference_greedy(tiny_model(name), prompt, 28)
    assert len(set(expected)) > 3, "a stuck model proves little"
    assert Stepper.load(checkpoint(name), kernels=kernels).greedy(prompt, 28) == expected


@each_variant
def test_chunked_prefill_and_mixed_batches_change_nothing(
    checkpoint: Checkpoint, name: str
) -> None:
    prompts = {f"r{index}": prompt_tokens(size, index) for index, size in enumerate((31, 9, 22))}
    alone = Stepper.load(checkpoint(name))
    expected = {key: alone.step({key: tokens})[key] for key, tokens in prompts.items()}
    mixed = Stepper.load(checkpoint(name))
    got: dict[str, list[torch.Tensor]] = {key: [] for key in prompts}
    fed = dict.fromkeys(prompts, 0)
    sizes = (5, 1, 7, 3, 11, 2)
    for turn in range(40):
        work = {}
        for index, (key, tokens) in enumerate(prompts.items()):
            chunk = tokens[fed[key] : fed[key] + sizes[(turn + index) % len(sizes)]]
            # The third request joins later, so that prefill and decode meet.
            if chunk and turn >= index:
                work[key] = chunk
                fed[key] += len(chunk)
        if work:
            for key, logits in mixed.step(work).items():
                got[key].append(logits)
    for key, logits in expected.items():
        torch.testing.assert_close(torch.cat(got[key]), logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kernels", ["auto", "off"])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gpt2", "opt_350m"])
def test_bfloat16_is_as_close_as_transformers(
    checkpoint: Checkpoint, name: str, kernels: str
) -> None:
    prompt = prompt_tokens(24)
    exact = reference_logits(tiny_model(name), prompt)
    theirs = reference_logits(tiny_model(name).bfloat16(), prompt)
    stepper = Stepper.load(checkpoint(name), dtype="bfloat16", kernels=kernels)
    ours = stepper.step({"a": prompt})["a"]
    assert ours.dtype == torch.float32
    assert (ours - exact).norm() <= 1.5 * (theirs - exact).norm()


@pytest.mark.parametrize("kernels", ["auto", "off"])
@pytest.mark.parametrize("name", MIXTURES)
def test_bfloat16_mixtures_are_as_close_as_transformers(
    checkpoint: Checkpoint, name: str, kernels: str
) -> None:
    """By the median row: rounding may send a token near a tie to another expert, here or there."""
    prompt = prompt_tokens(40)
    exact = reference_logits(tiny_model(name), prompt)
    theirs = reference_logits(tiny_model(name).bfloat16(), prompt)
    stepper = Stepper.load(checkpoint(name), dtype="bfloat16", kernels=kernels)
    ours = stepper.step({"a": prompt})["a"]
    errors = [(logits - exact).norm(dim=-1).median() for logits in (ours, theirs)]
    assert errors[0] <= 1.5 * errors[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "name",
    [
        *("llama", "mistral", "qwen3", "llama_tied_wide", "gpt2_odd", "opt_bare"),
        *("qwen2_moe", "qwen3_moe", "deepseek_v3"),
    ],
)
def test_compiled_kernels_give_a_request_the_same_bits_in_any_company(
    checkpoint: Checkpoint, cpu_kernels: CpuKernels, name: str, dtype: str
) -> None:
    """Alone, among others, in one piece or in chunks: not a bit of a request's logits changes."""
    prompts = {f"r{index}": prompt_tokens(size, index) for index, size in enumerate((31, 9, 22))}
    alone = Stepper.load(checkpoint(name), dtype=dtype)
    whole = {key: alone.step({key: tokens})[key] for key, tokens in prompts.items()}
    decoded = {key: alone.step({key: [5]})[key] for key in prompts}
    mixed = Stepper.load(checkpoint(name), dtype=dtype)
    first = mixed.step({key: tokens[:7] for key, tokens in prompts.items()})
    rest = {key: mixed.step({key: tokens[7:]})[key] for key, tokens in prompts.items()}
    for key, logits in mixed.step({key: [5] for key in prompts}).items():
        assert torch.equal(torch.cat((first[key], rest[key])), whole[key])
        assert torch.equal(logits, decoded[key])


def test_dynamic_rope_of_a_long_prompt_is_that_of_tokens_one_by_one(
    checkpoint: Checkpoint,
) -> None:
    """Past `max_position_embeddings` our answer depends on the tokens, not on the chunks."""
    model = tiny_model("llama_dynamic")
    prompt = prompt_tokens(45)
    rows = []
    cache = None
    with torch.inference_mode():
        for token in prompt:
            output = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            rows.append(output.logits[0, -1])
    logits = Stepper.load(checkpoint("llama_dynamic")).step({"a": prompt})["a"]
    torch.testing.assert_close(logits, torch.stack(rows), atol=1e-4, rtol=1e-4)
