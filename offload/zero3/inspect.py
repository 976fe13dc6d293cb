"""Process that looks at a checkpoint's architecture with transformers: sizes out, as JSON.

The model is built on the meta device, so it takes no memory whatever its size, and is run once with
a cache that records the shapes of keys and values. What cannot be served is refused here by name:
code from a repository, layers with a recurrent state, encoders.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from cluster.base.zero3_plan import ForeignModel, KvLayer
from offload.zero3.cache_layers import RecordingLayer, cache_of

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NO_LIMIT = 1 << 20
"""Positions of a model whose configuration names no limit, such as one with ALiBi."""


class RefusalError(Exception):
    """The checkpoint cannot be served; arguments: cause and remedy."""


def inspect(directory: Path) -> ForeignModel:
    """See the module.

    Raises:
        RefusalError: it cannot be served.
    """
    config = _config(directory)
    dtype = _DTYPES[_own_dtype(directory, config)]  # before the model's own is noted there
    model = _built(config)
    kv, num_logits = _run(model)
    text = config.get_text_config()
    embeddings = model.get_input_embeddings()
    parameters = list(model.parameters())
    eos = getattr(text, "eos_token_id", None)
    return ForeignModel(
        architecture=type(model).__name__,
        vocab_size=min(num_logits, embeddings.weight.shape[0]),
        model_dim=embeddings.weight.shape[1],
        num_heads=getattr(text, "num_attention_heads", 0) or max(s.num_heads for s in kv),
        max_position=getattr(text, "max_position_embeddings", 0) or _NO_LIMIT,
        dtype=dtype,
        num_values=sum(parameter.numel() for parameter in parameters),
        largest_values=max(parameter.numel() for parameter in parameters),
        layer_values=_layer_values(model),
        tensors_per_module=max(
            len(list(module.parameters(recurse=False))) for module in model.modules()
        ),
        materialises_scores=model.config._attn_implementation == "eager",
        kv=kv,
        eos_token_ids=tuple([eos] if isinstance(eos, int) else eos or ()),
    )


def _config(directory: Path) -> Any:
    try:
        config = AutoConfig.from_pretrained(
            directory, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise RefusalError(
                "The architecture is computed by code that its repository brings along, which is "
                "never run.",
                "Use a checkpoint of an architecture that transformers itself has.",
            ) from None
        raise RefusalError(
            f"transformers cannot read config.json: {_first_line(error)}.",
            "Use a checkpoint of an architecture that this version of transformers has.",
        ) from None
    if getattr(config, "is_encoder_decoder", False):
        raise RefusalError(
            "The model has an encoder; only decoders are served.", "Use a causal language model."
        )
    return config


def _built(config: Any) -> Any:
    auto: Any = AutoModelForCausalLM
    try:
        with torch.device("meta"):
            # Some grouped products accept bfloat16 alone on this device; shapes are the same.
            return auto.from_config(config, dtype=torch.bfloat16).eval()
    except Exception as error:
        raise RefusalError(
            f"transformers builds no causal language model of it: {_first_line(error)}.",
            "Use a causal language model.",
        ) from None


def _run(model: Any) -> tuple[tuple[KvLayer, ...], int]:
    """Shapes of every layer's keys and values, and the width of the logits."""
    num_layers = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    layers = [RecordingLayer() for _ in range(num_layers)]
    ids = torch.zeros((1, 4), dtype=torch.long, device="meta")
    try:
        with torch.no_grad():
            output = model(ids, past_key_values=cache_of(layers), use_cache=True)
    except Exception as error:
        raise RefusalError(
            f"{type(model).__name__} does not run with a plain key/value cache: "
            f"{_first_line(error)}.",
            "Models with recurrent, convolutional or compressed state are not served.",
        ) from None
    shapes = tuple(KvLayer(num_heads=n, key_dim=k, value_dim=v) for n, k, v in map(_shape, layers))
    if not any(shape.num_heads for shape in shapes):
        raise RefusalError(
            f"{type(model).__name__} keeps no keys and values.",
            "Models with recurrent state are not served.",
        )
    return shapes, output.logits.shape[-1]


def _shape(layer: RecordingLayer) -> tuple[int, int, int]:
    return layer.shape or (0, 0, 0)


def _own_dtype(directory: Path, config: Any) -> torch.dtype:
    """The configuration's, or that of most tensors in the files."""
    if config.dtype in _DTYPES:
        named: torch.dtype = config.dtype
        return named
    counts: Counter[str] = Counter()
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(str(path), framework="pt") as stored:
            counts.update(stored.get_slice(name).get_dtype() for name in stored.keys())  # noqa: SIM118
    found = next((name for name, _ in counts.most_common() if name in _STORED), None)
    if found is None:
        raise RefusalError(
            "The checkpoint's tensors are neither float32, bfloat16 nor float16.",
            "Use a checkpoint that is not quantised.",
        )
    return _STORED[found]


def _layer_values(model: Any) -> int:
    """Of the largest member of any list of modules; without a list, of the largest parameter."""
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    sizes = [sum(p.numel() for p in layer.parameters()) for layers in lists for layer in layers]
    return max(sizes, default=0) or max(p.numel() for p in model.parameters())


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")[:300]


def main() -> int:
    """Print the answer as the last line."""
    try:
        answer = dataclasses.asdict(inspect(Path(sys.argv[1])))
    except RefusalError as error:
        answer = {"refusal": error.args}
    sys.stdout.write(json.dumps(answer) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
