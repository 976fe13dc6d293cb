"""Loading checkpoints of every layout: sharded, linked, with other prefixes, sliced over ranks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.base.errors import ConfigError, CorruptWeightsError
from replicas.layers.weights import ResidentWeights
from replicas.models.checkpoint import load_weights
from replicas.models.hf_config import arch_from_hf
from replicas.models.weight_units import weight_units
from tests.support.stepping import Stepper
from tests.support.tiny_models import prompt_tokens, write_checkpoint

Checkpoint = Callable[[str], Path]


def _load(path: Path, rank: int = 0, tp_size: int = 1, dtype: str = "float32") -> ResidentWeights:
    arch = arch_from_hf(json.loads((path / "config.json").read_text()))
    return load_weights(path, weight_units(arch, rank, tp_size), dtype=dtype, device="cpu")


def _rewritten(source: Path, target: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    target.mkdir()
    shutil.copy(source / "config.json", target)
    save_file({name: t.contiguous() for name, t in tensors.items()}, target / "model.safetensors")
    return target


def _logits(path: Path) -> torch.Tensor:
    return Stepper.load(path).step({"a": prompt_tokens(9)})["a"]


def test_shards_equal_one_file(checkpoint: Checkpoint, tmp_path: Path) -> None:
    sharded = write_checkpoint("llama", tmp_path / "sharded", max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert torch.equal(_logits(sharded), _logits(checkpoint("llama")))


@pytest.mark.parametrize(
    ("name", "full", "short"),
    [
        ("gpt2", "transformer.", ""),
        ("opt", "model.decoder.", "decoder."),
        ("llama_tied_wide", "model.", ""),
    ],
)
def test_base_model_names_are_understood(
    checkpoint: Checkpoint, tmp_path: Path, name: str, full: str, short: str
) -> None:
    source = checkpoint(name)
    tensors = load_file(source / "model.safetensors")
    renamed = {
        short + key.removeprefix(full) if key.startswith(full) else key: value
        for key, value in tensors.items()
    }
    assert renamed.keys() != tensors.keys()
    copy = _rewritten(source, tmp_path / name, renamed)
    assert torch.equal(_logits(copy), _logits(source))


def test_constant_buffers_are_ignored(checkpoint: Checkpoint, tmp_path: Path) -> None:
    gpt2, llama = checkpoint("gpt2"), checkpoint("llama")
    extra = {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8),
        "transformer.h.2.attn.masked_bias": torch.tensor(-1e4),
    }
    _load(_rewritten(gpt2, tmp_path / "a", load_file(gpt2 / "model.safetensors") | extra))
    extra = {"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    _load(_rewritten(llama, tmp_path / "b", load_file(llama / "model.safetensors") | extra))


def test_a_tied_head_may_be_stored_twice_or_only_as_the_head(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = checkpoint("llama_tied_wide")
    tensors = load_file(source / "model.safetensors")
    assert "lm_head.weight" not in tensors
    table = tensors["model.embed_tokens.weight"]
    twice = _rewritten(source, tmp_path / "twice", tensors | {"lm_head.weight": table.clone()})
    assert torch.equal(_logits(twice), _logits(source))
    del tensors["model.embed_tokens.weight"]
    moved = _rewritten(source, tmp_path / "moved", tensors | {"lm_head.weight": table})
    assert torch.equal(_logits(moved), _logits(source))
    tensors["model.embed_tokens.weight"] = table
    differ = _rewritten(source, tmp_path / "differ", tensors | {"lm_head.weight": table + 1})
    with pytest.raises(CorruptWeightsError, match="tie_word_embeddings"):
        _load(differ)


def test_tied_weights_are_held_once(checkpoint: Checkpoint) -> None:
    weights = _load(checkpoint("qwen3"))
    assert weights.acquire("embed")["tokens"] is weights.acquire("head")["lm_head"]


def test_hugging_face_cache_links_are_followed(checkpoint: Checkpoint, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--x" / "snapshots" / "abc"
    blobs = tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for index, file in enumerate(sorted(checkpoint("llama").iterdir())):
        shutil.copy(file, blobs / str(index))
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", str(index)))
    assert torch.equal(_logits(snapshot), _logits(checkpoint("llama")))


def test_dtype_is_converted_and_overflow_is_told(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint("llama")
    weights = _load(source, dtype="bfloat16")
    assert weights.acquire("layer.1")["qkv.weight"].dtype == torch.bfloat16
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e6
    big = _rewritten(source, tmp_path / "big", tensors)
    _load(big, dtype="bfloat16")
    with pytest.raises(CorruptWeightsError, match=r"model\.norm\.weight overflows torch\.float16"):
        _load(big, dtype="float16")


def test_only_pickled_weights_are_refused_unopened(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(ConfigError, match="Only safetensors"):
        load_weights(tmp_path, (), dtype="float32", device="cpu")


def test_missing_directories_and_files_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no checkpoint directory"):
        load_weights(tmp_path / "nowhere", (), dtype="float32", device="cpu")
    with pytest.raises(ConfigError, match="neither"):
        load_weights(tmp_path, (), dtype="float32", device="cpu")
