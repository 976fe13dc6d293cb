"""Row groups cover every row once and change no result."""

from __future__ import annotations

import pytest
import torch

from replicas.api import SamplingParams
from replicas.sampling import row_groups as groups
from replicas.sampling.sampler import Sampler
from tests.support.sampling_batches import RowCase, batch_of


@pytest.mark.parametrize("width", [1, 300_000, 3_000_000])
@pytest.mark.parametrize("num_rows", [0, 1, 7])
def test_groups_cover_all_rows(width: int, num_rows: int) -> None:
    logits = torch.empty(1).expand(num_rows, width)
    parts = list(groups.row_groups(logits))
    covered = [row for part in parts for row in range(num_rows)[part]]
    assert covered == list(range(num_rows))
    assert all(part.stop > part.start for part in parts)


def test_groups_change_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    vocab_size = 700
    logits = torch.randn(11, vocab_size, generator=torch.Generator().manual_seed(2))
    batch = batch_of(
        [
            RowCase(
                params=SamplingParams(
                    temperature=0.0 if row % 4 == 3 else 1.3,
                    seed=row,
                    top_p=0.9 if row % 2 else 1.0,
                    logprobs=3 if row % 3 else None,
                )
            )
            for row in range(11)
        ]
    )
    whole = Sampler().sample(logits, batch)
    monkeypatch.setattr(groups, "_CPU_ELEMENTS", 2 * vocab_size)
    assert Sampler().sample(logits, batch) == whole
