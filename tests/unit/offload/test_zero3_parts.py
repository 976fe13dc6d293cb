"""Padding, the folder of a process, and what the planner asks transformers."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.base.errors import ConfigError
from offload.zero3.folders import OwnFolder
from offload.zero3.foreign_model import inspect_checkpoint
from offload.zero3.padding import PaddingBounds, group_requests, pad_requests
from replicas.attention.backend import AttentionMetadata
from tests.support.zero3_engine import FOREIGN

BLOCK = 4


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    lens = draw(st.lists(st.integers(1, 12), min_size=1, max_size=10))
    return lens, [length + draw(st.integers(0, 20)) for length in lens]


@given(steps(), st.integers(12, 60), st.integers(32, 120))
def test_groups_hold_everybody_once_within_the_bounds(
    step: tuple[list[int], list[int]], queries: int, columns: int
) -> None:
    lens, seq_lens = step
    bounds = PaddingBounds(max_query_columns=queries, max_context_columns=columns)
    groups = group_requests(lens, seq_lens, bounds)
    assert sorted(index for group in groups for index in group) == list(range(len(lens)))
    for group in groups:
        assert len(group) * max(lens[i] for i in group) <= queries
        assert len(group) * max(seq_lens[i] for i in group) <= columns


@given(steps(), st.randoms(use_true_random=False))
def test_a_padded_batch_names_every_slot_of_its_requests(
    step: tuple[list[int], list[int]], random: object
) -> None:
    lens, seq_lens = step
    starts = [0]
    for length in lens:
        starts.append(starts[-1] + length)
    num_blocks = [-(-length // BLOCK) for length in seq_lens]
    blocks = list(range(1, sum(num_blocks) + 1))
    random.shuffle(blocks)
    tables = torch.zeros((len(lens), max(num_blocks)), dtype=torch.int32)
    for row, count in enumerate(num_blocks):
        tables[row, :count] = torch.tensor([blocks.pop() for _ in range(count)])
    positions = [
        p for n, total in zip(lens, seq_lens, strict=True) for p in range(total - n, total)
    ]
    owner = [row for row, n in enumerate(lens) for _ in range(n)]

    def slot(row: int, position: int) -> int:
        return int(tables[row, position // BLOCK]) * BLOCK + position % BLOCK

    slots = [slot(row, position) for row, position in zip(owner, positions, strict=True)]
    metadata = AttentionMetadata(
        query_start=tuple(starts),
        seq_lens=tuple(seq_lens),
        query_start_R1=torch.tensor(starts),
        seq_lens_R=torch.tensor(seq_lens),
        block_tables_RN=tables,
        slot_mapping_T=torch.tensor(slots),
    )
    tokens_T = torch.arange(100, 100 + len(positions))
    members = list(range(len(lens)))[::-1]
    batch = pad_requests(members, tokens_T, torch.tensor(positions), metadata, BLOCK)
    width, length = batch.token_ids_RS.shape[1], batch.mask_RL.shape[1]
    for row, index in enumerate(members):
        reads = batch.read_slots_RL[row, length - seq_lens[index] :].tolist()
        assert reads == [slot(index, position) for position in range(seq_lens[index])]
        assert (
            batch.mask_RL[row].tolist() == [0] * (length - seq_lens[index]) + [1] * seq_lens[index]
        )
        shown = batch.token_ids_RS[row, width - lens[index] :].tolist()
        assert shown == tokens_T[starts[index] : starts[index + 1]].tolist()
    assert torch.equal(batch.write_slots_Q, metadata.slot_mapping_T[batch.packed_Q])
    assert sorted(batch.packed_Q.tolist()) == list(range(len(positions)))


def test_what_a_killed_process_left_goes_with_the_next_start(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from offload.zero3.folders import OwnFolder;"
        f"own = OwnFolder(Path({str(tmp_path)!r})); (own.path / 'x').write_text('x');"
        "print(own.path, flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    theirs = Path(child.stdout.readline().strip())
    ours = OwnFolder(tmp_path)
    assert (theirs / "x").exists()
    child.send_signal(signal.SIGKILL)
    child.wait(10)
    later = OwnFolder(tmp_path)
    assert not theirs.exists()
    assert ours.path.exists()
    ours.close()
    later.close()
    later.close()
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def test_an_inspection_is_kept_and_a_damaged_one_repeated(checkpoint: Path) -> None:
    asked: list[Sequence[str]] = []

    def run(command: Sequence[str], timeout_s: float) -> str:
        asked.append(command)
        return "a library talks\n" + json.dumps(dataclasses.asdict(FOREIGN)) + "\n"

    cache = checkpoint / "cache"
    assert inspect_checkpoint(checkpoint, cache, run) == FOREIGN
    assert inspect_checkpoint(checkpoint, cache, run) == FOREIGN
    assert len(asked) == 1
    (entry,) = (cache / "architectures").iterdir()
    entry.write_text("{")
    assert inspect_checkpoint(checkpoint, cache, run) == FOREIGN
    assert len(asked) == 2


def test_a_refusal_is_the_users_and_never_kept(checkpoint: Path) -> None:
    def run(command: Sequence[str], timeout_s: float) -> str:
        return json.dumps({"refusal": ["It is a cat.", "Use a model."]})

    with pytest.raises(ConfigError, match="cat") as caught:
        inspect_checkpoint(checkpoint, checkpoint / "cache", run)
    assert caught.value.remedy == "Use a model."
    assert not (checkpoint / "cache").exists()


def test_an_inspection_that_fails_says_why(checkpoint: Path) -> None:
    def run(command: Sequence[str], timeout_s: float) -> str:
        raise subprocess.CalledProcessError(1, command, stderr="one\nno memory\n")

    with pytest.raises(ConfigError, match="no memory"):
        inspect_checkpoint(checkpoint, checkpoint / "cache", run)
