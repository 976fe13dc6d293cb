"""Rotary position embedding (Su et al., arXiv 2104.09864) with the scalings checkpoints use.

Frequencies equal those of `transformers.modeling_rope_utils`. cos and sin are computed in fp32 and
shared by all layers of a step: on the CPU once for every position, else for the tokens at hand.

Dynamic NTK makes frequencies depend on the length of the context. A token at position p is rotated
here as the newest token of a context of p + 1 tokens: exactly what transformers gives when the
tokens past `max_position_embeddings` arrive one by one, as in generation. For a prompt that is
longer than that by itself, transformers' answer depends on how the prompt was cut into forward
passes; ours depends on the tokens alone, so that chunked prefill, cached prefixes, preemption and
neighbours in the batch cannot change it.
"""

from __future__ import annotations

import math

import torch

from cluster.base.errors import ConfigError
from replicas.models.arch import RopeSpec

# Few enough for one thread: torch rounds what is left over behind its last vector differently, so a
# position must always be computed beside the same others.
_POSITIONS_AT_ONCE = 64


class Rotary:
    """Positions -> (cos, sin) for one model; kernels apply them."""

    def __init__(self, spec: RopeSpec, dtype: torch.dtype, device: str) -> None:
        self._spec = spec
        self._dtype = dtype
        self._inv_freq_P = inverse_frequencies(spec).to(device)
        self._scale = attention_scaling(spec)
        self._keeps_table = device == "cpu"
        self._table_2N1P = torch.empty((2, 0, 1, spec.rotary_dim), dtype=dtype)

    def angles(self, positions_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of every token, (T, 1, P) each, in the model's dtype."""
        if not self._keeps_table:
            return self._compute(positions_T)
        table_2N1P = self.table(int(positions_T.numpy().max(initial=-1)) + 1)
        cos_T1P, sin_T1P = table_2N1P[:, positions_T]
        return cos_T1P, sin_T1P

    def table(self, num_positions: int) -> torch.Tensor:
        """cos and sin of at least so many positions from 0 on, (2, N, 1, P); on the CPU.

        It lives until a longer one is asked for.
        """
        if num_positions > self._table_2N1P.shape[1]:
            self._table_2N1P = self._longer_table(num_positions)
        return self._table_2N1P

    def _longer_table(self, num_positions: int) -> torch.Tensor:
        """At least twice as long, in whole blocks of positions."""
        begin = self._table_2N1P.shape[1]
        end = max(num_positions, 2 * begin)
        blocks = (
            torch.stack(self._compute(torch.arange(first, first + _POSITIONS_AT_ONCE)))
            for first in range(begin, end, _POSITIONS_AT_ONCE)
        )
        return torch.cat((self._table_2N1P, *blocks), dim=1)

    def _compute(self, positions_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        inv_freq = self._inv_freq_P
        if self._spec.kind == "dynamic":
            inv_freq = _dynamic_frequencies(self._spec, inv_freq, positions_T)
        half = positions_T[:, None].float() * inv_freq
        angle_T1P = torch.cat((half, half), dim=-1)[:, None, :]
        cos, sin = angle_T1P.cos() * self._scale, angle_T1P.sin() * self._scale
        return cos.to(self._dtype), sin.to(self._dtype)


def inverse_frequencies(spec: RopeSpec) -> torch.Tensor:
    """Angle per position of each pair, (P / 2,) fp32; of a short context for `dynamic`.

    Raises:
        ConfigError: unknown kind.
    """
    plain = 1.0 / spec.theta ** _exponents(spec)
    if spec.kind in ("default", "dynamic"):
        return plain
    if spec.kind == "linear":
        return plain / spec.factor
    if spec.kind == "llama3":
        return _llama3(spec, plain)
    if spec.kind == "yarn":
        return _yarn(spec)
    raise ConfigError(f"RoPE type {spec.kind!r} is not supported.")


def attention_scaling(spec: RopeSpec) -> float:
    """Factor on cos and sin: 1 except for YaRN (arXiv 2309.00071, section 3.4)."""
    if spec.kind != "yarn":
        return 1.0
    if spec.attention_factor is not None:
        return spec.attention_factor
    if spec.mscale and spec.mscale_all_dim:
        return _mscale(spec.factor, spec.mscale) / _mscale(spec.factor, spec.mscale_all_dim)
    return _mscale(spec.factor, 1.0)


def _exponents(spec: RopeSpec) -> torch.Tensor:
    return torch.arange(0, spec.rotary_dim, 2).float() / spec.rotary_dim


def _dynamic_frequencies(
    spec: RopeSpec, plain_P: torch.Tensor, positions_T: torch.Tensor
) -> torch.Tensor:
    """Frequencies per token, (T, P / 2): the base grows with position + 1."""
    length_T1 = (positions_T[:, None] + 1).clamp(min=spec.original_max_position)
    stretch_T1 = spec.factor * length_T1 / spec.original_max_position - (spec.factor - 1)
    base_T1 = spec.theta * stretch_T1 ** (spec.rotary_dim / (spec.rotary_dim - 2))
    grown_TP = 1.0 / base_T1 ** _exponents(spec).to(positions_T.device)
    return torch.where(length_T1 > spec.original_max_position, grown_TP, plain_P)


def _llama3(spec: RopeSpec, plain_P: torch.Tensor) -> torch.Tensor:
    """Slow pairs are stretched, fast ones kept, the ones between blended."""
    context = spec.original_max_position
    low_wavelength = context / spec.low_freq_factor
    high_wavelength = context / spec.high_freq_factor
    wavelength_P = 2 * math.pi / plain_P
    stretched_P = torch.where(wavelength_P > low_wavelength, plain_P / spec.factor, plain_P)
    blend_P = (context / wavelength_P - spec.low_freq_factor) / (
        spec.high_freq_factor - spec.low_freq_factor
    )
    between_P = (1 - blend_P) * stretched_P / spec.factor + blend_P * stretched_P
    is_between_P = (wavelength_P >= high_wavelength) & (wavelength_P <= low_wavelength)
    return torch.where(is_between_P, between_P, stretched_P)


def _yarn(spec: RopeSpec) -> torch.Tensor:
    """Interpolate slow pairs, keep fast ones, with a linear ramp between."""
    dim = spec.rotary_dim
    freq_P = spec.theta ** _exponents(spec)

    def pair_of(rotations: float) -> float:
        turns = spec.original_max_position / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(spec.theta))

    low, high = pair_of(spec.beta_fast), pair_of(spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001
    ramp_P = ((torch.arange(dim // 2).float() - low) / width).clamp(0, 1)
    kept_P = 1 - ramp_P
    return (1.0 / (spec.factor * freq_P)) * (1 - kept_P) + (1.0 / freq_P) * kept_P


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
