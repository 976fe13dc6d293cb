"""Rows against a naive model of the same diffs, and their refusals."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.base.errors import InternalError
from replicas.api import Pooling, SamplingParams
from replicas.engine.scheduler_output import NewRequest, SchedulerOutput
from replicas.worker.request_rows import RequestRows

VOCAB = 100
MAX_CONTEXT = 700
BLOCK_SIZE = 4


@dataclasses.dataclass
class NaiveRow:
    tokens: list[int]
    num_prompt: int
    blocks: list[int]
    params: SamplingParams


def new_rows() -> RequestRows:
    return RequestRows(vocab_size=VOCAB, max_context=MAX_CONTEXT, block_size=BLOCK_SIZE)


def new_request(key: int, token_ids: tuple[int, ...] = (1, 2, 3), **fields: object) -> NewRequest:
    return NewRequest(
        key=key,
        token_ids=token_ids,
        num_prompt_tokens=len(token_ids),
        **{"params": SamplingParams(), **fields},
    )


def assert_same(rows: RequestRows, naive: dict[int, NaiveRow]) -> None:
    assert len(rows) == len(naive)
    keys = tuple(naive)
    slots = rows.slots(keys)
    assert len(set(slots.tolist())) == len(keys)
    for slot, row in zip(slots, naive.values(), strict=True):
        assert rows.num_tokens_S[slot] == len(row.tokens)
        assert rows.num_prompt_S[slot] == row.num_prompt
        assert rows.token_ids_SC[slot, : len(row.tokens)].tolist() == row.tokens
        assert rows.num_blocks_S[slot] == len(row.blocks)
        assert rows.block_tables_SN[slot, : len(row.blocks)].tolist() == row.blocks
        assert not rows.block_tables_SN[slot, len(row.blocks) :].any()
    if keys:
        batch = rows.sampling_batch(slots, rows.num_tokens_S[slots])
        assert batch.column("seed").tolist() == [row.params.seed for row in naive.values()]
        assert batch.column("has_logit_bias").tolist() == [
            bool(row.params.logit_bias) for row in naive.values()
        ]
        for index, row in enumerate(naive.values()):
            assert batch.tokens_of(index).tolist() == row.tokens


@settings(max_examples=60)
@given(data=st.data())
def test_diffs_give_the_same_rows_as_a_naive_model(data: st.DataObject) -> None:
    rows, naive, next_key = new_rows(), {}, 0
    sampled_ids = st.integers(-1, VOCAB - 1)
    for step in range(data.draw(st.integers(1, 8))):
        live = list(naive)
        finished = tuple(data.draw(st.lists(st.sampled_from(live), unique=True)) if live else ())
        returning = [key for key in finished if data.draw(st.booleans())]
        fresh = list(range(next_key, next_key + data.draw(st.integers(0, 9))))
        next_key += len(fresh)
        news = []
        for key in finished:
            gone = naive.pop(key)
            if key in returning:
                news.append(
                    NewRequest(
                        key=key,
                        token_ids=tuple(gone.tokens),
                        num_prompt_tokens=gone.num_prompt,
                        params=gone.params,
                    )
                )
        for key in fresh:
            length = data.draw(st.sampled_from([1, 3, 200, 300, 600]))
            bias = ((1, 2.0),) if key % 3 == 0 else ()
            params = SamplingParams(seed=key, logit_bias=bias)
            news.append(new_request(key, tuple(key % VOCAB for _ in range(length)), params=params))
        for request in news:
            naive[request.key] = NaiveRow(
                list(request.token_ids), request.num_prompt_tokens, [], request.params
            )
        keys = tuple(data.draw(st.permutations(list(naive))))
        new_blocks = [tuple(data.draw(st.lists(st.integers(1, 999), max_size=90))) for _ in keys]
        for key, block_ids in zip(keys, new_blocks, strict=True):
            naive[key].blocks += block_ids
        replaced = []
        for key in keys:
            if naive[key].blocks and data.draw(st.booleans()):
                index = data.draw(st.integers(0, len(naive[key].blocks) - 1))
                naive[key].blocks[index] = 1000 + step
                replaced.append((key, index, 1000 + step))
        rows.apply(
            SchedulerOutput(
                step=step,
                new_requests=tuple(news),
                keys=keys,
                new_block_ids=tuple(new_blocks),
                replaced_blocks=tuple(replaced),
                finished_keys=finished,
            )
        )
        assert_same(rows, naive)
        sampling = [key for key in keys if data.draw(st.booleans())]
        sampled = [data.draw(sampled_ids) for _ in sampling]
        rows.append_sampled(rows.slots(sampling), sampled, np.zeros(len(sampling), np.int64))
        for key, token_id in zip(sampling, sampled, strict=True):
            naive[key].tokens.append(max(0, token_id))
        assert_same(rows, naive)


def test_a_reused_slot_keeps_nothing_of_its_last_request() -> None:
    rows = new_rows()
    busy = SamplingParams(logit_bias=((4, 1.0),), min_tokens=3, stop_token_ids=(9,), logprobs=2)
    rows.apply(
        SchedulerOutput(
            step=0,
            new_requests=(new_request(0, params=busy, pooling=Pooling.MEAN),),
            keys=(0,),
            new_block_ids=((5, 6),),
        )
    )
    slot = int(rows.slots((0,))[0])
    rows.apply(SchedulerOutput(step=1, new_requests=(new_request(1),), finished_keys=(0,)))
    assert rows.slots((1,)).tolist() == [slot]
    assert not rows.block_tables_SN[slot].any()
    assert rows.pooling == {}
    batch = rows.sampling_batch(np.array([slot]), np.array([3]))
    assert batch.column("min_tokens").tolist() == [0]
    assert batch.column("logprobs").tolist() == [-1]
    assert batch.logit_bias == {}
    assert batch.min_token_ids == {}


def test_min_tokens_masks_eos_and_stop_ids_once_each_and_only_real_ones() -> None:
    rows = new_rows()
    params = SamplingParams(min_tokens=2, stop_token_ids=(7, 8, VOCAB + 5))
    request = new_request(0, params=params, eos_token_ids=(2, 7))
    rows.apply(SchedulerOutput(step=0, new_requests=(request,)))
    slots = rows.slots((0,))
    batch = rows.sampling_batch(slots, rows.num_tokens_S[slots])
    assert batch.min_token_ids[int(slots[0])].tolist() == [2, 7, 8]


@pytest.mark.parametrize(
    "request_",
    [
        new_request(0, (1, VOCAB, 2)),
        new_request(0, (1, -1)),
        new_request(0, params=SamplingParams(logit_bias=((VOCAB, 1.0),))),
    ],
)
def test_impossible_token_ids_make_the_row_faulty_and_harmless(request_: NewRequest) -> None:
    rows = new_rows()
    rows.apply(SchedulerOutput(step=0, new_requests=(request_, new_request(1))))
    assert "outside the vocabulary" in rows.faults.of(0)
    assert rows.faults.of(1) == ""
    assert rows.token_ids_SC.min() >= 0
    assert rows.token_ids_SC.max() < VOCAB
    rows.apply(SchedulerOutput(step=1, finished_keys=(0,)))
    assert not rows.faults


def test_contradictions_are_internal_errors() -> None:
    rows = new_rows()
    rows.apply(SchedulerOutput(step=0, new_requests=(new_request(0),)))
    one = {"keys": (0,), "new_block_ids": ((),)}
    with pytest.raises(InternalError, match="has a row already"):
        rows.apply(SchedulerOutput(step=1, new_requests=(new_request(0),)))
    with pytest.raises(InternalError, match="no block at index 0"):
        rows.apply(SchedulerOutput(step=2, replaced_blocks=((0, 0, 3),), **one))
    with pytest.raises(InternalError, match="no row"):
        rows.slots((8,))
    with pytest.raises(InternalError, match="exceeds 700"):
        rows.apply(SchedulerOutput(step=3, new_requests=(new_request(1, (1,) * 701),)))
    rows.apply(SchedulerOutput(step=4, new_requests=(new_request(2, (1,) * 700),)))
    with pytest.raises(InternalError, match="701 tokens exceeds 700"):
        rows.append_sampled(rows.slots((2,)), [5], np.zeros(1, np.int64))


def test_finishing_a_request_that_never_ran_is_fine() -> None:
    rows = new_rows()
    rows.apply(SchedulerOutput(step=0, finished_keys=(12,)))
    assert len(rows) == 0


def test_a_row_that_failed_on_this_rank_only_is_noticed_one_plan_later() -> None:
    rows = new_rows()
    rows.apply(SchedulerOutput(step=4, new_requests=(new_request(0), new_request(1))))
    rows.fail(0, "out of memory", 4)
    rows.fail(0, "something else", 5)
    assert rows.faults.of(0) == "out of memory"
    both = {"keys": (0, 1), "new_block_ids": ((), ())}
    # Planned before the failure was known.
    rows.apply(SchedulerOutput(step=5, **both))
    with pytest.raises(InternalError, match="failed in step 4 on this rank only: out of memory"):
        rows.apply(SchedulerOutput(step=6, **both))
    rows.apply(SchedulerOutput(step=7, keys=(1,), new_block_ids=((),), finished_keys=(0,)))
    assert not rows.faults


def test_a_rank_that_does_not_answer_needs_no_logprobs_of_samples() -> None:
    rows = RequestRows(
        vocab_size=VOCAB, max_context=MAX_CONTEXT, block_size=BLOCK_SIZE, wants_logprobs=False
    )
    params = SamplingParams(logprobs=3, prompt_logprobs=2)
    rows.apply(SchedulerOutput(step=0, new_requests=(new_request(0, params=params),)))
    slots = rows.slots((0,))
    batch = rows.sampling_batch(slots, rows.num_tokens_S[slots])
    assert batch.column("logprobs").tolist() == [-1]
    assert rows.params.prompt_logprobs(slots).tolist() == [2]
