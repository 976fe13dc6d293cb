"""Seeded checkpoints: names as in transformers, the bytes a token reads, the tokenizer."""

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from bench.random_checkpoint import (
    SHAPES,
    VOCAB_SIZE,
    random_checkpoint,
    tensor_shapes,
    values_per_token,
    write_tokenizer,
)


@pytest.mark.parametrize("shape", ["dense-160m", "dense-1b"])
def test_tensors_are_those_of_the_family(shape):
    values = dict(SHAPES[shape])
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert dict(tensor_shapes(SHAPES[shape])) == expected


def test_a_token_reads_all_but_the_embedding_and_its_own_experts():
    read = {name: 2 * values_per_token(config) / 1e6 for name, config in SHAPES.items()}
    assert read["dense-160m"] == pytest.approx(200.2, abs=0.1)
    assert read["dense-1b"] == pytest.approx(1741.8, abs=0.1)
    assert read["moe-8x"] == pytest.approx(313.6, abs=0.1)


def test_a_checkpoint_is_written_once_and_the_same_for_a_seed(tmp_path, monkeypatch):
    tiny = {**SHAPES["dense-160m"], "hidden_size": 8, "intermediate_size": 8, "vocab_size": 16}
    tiny |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    tiny |= {"head_dim": 4}
    monkeypatch.setattr("bench.random_checkpoint.SHAPES", {"tiny": tiny})
    first = random_checkpoint("tiny", tmp_path / "a")
    written = (first.path / "model.safetensors").read_bytes()
    (first.path / "mark").touch()
    assert random_checkpoint("tiny", tmp_path / "a") == first
    assert (first.path / "mark").is_file()
    other = random_checkpoint("tiny", tmp_path / "b")
    assert (other.path / "model.safetensors").read_bytes() == written
    assert random_checkpoint("tiny", tmp_path / "a", seed=1).path != first.path
    assert first.bytes_per_token(10) == first.weight_bytes_per_token + 10 * 2 * 2 * 4


def test_every_token_id_is_a_token_and_text_comes_back(tmp_path):
    write_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    assert len({tokenizer.id_to_token(number) for number in range(VOCAB_SIZE)}) == VOCAB_SIZE
    text = "A round trip, naïve: 12% of 3."
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
