"""Random numbers that are a pure function of (seed, choice index, absolute token position).

Owns the one source of randomness of the engine. There is no generator object and no state, so
batch order, preemption, another replica or a replay of prompt + output cannot change a stream.
Each (seed, choice) names a SplitMix64 generator (Steele, Lea and Flood, OOPSLA 2014) and the
position picks its output; a SplitMix64 output can be computed without the ones before it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

UInt64Array = npt.NDArray[np.uint64]
Float64Array = npt.NDArray[np.float64]

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)
_SEED_MASK = (1 << 64) - 1
_MANTISSA_SHIFT = np.uint64(64 - 53)
_MANTISSA_SCALE = 2.0**-53


def fold_seed(seed: int) -> int:
    """Any Python integer as an unsigned 64-bit seed (modulo 2**64)."""
    return seed & _SEED_MASK


def splitmix64(state: UInt64Array, index: UInt64Array) -> UInt64Array:
    """Output number `index` (the first is 1) of SplitMix64 generators that start at `state`."""
    z = state + index * _GAMMA
    z = (z ^ (z >> np.uint64(30))) * _MULTIPLIER_1
    z = (z ^ (z >> np.uint64(27))) * _MULTIPLIER_2
    output: UInt64Array = z ^ (z >> np.uint64(31))
    return output


def uniform(
    seed_R: UInt64Array, choice_R: UInt64Array, position_R: npt.NDArray[np.int64]
) -> Float64Array:
    """One number in [0, 1) per row, with all 53 bits of a float64.

    Args:
        seed_R: request seeds, see `fold_seed`.
        choice_R: index of the choice within its request.
        position_R: absolute index of the sampled token in prompt + output.
    """
    one = np.uint64(1)
    # The seed is scrambled first: neighbouring seeds must not give overlapping generators.
    request_state = splitmix64(np.asarray(seed_R, np.uint64), np.ones(len(seed_R), np.uint64))
    choice_state = splitmix64(request_state, np.asarray(choice_R, np.uint64) + one)
    bits = splitmix64(choice_state, np.asarray(position_R).astype(np.uint64) + one)
    fractions: Float64Array = (bits >> _MANTISSA_SHIFT).astype(np.float64) * _MANTISSA_SCALE
    return fractions
