"""A layer's mixture of experts as the compiled stack of layers takes it: weights and a gate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from moe.block import CORRECTION, ROUTER, ROUTER_BIAS, SHARED_GATE
from moe.spec import MoeSpec
from replicas.attention.cpu_block import address
from replicas.kernels.cpu_experts import CpuExperts
from replicas.kernels.cpu_gates import gate_shape
from replicas.kernels.cpu_shapes import MixtureShape
from replicas.kernels.expert_ops import ExpertSet
from replicas.kernels.loader import PACKED, CpuLibrary

Tensors = Mapping[str, torch.Tensor]
_SHARED_UP, _SHARED_DOWN = "up.weight", "down.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuMixture:
    """Where one layer's mixture lies; its addresses hold as long as the layer's tensors do."""

    shape: MixtureShape
    experts: CpuExperts
    """Keeps the table that the shape points to."""

    @classmethod
    def of(
        cls, library: CpuLibrary, spec: MoeSpec, tensors: Tensors, experts: Sequence[Tensors]
    ) -> CpuMixture | None:
        """A mixture whose experts are all here, whole and gated with silu.

        Args:
            tensors: the layer's own: router, shared experts.
            experts: each expert's, by number.

        Returns:
            None when the weights do not lie as the library needs them.
        """
        known = ExpertSet(
            tensors=tuple(experts),
            held=tuple(range(len(experts))),
            down_bias=True,
            glu_limit=spec.glu_limit,
            glu_alpha=spec.glu_alpha,
        )
        needed = [ROUTER]
        if spec.shared_ffn_dim:
            needed += [_SHARED_UP, _SHARED_DOWN]
        if spec.shared_gate:
            needed.append(SHARED_GATE)
        if spec.residual or any(name + PACKED not in tensors for name in needed):
            return None
        if CpuExperts.why_not(library, known):
            return None
        together = CpuExperts(library, known)
        shape = MixtureShape(
            together.shape,
            gate_shape(spec.gate),
            address(tensors[ROUTER + PACKED]),
            address(tensors.get(ROUTER_BIAS)),
            address(tensors.get(CORRECTION)),
            *(
                address(tensors[name + PACKED] if name in needed else None)
                for name in (_SHARED_UP, _SHARED_DOWN, SHARED_GATE)
            ),
            spec.shared_ffn_dim,
        )
        return cls(shape=shape, experts=together)
