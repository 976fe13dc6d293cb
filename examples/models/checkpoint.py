"""Writes a model in the Hugging Face layout: bf16 safetensors, configs, tokenizer.

Configs are written so that readers of either generation understand them: expert count and RoPE base
appear under the names that published checkpoints use.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from examples.models.demo_tokenizer import END_OF_TEXT_ID, TURN_END_ID, save_tokenizer

MAX_WEIGHT_BYTES = 8_000_000


def write_checkpoint(model: PreTrainedModel, tokenizer: Tokenizer, directory: Path) -> None:
    """Write everything but the card to `directory`, which is created if it is missing.

    Raises:
        ValueError: the weights do not fit the size that the repository allows.
    """
    directory.mkdir(parents=True, exist_ok=True)
    shipped: Any = copy.deepcopy(model)
    shipped.to(torch.bfloat16)
    shipped.save_pretrained(directory)
    _normalise_config(directory / "config.json")
    _write_json(
        directory / "generation_config.json",
        {
            "eos_token_id": [END_OF_TEXT_ID, TURN_END_ID],
            "pad_token_id": END_OF_TEXT_ID,
            "do_sample": True,
            "temperature": 0.8,
        },
    )
    save_tokenizer(tokenizer, directory)
    size = (directory / "model.safetensors").stat().st_size
    if size > MAX_WEIGHT_BYTES:
        raise ValueError(f"model.safetensors has {size} bytes, at most {MAX_WEIGHT_BYTES} allowed")


def _normalise_config(path: Path) -> None:
    config = json.loads(path.read_text())
    if "num_local_experts" in config:
        config["num_experts"] = config.pop("num_local_experts")
    if "output_router_logits" in config:
        config["output_router_logits"] = False
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    config["torch_dtype"] = config["dtype"]
    _write_json(path, dict(sorted(config.items())))


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
