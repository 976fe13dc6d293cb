"""A rank's memory of its live requests: one row slot each, kept up to date by step diffs.

Owns token ids, block tables, lengths and sampling parameters by slot; every rank holds the same
rows, sampled tokens included. It never decides anything: a diff that contradicts the rows is an
`InternalError`, because scheduler and worker then disagree about what is in the KV cache.
Invariant: block table entries beyond a row's own blocks are 0. A draft lies behind a row's tokens
for the step that checks it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt

from cluster.base.errors import InternalError, PenstockError
from replicas.api import Pooling, SamplingParams
from replicas.engine.scheduler_output import NewRequest, SchedulerOutput
from replicas.sampling.params_batch import ParamsBatch, ParamsTable
from replicas.sampling.ragged import IntArray
from replicas.worker.pending_step import UNKNOWN, PendingTokens
from replicas.worker.row_faults import RowFaults

if TYPE_CHECKING:
    from replicas.sampling.grammars import Grammars

IntT = TypeVar("IntT", bound=np.signedinteger)

_FIRST_SLOTS = 16
_FIRST_TOKENS = 256


class RequestRows:
    """All live rows; S slots, C token columns, N block columns, grown by doubling.

    Args:
        vocab_size: token ids at or above it make a row faulty, see `RowFaults`.
        max_context: most tokens a request may ever hold.
        block_size: tokens per KV block.
        grammars: what rows' outputs are bound to; None refuses requests with one.
        wants_logprobs: whether logprobs of sampled tokens are of use on this rank.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        max_context: int,
        block_size: int,
        grammars: Grammars | None = None,
        wants_logprobs: bool = True,
    ) -> None:
        self._vocab_size = vocab_size
        self._wants_logprobs = wants_logprobs
        self._max_context = max_context
        self.block_size = block_size
        self._slot_of: dict[int, int] = {}
        self._free_slots = list(range(_FIRST_SLOTS))[::-1]
        self._faults = RowFaults()
        self._pooling: dict[int, Pooling] = {}
        self._params = ParamsTable(_FIRST_SLOTS)
        self._grammars = grammars
        num_tokens = min(max_context, _FIRST_TOKENS)
        self.token_ids_SC = np.zeros((_FIRST_SLOTS, num_tokens), np.int32)
        self.block_tables_SN = np.zeros((_FIRST_SLOTS, -(-num_tokens // block_size)), np.int32)
        self.num_prompt_S = np.zeros(_FIRST_SLOTS, np.int64)
        self.num_tokens_S = np.zeros(_FIRST_SLOTS, np.int64)
        self.num_blocks_S = np.zeros(_FIRST_SLOTS, np.int64)

    def __len__(self) -> int:
        return len(self._slot_of)

    def apply(self, plan: SchedulerOutput) -> None:
        """Bring the rows to the state the step starts from.

        Raises:
            InternalError: the plan does not fit the rows.
        """
        for key in plan.finished_keys:
            self._remove(key)
        for request in plan.new_requests:
            self._add(request)
        self._faults.check(plan)
        for key, block_ids in zip(plan.keys, plan.new_block_ids, strict=True):
            if block_ids:
                self._append_blocks(self._slot(key), block_ids)
        for key, index, block_id in plan.replaced_blocks:
            slot = self._slot(key)
            if not 0 <= index < self.num_blocks_S[slot]:
                raise InternalError(f"Request {key} has no block at index {index} to replace.")
            self.block_tables_SN[slot, index] = block_id
        for key, draft in zip(plan.keys, plan.draft_token_ids, strict=bool(plan.draft_token_ids)):
            if draft:
                self._write_tokens(self._slot(key), draft)

    def append_sampled(
        self, slots_R: IntArray, token_ids: Sequence[int], num_accepted_R: IntArray
    ) -> None:
        """Make each row longer by what was right of its draft and one token more.

        Args:
            token_ids: the last token of each row; ids below 0 (there is none) become 0.
            num_accepted_R: tokens of the step's draft that stay, where there is one.

        Raises:
            InternalError: a row is at its longest.
        """
        positions = self.num_tokens_S[slots_R] + num_accepted_R
        self._widen(int(positions.max(initial=-1)) + 1)
        self.token_ids_SC[slots_R, positions] = np.maximum(token_ids, 0)
        self.num_tokens_S[slots_R] = positions + 1

    def append_unknown(self, slots_R: IntArray) -> IntArray:
        """Make each row longer by a token that only the device knows; where those stand.

        Raises:
            InternalError: a row is at its longest.
        """
        positions: IntArray = self.num_tokens_S[slots_R]
        self._widen(int(positions.max(initial=-1)) + 1)
        self.token_ids_SC[slots_R, positions] = UNKNOWN
        self.num_tokens_S[slots_R] = positions + 1
        return positions

    def learn(self, keys: Sequence[int], tokens: PendingTokens, token_ids: IntArray) -> None:
        """Fill in the tokens of a step, but for rows that have gone since it was launched."""
        slots = tokens.slots.tolist()
        same = [self._slot_of.get(key) == slot for key, slot in zip(keys, slots, strict=True)]
        place = tokens.slots[same], tokens.positions[same]
        self.token_ids_SC[place] = np.maximum(token_ids[same], 0)

    def defers(self, slots_R: IntArray) -> bool:
        """See `ParamsTable.defers`."""
        return self._params.defers(slots_R)

    def fail(self, key: int, error: str, step: int) -> None:
        """Sampling for this request failed in `step`; its row goes on until the plans drop it."""
        if key in self._slot_of:
            self._faults.fail(key, error, step)

    def slots(self, keys: Sequence[int]) -> IntArray:
        """Slots of the given requests, in order.

        Raises:
            InternalError: a key has no row.
        """
        return np.fromiter((self._slot(key) for key in keys), np.int64, len(keys))

    @property
    def faults(self) -> RowFaults:
        """Requests that must fail although their rows exist."""
        return self._faults

    @property
    def pooling(self) -> dict[int, Pooling]:
        """Key -> pooling, for live embedding requests."""
        return self._pooling

    @property
    def params(self) -> ParamsTable:
        """Sampling parameters by slot."""
        return self._params

    def sampling_batch(self, slots_R: IntArray, num_tokens_R: IntArray) -> ParamsBatch:
        """What the sampler needs to know about rows whose next token stands at `num_tokens_R`."""
        return self._params.gather(
            slots_R,
            num_prompt_R=self.num_prompt_S[slots_R],
            num_tokens_R=num_tokens_R,
            token_ids_SC=self.token_ids_SC,
            grammars=self._grammars,
        )

    def _slot(self, key: int) -> int:
        slot = self._slot_of.get(key)
        if slot is None:
            raise InternalError(f"The plan names request {key}, which has no row.")
        return slot

    def _add(self, request: NewRequest) -> None:
        if request.key in self._slot_of:
            raise InternalError(f"Request {request.key} is announced as new and has a row already.")
        if not self._free_slots:
            self._grow_slots()
        slot = self._free_slots.pop()
        self._slot_of[request.key] = slot
        self.num_prompt_S[slot] = request.num_prompt_tokens
        if error := self._fault(request) or self._bind(slot, request):
            # The row takes part in the step all the same (its blocks are scheduled), as a
            # harmless stand-in: its tokens become 0 where they are out of range.
            self._faults.note(request.key, error)
            self._params.put(slot, SamplingParams(temperature=0.0), request.choice_index, ())
        if request.pooling is not None:
            self._pooling[request.key] = request.pooling
        self._append_tokens(slot, request.token_ids)

    def _bind(self, slot: int, request: NewRequest) -> str:
        """Note how the row is sampled; why it cannot be, or nothing."""
        params = request.params
        ending_ids = (*request.eos_token_ids, *params.stop_token_ids)
        ending_ids = tuple(t for t in dict.fromkeys(ending_ids) if 0 <= t < self._vocab_size)
        if not self._wants_logprobs and params.logprobs is not None:
            params = dataclasses.replace(params, logprobs=None)
        self._params.put(slot, params, request.choice_index, ending_ids)
        if not params.grammar:
            return ""
        if self._grammars is None:
            return "grammar: this rank has no tokenizer."
        try:
            self._grammars.put(slot, params.grammar, request.eos_token_ids)
        except (ValueError, PenstockError) as error:
            return f"grammar: {error}"
        return ""

    def _fault(self, request: NewRequest) -> str:
        """Token ids are range-checked at the front; here they would reach memory."""
        biased = (token_id for token_id, _ in request.params.logit_bias)
        for name, token_ids in (("token_ids", request.token_ids), ("logit_bias", biased)):
            bad = next((t for t in token_ids if not 0 <= t < self._vocab_size), None)
            if bad is not None:
                return f"{name}: token id {bad} is outside the vocabulary of {self._vocab_size}."
        return ""

    def _remove(self, key: int) -> None:
        # A request that was aborted before its first step never had a row.
        slot = self._slot_of.pop(key, None)
        if slot is None:
            return
        self._faults.forget(key)
        self._pooling.pop(key, None)
        self._params.clear(slot)
        if self._grammars is not None:
            self._grammars.clear(slot)
        self.block_tables_SN[slot, : self.num_blocks_S[slot]] = 0
        self.num_tokens_S[slot] = self.num_prompt_S[slot] = self.num_blocks_S[slot] = 0
        self._free_slots.append(slot)

    def _append_tokens(self, slot: int, token_ids: Sequence[int]) -> None:
        self.num_tokens_S[slot] = self._write_tokens(slot, token_ids)

    def _write_tokens(self, slot: int, token_ids: Sequence[int]) -> int:
        """Write tokens behind a row's own without making it longer; where they end."""
        start = int(self.num_tokens_S[slot])
        stop = start + len(token_ids)
        self._widen(stop)
        tokens = np.array(token_ids, np.int64)
        tokens[(tokens < 0) | (tokens >= self._vocab_size)] = 0
        self.token_ids_SC[slot, start:stop] = tokens
        return stop

    def _widen(self, num_tokens: int) -> None:
        """Make room for rows of so many tokens."""
        if num_tokens > self._max_context:
            raise InternalError(f"A request of {num_tokens} tokens exceeds {self._max_context}.")
        if num_tokens > self.token_ids_SC.shape[1]:
            width = min(self._max_context, max(num_tokens, 2 * self.token_ids_SC.shape[1]))
            self.token_ids_SC = _grown(self.token_ids_SC, (len(self.token_ids_SC), width))

    def _append_blocks(self, slot: int, block_ids: Sequence[int]) -> None:
        start = int(self.num_blocks_S[slot])
        stop = start + len(block_ids)
        if stop > self.block_tables_SN.shape[1]:
            width = max(stop, 2 * self.block_tables_SN.shape[1])
            self.block_tables_SN = _grown(self.block_tables_SN, (len(self.block_tables_SN), width))
        self.block_tables_SN[slot, start:stop] = block_ids
        self.num_blocks_S[slot] = stop

    def _grow_slots(self) -> None:
        old = len(self.num_tokens_S)
        new = 2 * old
        self.token_ids_SC = _grown(self.token_ids_SC, (new, self.token_ids_SC.shape[1]))
        self.block_tables_SN = _grown(self.block_tables_SN, (new, self.block_tables_SN.shape[1]))
        self.num_prompt_S = _grown(self.num_prompt_S, (new,))
        self.num_tokens_S = _grown(self.num_tokens_S, (new,))
        self.num_blocks_S = _grown(self.num_blocks_S, (new,))
        self._params.grow(new)
        self._free_slots = list(range(old, new))[::-1]


def _grown(array: npt.NDArray[IntT], shape: tuple[int, ...]) -> npt.NDArray[IntT]:
    """A zero-extended copy; `shape` is at least as large in every dim."""
    grown = np.zeros(shape, array.dtype)
    grown[tuple(slice(0, size) for size in array.shape)] = array
    return grown
