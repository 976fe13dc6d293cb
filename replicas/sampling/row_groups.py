"""How many rows of logits to work on at once.

Rows are independent, so groups change nothing but time and memory: on a CPU the temporaries of a
group stay in the cache (32 rows of a 150k vocabulary take 2.8 ms each in one go and 0.8 ms each
in small groups), and on any device the working memory stays bounded whatever the batch.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

_CPU_ELEMENTS = 1 << 20
_DEVICE_ELEMENTS = 1 << 26


def row_groups(logits_RV: torch.Tensor, num_rows: int | None = None) -> Iterator[slice]:
    """Slices that cover `num_rows` rows (all of them by default) of the width of `logits_RV`."""
    total = len(logits_RV) if num_rows is None else num_rows
    elements = _CPU_ELEMENTS if logits_RV.device.type == "cpu" else _DEVICE_ELEMENTS
    step = max(1, elements // max(1, logits_RV.shape[1]))
    return (slice(start, min(start + step, total)) for start in range(0, total, step))
