"""A sample of a checkpoint tells what its compressed store will take."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cluster.base.errors import CorruptWeightsError
from offload.pack_model import pack_model
from offload.stored_share import USUAL_SHARE, sampled_share

EXAMPLES = Path(__file__).parents[3] / "examples" / "models"
FILE = "model.safetensors"


@pytest.mark.parametrize("name", ["demo-dense", "demo-moe"])
def test_it_is_near_what_packing_makes_of_trained_models(
    name: str, tmp_path: Path, cpu_kernels: object
) -> None:
    store = pack_model(
        str(EXAMPLES / name),
        dtype="bfloat16",
        precision="native",
        compression="lossless",
        disk_path=str(tmp_path),
    )
    image_bytes = sum(record.image_bytes for record in store.records)
    # Records of small units end in pages that are not full.
    assert sampled_share(EXAMPLES / name, [FILE]) == pytest.approx(
        store.total_bytes / image_bytes, abs=0.02
    )


def share_of(folder: Path, tensor: torch.Tensor, **others: torch.Tensor) -> float:
    save_file({"w": tensor, **others}, folder / FILE)
    return sampled_share(folder, [FILE])


def test_formats(tmp_path: Path) -> None:
    weights = torch.randn((512, 512)) * 0.02
    assert share_of(tmp_path, weights.bfloat16()) == pytest.approx(0.67, abs=0.01)
    assert share_of(tmp_path, weights) == pytest.approx(0.67, abs=0.01)
    assert share_of(tmp_path, weights.half()) == USUAL_SHARE
    assert share_of(tmp_path, weights, v=weights.half()) == USUAL_SHARE
    assert share_of(tmp_path, weights[:4, :4].contiguous()) == USUAL_SHARE
    noise = torch.randint(-(2**15), 2**15, (512, 512)).to(torch.int16).view(torch.bfloat16)
    assert share_of(tmp_path, noise) == 1.0
    assert share_of(tmp_path, torch.zeros((512, 512)).bfloat16()) < 0.64


def test_a_damaged_file_is_told(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"no safetensors")
    with pytest.raises(CorruptWeightsError):
        sampled_share(tmp_path, [FILE])
