"""transformers' fastest plain path on the same model: static cache, decode step compiled."""

from __future__ import annotations

import time

import torch
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

from bench.gpu.shapes import SHAPES
from replicas.worker.device import synchronize

_WARM_STEPS = 8


def decode_step_s(
    size: str,
    dtype: torch.dtype,
    device: torch.device,
    load: tuple[int, int, int],
) -> list[float]:
    """Times of greedy decode steps of equal-length requests; compiled on CUDA.

    Args:
        load: requests, prompt tokens of each, decode steps.
    """
    batch, prompt_tokens, steps = load
    shape = dict(SHAPES[size])
    config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    cache = StaticCache(config=config, max_cache_len=prompt_tokens + steps)
    model.eval()
    step = _step
    if device.type == "cuda":
        step = torch.compile(_step, mode="reduce-overhead", fullgraph=True)
    times = []
    with torch.inference_mode():
        ids = torch.randint(3, config.vocab_size, (batch, prompt_tokens), device=device)
        position = torch.arange(prompt_tokens, device=device)
        token = _step(model, ids, position, cache)
        for index in range(steps):
            position = torch.tensor([prompt_tokens + index], device=device)
            synchronize(device)
            started_s = time.perf_counter()
            token = step(model, token.clone(), position, cache).clone()
            token.tolist()
            times.append(time.perf_counter() - started_s)
    return times[_WARM_STEPS:]


def _step(
    model: torch.nn.Module, ids: torch.Tensor, position: torch.Tensor, cache: StaticCache
) -> torch.Tensor:
    output = model(
        ids, cache_position=position, past_key_values=cache, use_cache=True, logits_to_keep=1
    )
    token: torch.Tensor = output.logits[:, -1:].argmax(-1)
    return token
