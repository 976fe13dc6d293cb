"""Formats in which linear weights are stored and streamed. Torch-free: policy and planner read it.

Quantised formats keep one scale and one minimum, 16 bits each, for every group of `GROUP` inputs
of one output row; what is computed with is the model's own dtype again.
"""

from __future__ import annotations

import enum

GROUP = 64
"""Weights that share a scale and a minimum."""
NEVER_QUANTISED = ("router.weight", "shared_gate.weight", "coefficient.weight")
"""Small weights that decide where a token goes: rounded, they would choose other experts."""
GROUP_BYTES = 4
"""One scale and one minimum, 16 bits each."""


class Precision(enum.StrEnum):
    """How streamed linear weights lie in the store."""

    NATIVE = "native"
    INT8 = "int8"
    INT4 = "int4"

    def bytes_per_weight(self, native_bytes: float) -> float:
        """Stored bytes of one linear weight, scales included.

        Args:
            native_bytes: of one weight in the model's dtype.
        """
        if self is Precision.NATIVE:
            return native_bytes
        return (1.0 if self is Precision.INT8 else 0.5) + GROUP_BYTES / GROUP
