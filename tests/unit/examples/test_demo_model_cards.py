"""The committed demo checkpoints are what their cards say, recomputed through transformers.

The recipe behind the cards is checked too, as far as a rerun depends on it: split, batches, rates.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from examples.models.bits_per_byte import Protocol, byte_lengths, cut_windows, score_text
from examples.models.corpus import SourceFile, held_out_sample, load_corpus
from examples.models.recipes import Recipe, build_dense
from examples.models.schedule import Schedule
from examples.models.trainer import Trainer
from examples.models.training_data import BatchSampler, cut_like_prompts

MODELS = Path(__file__).parents[3] / "examples" / "models"
NAMES = ("demo-dense", "demo-moe")
MAX_WEIGHT_BYTES = 8_000_000
TEXTS = (
    "def main():\n\treturn 'x' * 3\n",
    "    naïve — 漢字 🙂\r\n\x00\x7f",
    "",
    "   \n\n   trailing   ",
)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=NAMES)
def directory(request: pytest.FixtureRequest) -> Path:
    return MODELS / request.param


@pytest.fixture(scope="module")
def record(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "training.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def model(directory: Path) -> PreTrainedModel:
    loaded = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, local_files_only=True
    )
    return loaded.eval()


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Any:
    return AutoTokenizer.from_pretrained(directory, local_files_only=True)


def score_through_transformers(model: PreTrainedModel, windows: list[list[int]]):
    rows = []
    with torch.inference_mode():
        for window in windows:
            ids_1T = torch.tensor([window])
            logprobs_TV = model(input_ids=ids_1T).logits[0, :-1].log_softmax(-1)
            rows.append(logprobs_TV.gather(1, ids_1T[0, 1:, None])[:, 0].tolist())
    return rows


def tiny_trainer(schedule: Schedule) -> Trainer:
    sampler = BatchSampler(
        tokens=np.arange(500), seed=1, batch_tokens=32, lengths=(16,), length_shares=(1.0,)
    )
    torch.manual_seed(1)
    return Trainer(build_dense(), sampler, Recipe(), schedule, budget_s=None)


class TestCheckpoint:
    def test_weights_are_small_and_bf16(self, directory: Path) -> None:
        path = directory / "model.safetensors"
        data = path.read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        dtypes = {entry["dtype"] for name, entry in header.items() if name != "__metadata__"}
        assert path.stat().st_size <= MAX_WEIGHT_BYTES
        assert dtypes == {"BF16"}

    def test_parameters_match_the_record(self, model, record) -> None:
        assert sum(p.numel() for p in model.parameters()) == record["model"]["parameters"]

    @pytest.mark.parametrize("tp_size", [1, 2, 4])
    def test_heads_split_over_ranks(self, model, tp_size: int) -> None:
        config = model.config
        assert config.num_attention_heads % tp_size == 0
        assert config.num_key_value_heads % tp_size == 0
        assert config.num_key_value_heads < config.num_attention_heads

    def test_config_matches_the_record(self, model, record) -> None:
        assert type(model).__name__ == record["model"]["architecture"]
        for name, value in record["model"]["config"].items():
            assert getattr(model.config, name) == value, name

    def test_generation_stops_at_both_ends(self, model, tokenizer) -> None:
        ends = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
        assert model.generation_config.eos_token_id == ends


def test_dense_is_llama() -> None:
    config = json.loads((MODELS / "demo-dense" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]


def test_moe_is_qwen3_with_every_layer_sparse() -> None:
    config = json.loads((MODELS / "demo-moe" / "config.json").read_text())
    assert config["architectures"] == ["Qwen3MoeForCausalLM"]
    assert config["num_experts"] >= 8
    assert config["num_experts_per_tok"] == 2
    assert config["norm_topk_prob"] is True
    assert config["decoder_sparse_step"] == 1
    assert config["mlp_only_layers"] == []


def test_no_expert_is_idle() -> None:
    record = json.loads((MODELS / "demo-moe" / "training.json").read_text(encoding="utf-8"))
    config = record["model"]["config"]
    load = record["evaluation"]["expert_load"]
    fair = 1 / config["num_experts"]
    assert len(load) == config["num_hidden_layers"]
    for shares in load:
        assert len(shares) == config["num_experts"]
        assert sum(shares) == pytest.approx(1.0, abs=1e-5)
        assert min(shares) > fair / 10


class TestTokenizer:
    @pytest.mark.parametrize("text", TEXTS)
    def test_round_trips_any_text(self, tokenizer, text: str) -> None:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text

    def test_adds_no_special_tokens(self, tokenizer) -> None:
        assert tokenizer.encode("def ") == tokenizer.encode("def ", add_special_tokens=False)

    def test_chat_template_renders_every_role(self, tokenizer) -> None:
        messages = [
            {"role": "system", "content": "You write Python code."},
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "pass"},
            {"role": "user", "content": "Again"},
        ]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert text == (
            "<|im_start|>system\nYou write Python code.<|im_end|>\n"
            "<|im_start|>user\nHello<|im_end|>\n"
            "<|im_start|>assistant\npass<|im_end|>\n"
            "<|im_start|>user\nAgain<|im_end|>\n"
            "<|im_start|>assistant\n"
        )
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 5

    def test_both_models_share_it(self) -> None:
        dense, moe = ((MODELS / name / "tokenizer.json").read_bytes() for name in NAMES)
        assert dense == moe


class TestBitsPerByte:
    def test_sample_is_the_one_that_was_scored(self, record) -> None:
        data = (MODELS / "heldout.txt").read_bytes()
        figures = record["evaluation"]
        assert len(data) <= 64_000
        assert hashlib.sha256(data).hexdigest() == figures["protocol"]["sha256"]
        assert figures["heldout.txt"]["bytes"] == len(data)

    def test_prefix_figure_is_reproduced(self, directory, model, record) -> None:
        figures = record["evaluation"]
        raw = Tokenizer.from_file(str(directory / "tokenizer.json"))
        vocabulary = [raw.id_to_token(index) for index in range(raw.get_vocab_size())]
        score = score_text(
            raw.encode((MODELS / "heldout.txt").read_text(encoding="utf-8")).ids,
            byte_lengths(vocabulary),
            lambda windows: score_through_transformers(model, windows),
            Protocol(
                window_tokens=figures["protocol"]["window_tokens"],
                start_token_id=figures["protocol"]["start_token_id"],
            ),
            max_windows=figures["prefix"]["windows"],
        )
        assert score.tokens == figures["prefix"]["tokens"]
        assert score.num_bytes == figures["prefix"]["bytes"]
        assert score.bits_per_byte == pytest.approx(figures["prefix"]["bits_per_byte"], rel=1e-3)

    def test_beats_a_compressor_on_the_sample(self, record) -> None:
        data = (MODELS / "heldout.txt").read_bytes()
        compressor = 8 * len(lzma.compress(data, preset=9)) / len(data)
        assert record["evaluation"]["heldout.txt"]["bits_per_byte"] < compressor

    def test_card_states_the_figures(self, directory, record) -> None:
        card = (directory / "README.md").read_text(encoding="utf-8")
        assert f"{record['evaluation']['held_out_split']['bits_per_byte']:.4f}" in card
        assert f"--steps {record['run']['steps']}" in card
        assert record["data"]["corpus_sha256"] in card


class TestProtocol:
    def test_every_token_is_scored_once_behind_a_start_token(self) -> None:
        protocol = Protocol(window_tokens=4, start_token_id=9)
        assert cut_windows([1, 2, 3, 4, 5], protocol) == [[9, 1, 2, 3], [9, 4, 5]]
        assert cut_windows([], protocol) == []

    def test_uniform_model_costs_its_entropy(self) -> None:
        score = score_text(
            [0, 1, 1, 0, 1],
            [1, 3],
            lambda windows: [[-0.6931471805599453] * (len(w) - 1) for w in windows],
            Protocol(window_tokens=3, start_token_id=0),
        )
        assert (score.tokens, score.windows, score.num_bytes) == (5, 3, 11)
        assert score.bits_per_byte == pytest.approx(5 / 11)

    @pytest.mark.parametrize("answer", [[], [[-1.0]], [[-1.0, float("-inf")]]])
    def test_a_wrong_answer_is_refused(self, answer: list[list[float]]) -> None:
        with pytest.raises(ValueError, match=r"came back|not finite"):
            score_text([1, 1], [1, 1], lambda _: answer, Protocol(window_tokens=3))

    def test_a_window_holds_at_least_one_text_token(self) -> None:
        with pytest.raises(ValueError, match="at least 2"):
            Protocol(window_tokens=1)


class TestRecipe:
    def test_split_is_by_file_and_repeats(self, tmp_path: Path) -> None:
        for index in range(20):
            (tmp_path / f"module_{index}.py").write_text(f"x = {index}\n")
        (tmp_path / "test").mkdir()
        (tmp_path / "test" / "left_out.py").write_text("y = 1\n")
        first, again = (load_corpus(7, 0.1, tmp_path) for _ in range(2))
        train, held_out = ({file.path for file in part} for part in (first.train, first.held_out))
        assert first == again
        assert (len(train), len(held_out), train & held_out) == (18, 2, set())
        assert load_corpus(8, 0.1, tmp_path).held_out != first.held_out

    def test_sample_ends_at_a_line_within_its_size(self) -> None:
        files = [SourceFile(path=f"{n}.py", text="é = 1\n" * 50) for n in range(9)]
        sample = held_out_sample(files, max_bytes=500, bytes_per_file=100)
        assert sample == "é = 1\n" * (5 * (100 // 7))

    def test_cuts_lose_nothing_and_show_lone_spaces(self) -> None:
        text = "def name(self): return other\n" * 400
        pieces = cut_like_prompts(text, random.Random(3))
        assert "".join(pieces) == text
        assert any(piece.endswith("def ") for piece in pieces)

    def test_batch_depends_on_the_step_alone(self) -> None:
        sampler = BatchSampler(
            tokens=np.arange(1000),
            seed=1,
            batch_tokens=64,
            lengths=(8, 16),
            length_shares=(0.5, 0.5),
        )
        later = sampler.batch(5)
        assert later.size == 64
        assert (np.diff(later, axis=1) == 1).all()
        sampler.batch(4)
        assert (sampler.batch(5) == later).all()

    def test_wall_time_settles_the_step_count_that_a_rerun_repeats(self) -> None:
        timed = Schedule(peak=1.0, warmup_steps=10)
        assert timed.settled(60, 60.0, 100.0, 0.3) is timed
        settled = timed.settled(140, 70.0, 100.0, 0.3)
        assert (settled.total_steps, settled.decay_steps) == (200, 60)
        rates = [settled.learning_rate(step) for step in range(200)]
        assert rates[:140] == [timed.learning_rate(step) for step in range(140)]
        assert rates[140:] == sorted(rates[140:], reverse=True)
        assert settled.is_over(200)
        assert not settled.is_over(199)

    def test_a_resumed_and_extended_run_repeats_the_unbroken_one(self, tmp_path: Path) -> None:
        first = Schedule(peak=1e-3, warmup_steps=2, decay_steps=2, total_steps=4)
        further = Schedule(peak=1e-3, warmup_steps=2, decay_steps=1, total_steps=6)
        unbroken = tiny_trainer(first)
        unbroken.run(lambda progress: unbroken.save(tmp_path) if progress.step == 2 else None)
        unbroken.extend(further)
        unbroken.run(lambda progress: None)
        resumed = tiny_trainer(first)
        resumed.load(tmp_path)
        resumed.extend(further)
        assert resumed.schedule == first
        resumed.run(lambda progress: None)
        resumed.extend(further)
        resumed.run(lambda progress: None)
        assert resumed.cycles == unbroken.cycles
        assert [cycle["steps"] for cycle in resumed.cycles] == [4, 6]
        for ours, theirs in zip(
            resumed.model.parameters(), unbroken.model.parameters(), strict=True
        ):
            assert torch.equal(ours, theirs)
