"""A KV cache in host memory gives the tokens of one on the device, through any windows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.base.errors import ConfigError, InternalError, WeightStreamError
from offload.assembly import model_adapter
from offload.budget import BudgetError
from offload.kv_windows import KvWindows, in_window
from replicas.api import GenerationRequest, SamplingParams
from replicas.attention.backend import AttentionMetadata
from replicas.engine.speculation import SpeculationConfig
from tests.support.in_process_engine import in_process_engine
from tests.support.offload_engine import (
    PLENTY,
    FaultyEngine,
    offload_engine,
    offload_plan,
    poisoned,
    weights_of,
)
from tests.support.streamed_runs import (
    GREEDY,
    SAMPLED,
    check_crowded_run,
    check_run_with_an_abort,
    check_sampled_run,
)
from tests.support.tiny_models import TINY_NAMES, prompt_tokens, write_checkpoint

BLOCK = 4
LONGEST = 30
"""Blocks of the longest request that the engine of these tests may have."""


def requests_of(params: SamplingParams = GREEDY) -> list[GenerationRequest]:
    """Two prompts have their first 16 tokens in common: blocks that both read."""
    shared = prompt_tokens(16, seed=9)
    prompts = [prompt_tokens(length, seed=length) for length in (1, 5, 23)]
    prompts += [shared + prompt_tokens(5, seed=1), shared + prompt_tokens(3, seed=2)]
    return [
        GenerationRequest(request_id=f"r{index}", prompt_token_ids=tuple(prompt), params=params)
        for index, prompt in enumerate(prompts)
    ]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("llama", tmp_path_factory.mktemp("checkpoint") / "llama")


def windowed(disk: Path, **changes):
    fields = {
        "kv_home": "streamed",
        "host_bytes": PLENTY,
        "kv_windows": 2,
        "kv_window_blocks": LONGEST,
    }
    return offload_plan(disk, **(fields | changes))


@pytest.mark.parametrize("name", TINY_NAMES)
def test_every_family_gives_the_tokens_of_a_resident_model(name: str, tmp_path: Path) -> None:
    path = write_checkpoint(name, tmp_path / name)
    expected = in_process_engine(path).generate(requests_of())
    engine = offload_engine(path, windowed(tmp_path / "disk", micro_batch_tokens=3))
    assert [c.token_ids for c in engine.generate(requests_of())] == [c.token_ids for c in expected]


@pytest.mark.parametrize(("windows", "blocks"), [(1, LONGEST), (2, LONGEST), (3, 90), (4, 31)])
@pytest.mark.parametrize("micro", [0, 2, 7])
def test_any_windows_batching_and_sampling(llama: Path, windows, blocks, micro) -> None:
    """Poisoned when they are given back; forks and copied blocks too, by the several choices."""
    plan = windowed(
        llama.parent / "disk",
        kv_windows=windows,
        kv_window_blocks=blocks,
        micro_batch_tokens=micro,
    )
    check_sampled_run(llama, plan, requests_of(SAMPLED), num_blocks=10, max_step_tokens=16)


@pytest.mark.parametrize("micro", [0, 3])
def test_drafts_are_checked_across_micro_batches(llama: Path, micro: int) -> None:
    """A cut may go through a draft: its later rows read what its earlier ones have stored."""
    words = tuple((token, 30.0) for token in range(20, 26))
    params = SamplingParams(temperature=0.0, logit_bias=words, max_tokens=40, logprobs=1)
    requests = [
        GenerationRequest(
            request_id=f"r{index}",
            prompt_token_ids=tuple(prompt_tokens(9 + index, seed=index) * 2),
            params=params,
        )
        for index in range(3)
    ]
    expected = in_process_engine(llama).generate(requests)
    plan = windowed(llama.parent / "disk", micro_batch_tokens=micro)
    drafting = SpeculationConfig(num_tokens=6, min_ngram=1, max_ngram=3)
    engine = offload_engine(llama, plan, speculation=drafting)
    completions = engine.generate(requests)
    assert [c.token_ids for c in completions] == [c.token_ids for c in expected]
    assert [c.logprobs for c in completions] == [c.logprobs for c in expected]
    assert engine.stats.accepted_draft_tokens > 0


@pytest.mark.parametrize("micro", [0, 3])
def test_preempted_requests_come_back_to_their_tokens(llama: Path, micro: int) -> None:
    check_crowded_run(llama, windowed(llama.parent / "disk", micro_batch_tokens=micro))


def test_an_aborted_request_leaves_the_others_alone(llama: Path) -> None:
    check_run_with_an_abort(llama, windowed(llama.parent / "disk"), requests_of())


@pytest.mark.parametrize("home", ["host", "streamed"])
def test_a_cache_in_host_memory_takes_the_hosts_budget(llama: Path, home: str) -> None:
    """Device and host are bounds of their own: what one has to spare is not the other's."""
    disk = llama.parent / "disk"
    kv_bytes = cache_bytes(llama)
    tight = {"kv_home": home, "kv_windows": 2 * (home == "streamed"), "host_bytes": kv_bytes}
    offload_engine(llama, windowed(disk, **tight)).generate(requests_of())
    tight["host_bytes"] -= 1
    with pytest.raises(BudgetError, match=r"host_memory is .* are needed: key/value cache"):
        offload_engine(llama, windowed(disk, **tight))
    # On the device the same cache would be refused where windows, or nothing, fit.
    least = least_device_bytes(llama, windowed(disk, kv_home=home, kv_windows=tight["kv_windows"]))
    fits = windowed(disk, kv_home=home, kv_windows=tight["kv_windows"], device_bytes=least)
    offload_engine(llama, fits).generate(requests_of())
    with pytest.raises(BudgetError, match="device_memory"):
        offload_engine(llama, windowed(disk, kv_home="device", kv_windows=0, device_bytes=least))


