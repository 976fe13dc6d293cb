"""The demo models cost as many bits per byte through our engine as their cards say."""

import functools
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from examples.models.bits_per_byte import Protocol, byte_lengths, score_text
from replicas.api import GenerationRequest, SamplingParams
from replicas.text.tokenizer import Tokenizer
from tests.support.in_process_engine import in_process_engine

MODELS = Path(__file__).parents[3] / "examples" / "models"


def score_through_our_engine(model: Path, windows: Sequence[Sequence[int]]) -> list[list[float]]:
    engine = in_process_engine(
        model, max_step_tokens=512, max_context=1024, block_size=16, num_blocks=512
    )
    requests = [
        GenerationRequest(
            request_id=str(index),
            prompt_token_ids=tuple(window),
            params=SamplingParams(max_tokens=0, prompt_logprobs=0),
        )
        for index, window in enumerate(windows)
    ]
    return [
        [entry.logprob for entry in completion.prompt_logprobs if entry is not None]
        for completion in engine.generate(requests)
    ]


@pytest.mark.parametrize(
    ("name", "part", "max_windows"),
    [
        ("demo-dense", "prefix", 8),
        ("demo-dense", "heldout.txt", None),
        ("demo-moe", "prefix", 8),
        ("demo-moe", "heldout.txt", None),
    ],
)
def test_our_engine_finds_the_figure_of_the_card(
    name: str, part: str, max_windows: int | None
) -> None:
    model = MODELS / name
    evaluation = json.loads((model / "training.json").read_text())["evaluation"]
    tokenizer = Tokenizer.from_directory(model)
    vocabulary = json.loads((model / "tokenizer.json").read_text())
    tokens = vocabulary["model"]["vocab"] | {
        entry["content"]: entry["id"] for entry in vocabulary["added_tokens"]
    }
    by_id = [token for token, _ in sorted(tokens.items(), key=lambda item: item[1])]
    score = score_text(
        tokenizer.encode((MODELS / "heldout.txt").read_text(), add_special_tokens=False),
        byte_lengths(by_id),
        functools.partial(score_through_our_engine, model),
        Protocol(
            window_tokens=evaluation["protocol"]["window_tokens"],
            start_token_id=evaluation["protocol"]["start_token_id"],
        ),
        max_windows,
    )
    assert score.tokens == evaluation[part]["tokens"]
    assert score.num_bytes == evaluation[part]["bytes"]
    assert score.bits_per_byte == pytest.approx(evaluation[part]["bits_per_byte"], rel=1e-5)
