"""Drafts change no token on two ranks either: both sample, accept and keep the same."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from cluster.dist.communicator import SingleRank
from tests.support.rank_processes import run_ranks, values
from tests.support.shared_engine import CONFIG, copying_requests, shared_engine
from tests.support.tiny_models import write_checkpoint

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "opt")


def test_two_ranks_with_drafts_say_what_one_says_without(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    for name in FAMILIES:
        write_checkpoint(name, tmp_path / name)
    answers = values(
        run_ranks(
            "tests.support.rank_scenarios:speculation", 2, deadline_s=120.0, root=str(tmp_path)
        )
    )
    for name in FAMILIES:
        plain = shared_engine(
            tmp_path / name, SingleRank(), dataclasses.replace(CONFIG, speculation=None)
        )
        expected = [
            [c.token_ids, [entry.token_id for entry in c.logprobs]]
            for c in plain.generate(copying_requests())
        ]
        for answer in answers:
            assert [list(said) for said in answer[name]["said"]] == expected, name
            assert 0 < answer[name]["accepted"] < answer[name]["drafted"]
