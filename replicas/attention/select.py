"""Which attention backend a rank runs: the first of the table that can, or the one asked for.

Every refusal carries all reasons; the choice is logged. A new backend is one row of the table.
"""

from __future__ import annotations

import logging

from cluster.base.errors import ConfigError
from replicas.attention.backend import AttentionBackend, AttentionSpec
from replicas.attention.cpu import CpuAttention
from replicas.attention.torch_ref import TorchReferenceAttention

_BACKENDS = (CpuAttention, TorchReferenceAttention)
BACKEND_NAMES = tuple(backend.name for backend in _BACKENDS)
_log = logging.getLogger(__name__)


def select_backend(spec: AttentionSpec, requested: str = "auto") -> AttentionBackend:
    """A backend for `spec`.

    Args:
        requested: `auto` (fastest first) or a backend's name.

    Raises:
        ConfigError: unknown name, or no backend that can run `spec`; states every reason.
    """
    candidates = [item for item in _BACKENDS if requested in ("auto", item.name)]
    if not candidates:
        raise ConfigError(
            f"There is no attention backend {requested!r}.",
            f"Use auto or one of: {', '.join(BACKEND_NAMES)}.",
            param="attention_backend",
        )
    refusals: list[str] = []
    for backend in candidates:
        reasons = backend.why_not(spec)
        if not reasons:
            passed_over = f"; passed over {'; '.join(refusals)}" if refusals else ""
            _log.info("attention backend %s (%s)%s", backend.name, requested, passed_over)
            return backend(spec)
        refusals.append(f"{backend.name}: {', '.join(reasons)}")
    raise ConfigError(
        f"No attention backend can run {spec}.",
        f"Reasons: {'; '.join(refusals)}.",
        param="attention_backend",
    )
