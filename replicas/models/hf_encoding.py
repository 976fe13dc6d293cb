"""`quantization_config` of a `config.json` -> how the checkpoint's weights are stored; torch-free.

What can be turned into plain weights while loading is accepted: MXFP4 experts as GPT-OSS publishes
them, FP8 as DeepSeek-V3 and Qwen3 do (`fp8`), and compressed-tensors' `float-quantized`. All else
is refused with its name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.base.errors import ConfigError
from replicas.models.config_fields import ConfigFields
from replicas.models.weight_encoding import Codes, WeightEncoding

_KEYS = ("quantization_config", "compression_config")
_READ = "mxfp4 (GPT-OSS), fp8, and compressed-tensors with format float-quantized"
_REMEDIES: Mapping[str, str] = {
    "bitsandbytes": "Save it with plain weights: model.dequantize(), then save_pretrained(DIR).",
}
_USE_PLAIN = (
    "Use the model's float32, bfloat16, float16 or FP8 checkpoint; where memory is short, "
    "`engine: offload` with `offload: {precision: int4}` quantises that one itself."
)
_NO_EFFECT = (None, "dense")
_BLOCK_AXES = 2


def encoding_from_hf(config: Mapping[str, Any]) -> WeightEncoding | None:
    """How quantised weights are stored; None for a checkpoint that has none.

    Activations stay in the model's dtype whatever the checkpoint says of them.

    Raises:
        ConfigError: a format that is not read, named; `param` is `quantization_config`.
    """
    fields = ConfigFields(config)
    section = fields.section(*_KEYS)
    if not section:
        return None
    method = section.get("quant_method")
    if method == "mxfp4":
        return WeightEncoding(codes=Codes.MXFP4, title="mxfp4")
    if method == "fp8":
        return _fp8(section)
    if method == "compressed-tensors":
        return _compressed(section)
    named = f"with {method}" if method else "by an unnamed method"
    raise _refused(f"The checkpoint is quantised {named}", str(method))


def read_encoding(directory: Path) -> WeightEncoding | None:
    """`encoding_from_hf` of a checkpoint directory; None where it has no config.json.

    Raises:
        ConfigError: as there, or the file is no JSON object.
    """
    file = directory / "config.json"
    if not file.is_file():
        return None
    try:
        config = json.loads(file.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{file} is no JSON ({error}).", "Fetch it again.") from error
    if not isinstance(config, Mapping):
        raise ConfigError(f"{file} is no JSON object.", "Fetch it again.")
    return encoding_from_hf(config)


def _fp8(section: Mapping[str, Any]) -> WeightEncoding:
    if (fmt := section.get("fmt", "e4m3")) not in ("e4m3", "float8_e4m3fn"):
        raise _refused(f"The checkpoint is quantised with fp8 of format {fmt}", "fp8")
    block = section.get("weight_block_size")
    if block is None:
        return WeightEncoding(codes=Codes.FP8, title="fp8")
    return _blocks("fp8", block)


def _compressed(section: Mapping[str, Any]) -> WeightEncoding:
    """Every group of layers has to be symmetric 8-bit floats with scales of one kind."""
    method, layout = "compressed-tensors", section.get("format")
    if layout != "float-quantized":
        raise _refused(f"The checkpoint is quantised with {method} of format {layout}", method)
    if section.get("kv_cache_scheme"):
        raise _refused(f"The {method} checkpoint has scales of a quantised KV cache", method)
    if (section.get("sparsity_config") or {}).get("format") not in _NO_EFFECT:
        raise _refused(f"The {method} checkpoint is sparse", method)
    groups = [group.get("weights") or {} for group in section.get("config_groups", {}).values()]
    blocks = {_compressed_block(weights) for weights in groups}
    if len(blocks) != 1:
        raise _refused(f"The {method} checkpoint has {len(blocks)} kinds of scales", method)
    (block,) = blocks
    if block is None:
        return WeightEncoding(codes=Codes.FP8, title=method)
    return _blocks(method, list(block))


def _compressed_block(weights: Mapping[str, Any]) -> tuple[Any, ...] | None:
    kind = (weights.get("type"), weights.get("num_bits"), weights.get("symmetric", True))
    strategy = weights.get("strategy")
    if kind != ("float", 8, True) or strategy not in ("tensor", "channel", "block"):
        raise _refused(
            f"The compressed-tensors checkpoint has weights of type {kind[0]}, {kind[1]} bits, "
            f"strategy {strategy}",
            "compressed-tensors",
        )
    return tuple(weights.get("block_structure") or ()) if strategy == "block" else None


def _blocks(title: str, block: object) -> WeightEncoding:
    match block:
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return WeightEncoding(codes=Codes.FP8, title=title, block=(rows, columns))
    raise ConfigError(
        f"The {title} checkpoint's weight block is {block!r}.",
        f"It has to be {_BLOCK_AXES} positive whole numbers.",
        param=_KEYS[0],
    )


def _refused(cause: str, method: str) -> ConfigError:
    return ConfigError(
        f"{cause}; of quantised checkpoints {_READ} are read.",
        _REMEDIES.get(method, _USE_PLAIN),
        param=_KEYS[0],
    )
