"""Greedy batches of a transformers model with its own KV cache; what two of the engines share."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers.cache_utils import DynamicCache


@torch.inference_mode()
def generate(
    model: Any, prompts: list[list[int]], new_tokens: int
) -> tuple[list[float], list[list[int]]]:
    """See `bench.offload_child.Generate`; equal lengths, so nothing is padded."""
    cache, tokens_RT = DynamicCache(), torch.tensor(prompts)
    seconds, chosen = [], []
    for _ in range(new_tokens):
        started_s = time.perf_counter()
        output = model(tokens_RT, past_key_values=cache, use_cache=True, logits_to_keep=1)
        tokens_RT = output.logits[:, -1].argmax(-1, keepdim=True)
        chosen.append(tokens_RT)
        seconds.append(time.perf_counter() - started_s)
    return seconds, torch.cat(chosen, dim=1).tolist()
