"""Memory and longest time of a step that transformers computes. Arithmetic only; torch-free."""

from __future__ import annotations

import math

from cluster.base.zero3_plan import ForeignModel
from cluster.planner.memory import (
    LOGIT_WORDS,
    RANK_PROCESS_BYTES,
    SCORED_ROWS,
    StepShape,
    Workspace,
)
from replicas.models.memory import DTYPE_BYTES

LIBRARIES_BYTES = 224 << 20
"""transformers and DeepSpeed, beside what any rank has (measured: 465 MiB in all)."""
LEAST_COLUMNS = 8192
"""Rows times context that a padded batch may have at least."""
_SLOW_BYTES_PER_S = 50e6
_FIRST_STEP_S = 30.0


def longest_step_s(model: ForeignModel, dtype: str) -> float:
    """Time for all weights of two passes even from a slow disk."""
    num_bytes = model.num_values * DTYPE_BYTES[dtype]
    return math.ceil(_FIRST_STEP_S + 2 * num_bytes / _SLOW_BYTES_PER_S)


def context_columns(step: StepShape) -> int:
    """Bound on rows x context of a padded batch."""
    return max(LEAST_COLUMNS, step.max_context)


def foreign_workspace(model: ForeignModel, step: StepShape) -> Workspace:
    """Upper estimate of a rank's transient memory; T = tokens of a step, C = context columns.

    activations: T x (8 D + 6 H P + 3 F), twice, for code that reuses nothing; F as if the largest
        layer were three matrices.
    logits: T x V as computed and once more as packed, and what sampling makes of Q rows.
    context: keys and values of one layer, gathered and repeated for all query heads (C columns),
        and the T x S mask as bool and fp32; scores of all heads where they exist as a tensor.
    """
    item = DTYPE_BYTES[step.dtype]
    tokens, context = step.max_step_tokens, min(step.max_context, model.max_position)
    widest = max(model.kv, key=lambda layer: layer.num_heads * layer.width)
    heads = max(model.num_heads, widest.num_heads)
    per_token = (
        8 * model.model_dim + 6 * heads * widest.width + model.layer_values // model.model_dim
    )
    rows = min(tokens, max(step.max_running_requests, SCORED_ROWS))
    gathered = 4 * (widest.num_heads + heads) * widest.width * item
    scores = heads * (item + 4) if model.materialises_scores else 0
    return Workspace(
        activations_bytes=2 * tokens * per_token * item,
        logits_bytes=model.vocab_size * (2 * tokens * item + rows * LOGIT_WORDS * 4),
        context_bytes=context_columns(step) * gathered + tokens * context * (1 + 4 + scores),
        process_bytes=RANK_PROCESS_BYTES + LIBRARIES_BYTES,
    )