def cache_bytes(path: Path) -> int:
    sizes: list[int] = []
    factory = weights_of(offload_plan(path.parent / "disk"))

    def remember(request):
        sizes.append(request.kv_bytes)
        return factory(request)

    in_process_engine(path, remember)
    return sizes[0]


def least_device_bytes(path: Path, plan) -> int:
    """What the error asks for, found by halving."""
    low, high = 0, PLENTY
    while low < high:
        middle = (low + high) // 2
        try:
            offload_engine(path, replace(plan, device_bytes=middle))
            high = middle
        except BudgetError:
            low = middle + 1
    return low


def test_a_read_that_fails_leaves_no_copy_under_way(llama: Path) -> None:
    plan = windowed(llama.parent / "disk", micro_batch_tokens=2, ring_slots=2)
    factory = weights_of(plan, wrap_engine=lambda inner: FaultyEngine(inner, "error", 5))
    engine = in_process_engine(llama, factory, adapt_model=model_adapter(plan, poisoned()))
    with pytest.raises(WeightStreamError):
        engine.generate(requests_of())


def test_plans_that_mean_nothing_are_refused(llama: Path) -> None:
    disk = llama.parent / "disk"
    for changes, message in (
        ({"kv_home": "cellar"}, "kv_home 'cellar' is not known"),
        ({"kv_windows": 0}, "0 windows"),
        ({"kv_window_blocks": LONGEST - 1}, "do not hold a request of 30 blocks"),
    ):
        with pytest.raises(ConfigError, match=message):
            offload_engine(llama, windowed(disk, **changes))


@given(st.data())
def test_a_window_holds_each_block_of_its_micro_batch_once(data) -> None:
    tables = data.draw(
        st.lists(
            st.lists(st.integers(0, 40), min_size=1, max_size=6, unique=True),
            min_size=1,
            max_size=4,
        )
    )
    lengths = [data.draw(st.integers((len(t) - 1) * BLOCK + 1, len(t) * BLOCK)) for t in tables]
    width = max(map(len, tables))
    slots = [
        table[(length - 1) // BLOCK] * BLOCK + (length - 1) % BLOCK
        for table, length in zip(tables, lengths, strict=True)
    ]
    part = AttentionMetadata(
        query_start=tuple(range(len(tables) + 1)),
        seq_lens=tuple(lengths),
        query_start_R1=torch.arange(len(tables) + 1),
        seq_lens_R=torch.tensor(lengths),
        block_tables_RN=torch.tensor(
            [table + [99] * (width - len(table)) for table in tables], dtype=torch.int32
        ),
        slot_mapping_T=torch.tensor(slots),
    )
    found = in_window(part, BLOCK)
    assert sorted({block for table in tables for block in table}) == found.blocks.tolist()
    local = found.metadata.block_tables_RN.numpy()
    for row, table in enumerate(tables):
        assert found.blocks[local[row, : len(table)]].tolist() == table
        assert not local[row, len(table) :].any()
    slot_T = found.metadata.slot_mapping_T.numpy()
    assert (found.blocks[slot_T // BLOCK] * BLOCK + slot_T % BLOCK).tolist() == slots
    assert set(found.written) == set(slot_T // BLOCK)


def test_what_is_stored_is_what_was_written_and_nothing_else() -> None:
    caches = [torch.randn(2, 8, BLOCK, 1, 2) for _ in range(2)]
    before = [cache.clone() for cache in caches]
    part = in_window(
        AttentionMetadata(
            query_start=(0, 1),
            seq_lens=(6,),
            query_start_R1=torch.tensor([0, 1]),
            seq_lens_R=torch.tensor([6]),
            block_tables_RN=torch.tensor([[5, 2]], dtype=torch.int32),
            slot_mapping_T=torch.tensor([2 * BLOCK + 1]),
        ),
        BLOCK,
    )
    windows = KvWindows(caches, 1, 3)
    windows.load(1, part, 0)
    window = windows.loaded(0)
    np.testing.assert_array_equal(window[:, :2], before[1][:, part.blocks])
    window[:, :2] += 1
    windows.store(1, part, 0)
    windows.finish()
    expected = before[1].clone()
    expected[:, 2] += 1
    assert torch.equal(caches[1], expected)
    assert torch.equal(caches[0], before[0])
    assert windows.stats.loaded_bytes == 2 * 2 * BLOCK * 2 * 4
    assert windows.stats.stored_bytes == 2 * BLOCK * 2 * 4
    with pytest.raises(InternalError, match="4 blocks, a window 3"):
        windows.load(0, replace(part, blocks=np.arange(4)), 0)
    windows.close()
    windows.close()
