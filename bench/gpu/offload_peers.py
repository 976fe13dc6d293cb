"""Other ways to keep weights in host memory, over transformers' model: Accelerate, DeepSpeed."""

from __future__ import annotations

import os
import socket
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from bench.offload_child import Generate
from replicas.models.context import torch_dtype


def accelerate_engine(path: Path, dtype: str, device: torch.device) -> Generate:
    """All layers in host memory, each copied by a hook before it computes."""
    from accelerate import dispatch_model  # type: ignore[import-not-found,unused-ignore]

    model = _model(path, dtype)
    on = device.index or 0 if device.type == "cuda" else "cpu"
    layers = {f"model.layers.{index}": "cpu" for index in range(model.config.num_hidden_layers)}
    places = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    model = dispatch_model(
        model, {**dict.fromkeys(places, on), **layers}, main_device=on, force_hooks=True
    )
    return partial(_generate, model, device)


def deepspeed_engine(path: Path, dtype: str, device: torch.device) -> Generate:
    """ZeRO stage 3 with parameters in pinned host memory, a layer ahead."""
    import deepspeed

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK="0", WORLD_SIZE="1", LOCAL_RANK="0"
    )
    deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo")
    model = _model(path, dtype)
    config = model.config
    layer = 4 * config.hidden_size**2 + 3 * config.hidden_size * config.intermediate_size
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == "bfloat16"},
        "fp16": {"enabled": dtype == "float16"},
        "zero_optimization": {
            "stage": 3,
            "stage3_prefetch_bucket_size": layer,
            "stage3_max_live_parameters": 2 * layer,
            "stage3_max_reuse_distance": 0,
            "stage3_param_persistence_threshold": 10_000,
            "offload_param": {"device": "cpu", "pin_memory": device.type == "cuda"},
        },
        "steps_per_print": 10**9,
    }
    engine = deepspeed.initialize(model=model, config=settings)[0]
    engine.module.eval()
    return partial(_generate, engine.module, device)


def _model(path: Path, dtype: str) -> Any:
    auto: Any = AutoModelForCausalLM
    return auto.from_pretrained(path, dtype=torch_dtype(dtype)).eval()


@torch.inference_mode()
def _generate(
    model: Any, device: torch.device, prompts: list[list[int]], new_tokens: int
) -> tuple[list[float], list[list[int]]]:
    cache, tokens_RT = DynamicCache(), torch.tensor(prompts, device=device)
    seconds, chosen = [], []
    for _ in range(new_tokens):
        started_s = time.perf_counter()
        output = model(tokens_RT, past_key_values=cache, use_cache=True, logits_to_keep=1)
        tokens_RT = output.logits[:, -1].argmax(-1, keepdim=True)
        chosen.append(tokens_RT.tolist())
        seconds.append(time.perf_counter() - started_s)
    return seconds, [[step[row][0] for step in chosen] for row in range(len(prompts))]
