"""The library's functions with their signatures, as ctypes calls them; each releases the GIL."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

ABI = 7
"""Version of the interface; the library says which one it has."""
_P, _L, _F, _I = ctypes.c_void_p, ctypes.c_long, ctypes.c_float, ctypes.c_int
SUFFIX = {torch.bfloat16: "bf16", torch.float32: "f32"}
_SIGNATURES = {
    "pack": [_P, _L, _L, _P, _I],
    "linear": [_P, _P, _P, _P, _L, _L, _L, _P, _I],
    "gated_mlp": [_P, _P, _P, _P, _P, _P, _L, _L, _L, _L, _P, _I],
    "embed": [_P, _P, _P, _L, _L, _I],
    "rms_norm": [_P, _P, _P, _P, _P, _L, _L, _F, _I],
    "prepare_heads": [_P, _P, _P, _P, _P, _L, _L, _L, _L, _F, _I],
    "silu_mul": [_P, _P, _L, _L, _I],
    "write_slots": [_P, _P, _L, _P, _L, _P, _L, _L, _I],
    "attention": [_P, _P, _P, _P, _P, _I],
    "attention_block": [_P, _P, _P, _P, _P, _P, _I],
    "layers": [_P, _P, _P, _P, _P, _P, _I],
    "layers_bytes": [_P, _L, _L],
}
_RESULTS = {"layers": ctypes.c_bool, "layers_bytes": _L}
DTYPES = tuple(SUFFIX)
_Call = Callable[..., None]
_Count = Callable[..., int]
_Check = Callable[..., bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Calls:
    """The functions for one dtype, as C declares them."""

    pack: _Call
    linear: _Call
    gated_mlp: _Call
    embed: _Call
    rms_norm: _Call
    prepare_heads: _Call
    silu_mul: _Call
    write_slots: _Call
    attention: _Call
    attention_block: _Call
    layers: _Check
    layers_bytes: _Count


def calls_of(library: ctypes.CDLL, suffix: str) -> Calls:
    """All functions for the dtype that their names end in.

    Raises:
        AttributeError: the library lacks one.
    """
    return Calls(**{name: typed_function(library, name, suffix) for name in _SIGNATURES})


def typed_function(library: ctypes.CDLL, name: str, suffix: str) -> Callable[..., Any]:
    """`pk_<name>_<suffix>`, whose arguments are those of `name` for every suffix.

    Raises:
        AttributeError: the library lacks it.
    """
    function = getattr(library, f"pk_{name}_{suffix}")
    function.argtypes = _SIGNATURES[name]
    function.restype = _RESULTS.get(name)
    call: Callable[..., Any] = function
    return call
