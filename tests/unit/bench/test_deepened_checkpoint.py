"""A deepened checkpoint says what its source says, to the bit."""

from pathlib import Path

import torch

from bench.deepened_checkpoint import deepened_checkpoint
from tests.support.stepping import Stepper
from tests.support.tiny_models import prompt_tokens, write_checkpoint


def test_silent_layers_change_no_bit(tmp_path: Path) -> None:
    source = write_checkpoint("llama", tmp_path / "source")
    deep = deepened_checkpoint(source, tmp_path / "deep", 7)
    assert deepened_checkpoint(source, deep, 7) == deep
    tokens = prompt_tokens(12)
    rows = [Stepper.load(path).step({"r": tokens})["r"] for path in (source, deep)]
    assert torch.equal(*rows)
    sizes = [(path / "model.safetensors").stat().st_size for path in (source, deep)]
    assert sizes[1] > 1.7 * sizes[0]
