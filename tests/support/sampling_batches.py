"""Builds a `ParamsBatch` the way the rows do, from plain requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from replicas.api import SamplingParams
from replicas.sampling.grammars import Grammars
from replicas.sampling.params_batch import ParamsBatch, ParamsTable


@dataclass(frozen=True, slots=True, kw_only=True)
class RowCase:
    """One request at the point of sampling."""

    params: SamplingParams
    prompt: tuple[int, ...] = (0,)
    output: tuple[int, ...] = ()
    choice_index: int = 0
    eos_token_ids: tuple[int, ...] = ()


def batch_of(cases: Sequence[RowCase], grammars: Grammars | None = None) -> ParamsBatch:
    """Slots are handed out in reverse, so that a slot is never mistaken for a batch row."""
    table = ParamsTable(len(cases) + 2)
    longest = max((len(case.prompt) + len(case.output) for case in cases), default=1)
    token_ids = np.full((len(cases) + 2, longest + 3), 1, np.int32)
    slots = np.arange(len(cases), 0, -1)
    for slot, case in zip(slots.tolist(), cases, strict=True):
        ending = tuple(dict.fromkeys((*case.eos_token_ids, *case.params.stop_token_ids)))
        table.put(slot, case.params, case.choice_index, ending)
        tokens = (*case.prompt, *case.output)
        token_ids[slot, : len(tokens)] = tokens
    num_prompt = np.array([len(case.prompt) for case in cases], np.int64)
    num_output = np.array([len(case.output) for case in cases], np.int64)
    return table.gather(
        slots,
        num_prompt_R=num_prompt,
        num_tokens_R=num_prompt + num_output,
        token_ids_SC=token_ids,
        grammars=grammars,
    )
