"""Accelerate's disk offload: hooks read each module's weights from the safetensors file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model  # type: ignore[import-not-found,unused-ignore]
from accelerate.utils import (  # type: ignore[import-not-found,unused-ignore]
    set_module_tensor_to_device,
)
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from bench.offload_child import ChildTask, Engine
from bench.offload_engines.hugging_face import generate


@contextmanager
def opened(task: ChildTask) -> Iterator[Engine]:
    """The model with all layers on disk, where the checkpoint has them: nothing is written anew."""
    torch.set_num_threads(task.threads)
    config = AutoConfig.from_pretrained(task.checkpoint)
    auto: Any = AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config, dtype=torch.bfloat16).eval()
    # Constant buffers are not in a checkpoint.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    file = str(Path(task.checkpoint) / "model.safetensors")
    index = {}
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - not a mapping
            if name.startswith("model.layers."):
                index[name] = {"safetensors_file": file, "weight_name": name, "dtype": "bfloat16"}
            else:
                set_module_tensor_to_device(model, name, "cpu", value=tensors.get_tensor(name))
    layers = {f"model.layers.{number}": "disk" for number in range(config.num_hidden_layers)}
    places = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    model = dispatch_model(
        model,
        {**dict.fromkeys(places, "cpu"), **layers},
        main_device="cpu",
        offload_dir=task.folder,
        offload_index=index,
        force_hooks=True,
    )
    yield Engine(generate=partial(generate, model))
