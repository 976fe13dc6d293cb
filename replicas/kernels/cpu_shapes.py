"""What Python and the compiled library share, field by field; addresses as integers."""

from __future__ import annotations

import ctypes

_P, _L, _F = ctypes.c_void_p, ctypes.c_long, ctypes.c_float


class AttentionShape(ctypes.Structure):
    """The C side's `Shape`: strides in elements; window 0 sees all."""

    _fields_ = (
        ("heads", _L),
        ("kv_heads", _L),
        ("head_dim", _L),
        ("block_size", _L),
        ("window", _L),
        ("query_stride", _L),
        ("kv_stride", _L),
        ("cache_values", _L),
        ("scale", _F),
    )


class StepShape(ctypes.Structure):
    """The C side's `Step`: the requests of a step; addresses as integers."""

    _fields_ = (
        ("tables", _P),
        ("query_start", _P),
        ("seq_lens", _P),
        ("slots", _P),
        ("cos", _P),
        ("sin", _P),
        ("requests", _L),
        ("rows", _L),
        ("table_stride", _L),
    )


class InputsShape(ctypes.Structure):
    """The C side's `Inputs`: a step's tokens and the tables they are looked up in."""

    _fields_ = (
        ("ids", _P),
        ("positions", _P),
        ("table", _P),
        ("cos", _P),
        ("sin", _P),
        ("packed", _L),
        ("tokens", _L),
        ("angles", _L),
    )


class HeadShape(ctypes.Structure):
    """The C side's `Head`: what greedy decoding wants behind the layers, and where it goes."""

    _fields_ = (
        ("packed", _P),
        ("places", _P),
        ("sign", _P),
        ("n", _L),
        ("count", _L),
        ("are_finite", ctypes.c_int64),
        ("seconds", ctypes.c_double),
    )


class BlockShape(ctypes.Structure):
    """The C side's `Block`: one layer's attention, its packed weights and what surrounds them."""

    _fields_ = (
        ("shape", AttentionShape),
        ("qkv", _P),
        ("qkv_bias", _P),
        ("out", _P),
        ("out_bias", _P),
        ("query_norm", _P),
        ("key_norm", _P),
        ("width", _L),
        ("out_width", _L),
        ("head_eps", _F),
    )


class GateShape(ctypes.Structure):
    """The C side's `Gate`."""

    _fields_ = (
        ("experts", _L),
        ("top_k", _L),
        ("groups", _L),
        ("top_groups", _L),
        ("score", ctypes.c_int32),
        ("group_top2", ctypes.c_int32),
        ("normalise", ctypes.c_int32),
        ("scale", _F),
    )


class ExpertsShape(ctypes.Structure):
    """The C side's `Experts`: a layer's routed experts; `all`: four addresses for each slot."""

    _fields_ = (
        ("all", _P),
        ("order", _P),
        ("slots", _L),
        ("dim", _L),
        ("ffn", _L),
        ("limit", _F),
        ("alpha", _F),
    )


class MixtureShape(ctypes.Structure):
    """The C side's `Mixture`: a layer's experts, their gate, and the MLP that all rows visit."""

    _fields_ = (
        ("experts", ExpertsShape),
        ("gate", GateShape),
        ("router", _P),
        ("router_bias", _P),
        ("correction", _P),
        ("shared_up", _P),
        ("shared_down", _P),
        ("shared_gate", _P),
        ("shared_ffn", _L),
    )


class LayerShape(ctypes.Structure):
    """The C side's `Layer`: an MLP's weights or the address of a `MixtureShape`."""

    _fields_ = (
        ("block", BlockShape),
        ("attention_norm", _P),
        ("mlp_norm", _P),
        ("up", _P),
        ("up_bias", _P),
        ("down", _P),
        ("down_bias", _P),
        ("mixture", _P),
        ("cache", _P),
    )


class StackShape(ctypes.Structure):
    """The C side's `Stack`: all layers of a model and its last norm."""

    _fields_ = (
        ("layers", _P),
        ("last_norm", _P),
        ("mixture", _P),
        ("seconds", _P),
        ("count", _L),
        ("width", _L),
        ("ffn", _L),
        ("eps", _F),
    )


LAYER_PARTS = ("norms", "qkv", "attention", "attention out", "gate and up", "down", "routing")
"""What `StackShape.seconds` counts, in the order of the C side's `Kind`; the last one in mixtures
alone."""
