"""Steps cut into micro-batches: whole, in order, and with the tokens of the step in one."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.base.errors import WeightStreamError
from offload.assembly import model_adapter, streamed_weights
from offload.micro_batches import cut_rows, part_of
from offload.provider import StreamedWeights
from replicas.api import GenerationRequest, SamplingParams
from replicas.attention.backend import AttentionMetadata
from replicas.worker.assembly import WeightsRequest
from tests.support.in_process_engine import in_process_engine
from tests.support.offload_engine import (
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
    requests_of_lengths,
)
from tests.support.tiny_models import TINY_NAMES, write_checkpoint


def requests_of(params: SamplingParams = GREEDY) -> list[GenerationRequest]:
    return requests_of_lengths((1, 5, 23, 12, 2), params)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("llama", tmp_path_factory.mktemp("checkpoint") / "llama")


def metadata_of(lengths: list[tuple[int, int]], block_size: int = 4) -> AttentionMetadata:
    """Requests of (query tokens, tokens computed before), with blocks of their own."""
    starts, tables, slots, block = [0], [], [], 1
    width = max(-(-(new + old) // block_size) for new, old in lengths)
    for new, old in lengths:
        count = -(-(new + old) // block_size)
        table = list(range(block, block + count))
        block += count
        positions = range(old, old + new)
        slots += [table[p // block_size] * block_size + p % block_size for p in positions]
        tables.append(table + [0] * (width - count))
        starts.append(starts[-1] + new)
    lens = [new + old for new, old in lengths]
    return AttentionMetadata(
        query_start=tuple(starts),
        seq_lens=tuple(lens),
        query_start_R1=torch.tensor(starts),
        seq_lens_R=torch.tensor(lens),
        block_tables_RN=torch.tensor(tables, dtype=torch.int32),
        slot_mapping_T=torch.tensor(slots),
    )


STEPS = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 13)), min_size=1, max_size=9)


@given(lengths=STEPS, max_tokens=st.integers(0, 12), spare=st.none() | st.integers(0, 6))
def test_micro_batches_are_the_step_in_order_and_within_bounds(lengths, max_tokens, spare) -> None:
    metadata = metadata_of(lengths)
    longest = max(-(-(new + old) // 4) for new, old in lengths)
    max_blocks = 0 if spare is None else longest + spare
    cuts = cut_rows(metadata, max_tokens, block_size=4, max_blocks=max_blocks)
    assert cuts[0].start == 0
    assert cuts[-1].stop == metadata.query_start[-1]
    assert all(one.stop == other.start for one, other in pairwise(cuts))
    assert not cuts[0].joins
    positions: list[tuple[int, int]] = []
    for cut in cuts:
        part = part_of(metadata, cut)
        assert 0 < cut.stop - cut.start <= (max_tokens or 10**9)
        assert len(part.seq_lens) == cut.last - cut.first == len(part.block_tables_RN)
        assert part.query_start == tuple(part.query_start_R1.tolist())
        assert part.seq_lens == tuple(part.seq_lens_R.tolist())
        assert (
            part.slot_mapping_T.tolist() == metadata.slot_mapping_T[cut.start : cut.stop].tolist()
        )
        assert cut.joins == bool(positions and positions[-1][0] == cut.first)
        for index, (begin, end) in enumerate(pairwise(part.query_start)):
            assert begin < end
            first = part.seq_lens[index] - (end - begin)
            positions += [(cut.first + index, first + row) for row in range(end - begin)]
        if max_blocks:
            assert sum(-(-length // 4) for length in part.seq_lens) <= max_blocks
    assert positions == [
        (request, old + row) for request, (new, old) in enumerate(lengths) for row in range(new)
    ]
    if max_tokens and not max_blocks:
        assert len(cuts) == -(-metadata.query_start[-1] // max_tokens)


def test_a_request_that_no_micro_batch_holds_is_refused() -> None:
    with pytest.raises(ValueError, match="3 blocks and a micro-batch 2"):
        cut_rows(metadata_of([(1, 9)]), 4, block_size=4, max_blocks=2)


@pytest.mark.parametrize("name", TINY_NAMES)
def test_every_family_gives_the_tokens_of_a_resident_model(name: str, tmp_path: Path) -> None:
    path = write_checkpoint(name, tmp_path / name)
    expected = in_process_engine(path).generate(requests_of())
    engine = offload_engine(path, offload_plan(tmp_path / "disk", micro_batch_tokens=3))
    assert [c.token_ids for c in engine.generate(requests_of())] == [c.token_ids for c in expected]


@pytest.mark.parametrize("micro", [1, 2, 7, 20])
@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"num_blocks": 10, "max_step_tokens": 16},
        {"max_step_tokens": 3},
        {"max_running_requests": 2, "prefix_caching": False},
    ],
)
def test_batching_and_sampling_change_no_token(llama: Path, micro, limits) -> None:
    """Prompt scores and several choices too; the scheduler's steps are those of any replica."""
    plan = offload_plan(llama.parent / "disk", micro_batch_tokens=micro)
    check_sampled_run(llama, plan, requests_of(SAMPLED), **limits)


@pytest.mark.parametrize("micro", [1, 5])
def test_preempted_requests_come_back_to_their_tokens(llama: Path, micro: int) -> None:
    check_crowded_run(llama, offload_plan(llama.parent / "disk", micro_batch_tokens=micro))


def test_a_layer_is_read_once_however_many_micro_batches_compute_it(llama: Path) -> None:
    def bytes_read(micro: int) -> tuple[int, int]:
        plan = offload_plan(llama.parent / "disk", micro_batch_tokens=micro, ring_slots=2)
        made: list[StreamedWeights] = []

        def factory(request: WeightsRequest) -> StreamedWeights:
            weights = streamed_weights(plan, poisoned())(request)
            assert isinstance(weights, StreamedWeights)
            made.append(weights)
            return weights

        adapt = model_adapter(plan)
        in_process_engine(llama, factory, adapt_model=adapt).generate(requests_of())
        return made[0].stats.ring.num_bytes, made[0].stats.num_jumps

    assert bytes_read(2) == bytes_read(0)


def test_an_aborted_request_leaves_the_others_alone(llama: Path) -> None:
    plan = offload_plan(llama.parent / "disk", micro_batch_tokens=3)
    check_run_with_an_abort(llama, plan, requests_of())


def test_a_read_that_fails_in_a_pass_is_a_coded_error_and_the_layer_is_given_back(
    llama: Path,
) -> None:
    plan = offload_plan(llama.parent / "disk", micro_batch_tokens=2, ring_slots=2)
    factory = weights_of(plan, wrap_engine=lambda inner: FaultyEngine(inner, "error", 5))
    engine = in_process_engine(llama, factory, adapt_model=model_adapter(plan))
    with pytest.raises(WeightStreamError):
        engine.generate(requests_of())
