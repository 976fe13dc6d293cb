"""What the `config.json` of every family has in common: head size, activation, tokens, dtype.

Torch-free. Each function reads one thing and refuses what this engine does not compute.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from replicas.models.config_fields import ConfigFields

ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
_ACTIVATION_ALIASES: Mapping[str, str] = {"swish": "silu"}
_DTYPES = ("float32", "bfloat16", "float16")


def default_head_dim(fields: ConfigFields, key: str, num_heads: int) -> int:
    """Model dim over heads, for configs that do not state a head dim.

    Args:
        key: what the family calls its model dim.

    Raises:
        ConfigError: it does not divide evenly.
    """
    model_dim = fields.integer(key)
    if model_dim % num_heads and fields.raw("head_dim") is None:
        raise fields.wrong(key, model_dim, f"a multiple of the {num_heads} heads")
    return model_dim // num_heads


def activation_name(fields: ConfigFields, key: str, default: str) -> str:
    """The activation under `key`, by its canonical name.

    Raises:
        ConfigError: not one of `ACTIVATIONS`.
    """
    name = fields.text(key, default=default)
    name = _ACTIVATION_ALIASES.get(name, name)
    if name not in ACTIVATIONS:
        raise fields.wrong(key, name, f"one of {', '.join(ACTIVATIONS)}")
    return name


def shared_fields(fields: ConfigFields, *, bos: int | None, eos: tuple[int, ...]) -> dict[str, Any]:
    """Vocabulary, special tokens and dtype, as keywords of `ArchConfig`.

    Args:
        bos: the family's default, for a config that does not mention the key.
        eos: likewise.

    Raises:
        ConfigError: a dtype that is not float32, bfloat16 or float16.
    """
    dtype = fields.text("dtype", "torch_dtype", default="float32").removeprefix("torch.")
    if dtype not in _DTYPES:
        raise fields.wrong("dtype", dtype, f"one of {', '.join(_DTYPES)}")
    bos_ids = fields.token_ids("bos_token_id")
    if "bos_token_id" not in fields and bos is not None:
        bos_ids = (bos,)
    return {
        "vocab_size": fields.integer("vocab_size"),
        "dtype": dtype,
        "bos_token_id": bos_ids[0] if bos_ids else None,
        "eos_token_ids": fields.token_ids("eos_token_id") if "eos_token_id" in fields else eos,
    }
