"""A trained checkpoint made as large as wanted without changing what it says.

Layers whose attention and MLP outputs are zero add nothing to the residual stream. So a small model
with many of them answers as before, and costs the disk and the processor what a larger one does:
text with habits, which random weights do not have, at the speed of a model that has to be streamed.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

_LAYER = "model.layers."
_SILENT = ("self_attn.o_proj.weight", "mlp.down_proj.weight")
"""What a layer adds to the residual stream, for the families with Llama's names."""


def deepened_checkpoint(source: Path, target: Path, num_layers: int) -> Path:
    """Write `source` with layers that add nothing behind its own, `num_layers` in all.

    Each is a copy of one of the model's own layers with zero outputs. An existing `target` is taken
    as it is.

    Returns:
        `target`.
    """
    if target.is_dir():
        return target
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    own_layers = config["num_hidden_layers"]
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(source.glob("*.safetensors")):
        tensors |= load_file(path)
    for index in range(own_layers, num_layers):
        tensors |= _silent_layer(tensors, index % own_layers, index)
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial, ignore=shutil.ignore_patterns("*.safetensors*", "config.json"))
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    config["num_hidden_layers"] = num_layers
    (partial / "config.json").write_text(json.dumps(config), encoding="utf-8")
    partial.rename(target)
    return target


def _silent_layer(
    tensors: dict[str, torch.Tensor], source: int, target: int
) -> dict[str, torch.Tensor]:
    prefix = f"{_LAYER}{source}."
    return {
        f"{_LAYER}{target}.{name.removeprefix(prefix)}": torch.zeros_like(tensor)
        if name.endswith(_SILENT)
        else tensor.clone()
        for name, tensor in list(tensors.items())
        if name.startswith(prefix)
    }
