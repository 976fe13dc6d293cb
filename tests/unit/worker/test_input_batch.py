"""Step tensors against a per-token loop."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from cluster.base.errors import InternalError
from replicas.api import SamplingParams
from replicas.engine.scheduler_output import NewRequest, SchedulerOutput
from replicas.worker.input_batch import StepInput, build_step_input
from replicas.worker.request_rows import RequestRows

BLOCK_SIZE = 4
CPU = torch.device("cpu")


def blocks_of(key: int, num_tokens: int) -> tuple[int, ...]:
    """Scattered, but telling."""
    return tuple(100 * (key + 1) + 7 * i % 50 for i in range(-(-num_tokens // BLOCK_SIZE)))


def built(
    shapes: list[tuple[int, int, int]], prompt_logprobs: int | None = None
) -> tuple[StepInput, SchedulerOutput]:
    """Requests of (tokens, computed, scheduled), the prompt being all but the last two tokens."""
    plan = SchedulerOutput(
        step=3,
        new_requests=tuple(
            NewRequest(
                key=key,
                token_ids=tuple(10 * key + i for i in range(total)),
                num_prompt_tokens=max(1, total - 2),
                params=SamplingParams(prompt_logprobs=prompt_logprobs if key % 2 == 0 else None),
            )
            for key, (total, _, _) in enumerate(shapes)
        ),
        keys=tuple(range(len(shapes))),
        num_scheduled_tokens=tuple(scheduled for _, _, scheduled in shapes),
        num_computed_tokens=tuple(computed for _, computed, _ in shapes),
        new_block_ids=tuple(blocks_of(key, c + s) for key, (_, c, s) in enumerate(shapes)),
        samples=tuple(computed + scheduled == total for total, computed, scheduled in shapes),
    )
    rows = RequestRows(vocab_size=1000, max_context=200, block_size=BLOCK_SIZE)
    rows.apply(plan)
    return build_step_input(plan, rows, BLOCK_SIZE, CPU), plan


@st.composite
def request_shapes(draw: st.DrawFn) -> tuple[int, int, int]:
    total = draw(st.integers(1, 40))
    computed = draw(st.integers(0, total - 1))
    return total, computed, draw(st.integers(1, total - computed))


@given(shapes=st.lists(request_shapes(), min_size=1, max_size=6))
@example(shapes=[(5, 4, 1), (17, 16, 1), (1, 0, 1), (8, 7, 1)])  # decodes only
def test_tensors_match_a_loop_over_tokens(shapes: list[tuple[int, int, int]]) -> None:
    inputs, _ = built(shapes, prompt_logprobs=2)
    tokens, positions, slots, scored, start = [], [], [], [], [0]
    for key, (total, computed, scheduled) in enumerate(shapes):
        table = blocks_of(key, computed + scheduled)
        for position in range(computed, computed + scheduled):
            if key % 2 == 0 and position + 1 < max(1, total - 2):
                scored.append((key, len(tokens), 10 * key + position + 1, 2))
            tokens.append(10 * key + position)
            positions.append(position)
            slots.append(table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE)
        start.append(len(tokens))
    attention = inputs.forward.attention
    assert inputs.forward.token_ids_T.tolist() == tokens
    assert inputs.forward.positions_T.tolist() == positions
    assert attention.slot_mapping_T.tolist() == slots
    assert attention.slot_mapping_T.dtype is torch.int64
    assert list(attention.query_start) == attention.query_start_R1.tolist() == start
    lengths = [computed + scheduled for _, computed, scheduled in shapes]
    assert list(attention.seq_lens) == attention.seq_lens_R.tolist() == lengths
    assert attention.block_tables_RN.dtype is torch.int32
    for key, line in enumerate(attention.block_tables_RN.tolist()):
        table = blocks_of(key, lengths[key])
        assert line == [*table, *(0,) * (len(line) - len(table))]
    assert inputs.sampling.tolist() == [
        key for key, (total, c, s) in enumerate(shapes) if c + s == total
    ]
    part = inputs.scored
    columns = (part.request, part.hidden_row, part.token_id, part.num_top)
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == scored


def test_reaching_beyond_tokens_or_blocks_is_an_internal_error() -> None:
    with pytest.raises(InternalError, match="row has 3 tokens"):
        built([(3, 0, 4)])
    rows = RequestRows(vocab_size=10, max_context=50, block_size=BLOCK_SIZE)
    plan = SchedulerOutput(
        step=0,
        new_requests=(
            NewRequest(key=0, token_ids=(1,) * 9, num_prompt_tokens=9, params=SamplingParams()),
        ),
        keys=(0,),
        num_scheduled_tokens=(9,),
        num_computed_tokens=(0,),
        new_block_ids=((1, 2),),
        samples=(True,),
    )
    rows.apply(plan)
    with pytest.raises(InternalError, match="room for 8"):
        build_step_input(plan, rows, BLOCK_SIZE, CPU)


def test_sampling_before_the_end_of_a_row_is_an_internal_error() -> None:
    rows = RequestRows(vocab_size=10, max_context=50, block_size=BLOCK_SIZE)
    new = NewRequest(key=0, token_ids=(1,) * 5, num_prompt_tokens=5, params=SamplingParams())
    plan = SchedulerOutput(
        step=0,
        new_requests=(new,),
        keys=(0,),
        num_scheduled_tokens=(4,),
        num_computed_tokens=(0,),
        new_block_ids=((1,),),
        samples=(True,),
    )
    rows.apply(plan)
    with pytest.raises(InternalError, match="samples a request that has more tokens"):
        build_step_input(plan, rows, BLOCK_SIZE, CPU)
