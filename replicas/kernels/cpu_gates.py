"""The compiled gate: router logits to experts and weights in one call; the oracle: `moe.gating`."""

from __future__ import annotations

import ctypes
import functools

import torch

from cluster.base.errors import InternalError
from moe.spec import GateSpec, GroupScore, Score
from replicas.kernels.cpu_shapes import GateShape
from replicas.kernels.loader import CpuLibrary

_P, _L, _I = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
_SCORES = (Score.SOFTMAX, Score.SIGMOID, Score.RAW)


class CpuGates:
    """Routes tokens for any gate."""

    def __init__(self, library: CpuLibrary) -> None:
        self._route = library.function("pk_route_f32", [_P, _P, _P, _L, _P, _P, _I])

    def route(
        self, logits_TE: torch.Tensor, spec: GateSpec, bias_E: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `moe.gating.route`.

        Raises:
            InternalError: the tensors do not belong to such a gate.
        """
        logits_TE = logits_TE.float().contiguous()
        if logits_TE.dim() != 2 or logits_TE.shape[1] != spec.num_experts:
            raise InternalError(
                f"A gate of {spec.num_experts} experts got logits {tuple(logits_TE.shape)}."
            )
        if bias_E is not None:
            bias_E = bias_E.float().contiguous()
        shape = (logits_TE.shape[0], spec.top_k)
        ids_TK = torch.empty(shape, dtype=torch.int64)
        weights_TK = torch.empty(shape, dtype=torch.float32)
        self._route(
            logits_TE.data_ptr(),
            None if bias_E is None else bias_E.data_ptr(),
            ctypes.byref(gate_shape(spec)),
            shape[0],
            ids_TK.data_ptr(),
            weights_TK.data_ptr(),
            torch.get_num_threads(),
        )
        return ids_TK, weights_TK


@functools.lru_cache(maxsize=64)
def gate_shape(spec: GateSpec) -> GateShape:
    """A gate as the library takes it.

    Raises:
        InternalError: no token can be routed so.
    """
    if reasons := spec.why_not():
        raise InternalError(f"No token can be routed so: {'; '.join(reasons)}.")
    return GateShape(
        experts=spec.num_experts,
        top_k=spec.top_k,
        groups=spec.num_groups,
        top_groups=spec.top_groups,
        score=_SCORES.index(spec.score),
        group_top2=spec.group_score is GroupScore.TOP2_SUM,
        normalise=spec.normalise,
        scale=spec.scale,
    )
