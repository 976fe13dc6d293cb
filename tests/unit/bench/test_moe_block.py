"""The mixture block benchmark on a tiny layer: everybody is compared, or a row says why not."""

from __future__ import annotations

import dataclasses

import pytest

from bench import moe_block
from replicas.kernels.torch_ops import TORCH_KERNELS

TINY = moe_block.Shape(experts=4, top_k=2, dim=32, ffn=32, layers=2)


@pytest.mark.parametrize(("limit", "missing"), [(1 << 30, False), (0, True)])
def test_every_engine_has_a_row(monkeypatch: pytest.MonkeyPatch, limit: int, missing: bool) -> None:
    monkeypatch.setattr(moe_block, "TURN_S", 0.0)
    monkeypatch.setattr(moe_block, "COPY_LIMIT_BYTES", limit)
    engines = moe_block._engines(TINY, TORCH_KERNELS)
    rows = list(moe_block.case_rows(TINY, 5, engines, rounds=1))
    names = [row.against.partition(":")[0] for row in rows]
    assert names == ["one by one", *moe_block.THEIRS]
    assert all(row.ours > 0 for row in rows)
    assert (rows[-1].ratio is None) == missing


def test_another_layer_is_not_measured() -> None:
    engines = moe_block._engines(TINY, TORCH_KERNELS)
    other = dataclasses.replace(TINY, top_k=1)
    wrong = engines | {"ours": moe_block._engines(other, TORCH_KERNELS)["ours"]}
    with pytest.raises(SystemExit, match="ours computes another layer"):
        list(moe_block.case_rows(TINY, 6, wrong, rounds=1))
