"""Sampling parameters as columns: one table entry per row slot, gathered for a step's batch.

`ParamsTable` is written once when a request arrives, so that a step costs one numpy gather and no
Python per request. Variable-length settings (logit bias, stop ids) live in dicts that hold only
the slots that use them. Invariant: an entry that is put never leaves traces of the one before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from replicas.api import SamplingParams
from replicas.sampling.ragged import IntArray, ragged_ranges
from replicas.sampling.random import Float64Array, fold_seed, uniform

if TYPE_CHECKING:
    from replicas.sampling.grammars import Grammars

_OFF = -1
_COLUMNS = np.dtype(
    [
        ("temperature", np.float64),
        ("top_k", np.int64),
        ("top_p", np.float64),
        ("min_p", np.float64),
        ("repetition_penalty", np.float64),
        ("presence_penalty", np.float64),
        ("frequency_penalty", np.float64),
        ("no_repeat_ngram_size", np.int64),
        ("min_tokens", np.int64),
        ("has_logit_bias", np.bool_),
        ("has_grammar", np.bool_),
        ("seed", np.uint64),
        ("choice_index", np.uint64),
        ("logprobs", np.int64),
        ("prompt_logprobs", np.int64),
        ("is_plain_greedy", np.bool_),
        ("defers", np.bool_),
    ]
)

BiasEntry = tuple[IntArray, npt.NDArray[np.float32]]


class ParamsTable:
    """Parameters of every live request, by row slot."""

    def __init__(self, num_slots: int) -> None:
        self._columns = np.zeros(num_slots, dtype=_COLUMNS)
        self._logit_bias: dict[int, BiasEntry] = {}
        self._min_token_ids: dict[int, IntArray] = {}
        self._not_plain: set[int] = set()  # slots that want more than their largest logit

    def grow(self, num_slots: int) -> None:
        """Make room for more slots; entries stay."""
        grown = np.zeros(num_slots, dtype=_COLUMNS)
        grown[: len(self._columns)] = self._columns
        self._columns = grown

    def put(
        self, slot: int, params: SamplingParams, choice_index: int, ending_ids: Sequence[int]
    ) -> None:
        """Fill `slot`.

        Args:
            ending_ids: EOS and stop token ids, masked until `min_tokens` are out.
        """
        self.clear(slot)
        self._columns[slot] = (
            params.temperature,
            params.top_k,
            params.top_p,
            params.min_p,
            params.repetition_penalty,
            params.presence_penalty,
            params.frequency_penalty,
            params.no_repeat_ngram_size,
            params.min_tokens if ending_ids else 0,
            bool(params.logit_bias),
            bool(params.grammar),
            fold_seed(params.seed),
            choice_index,
            _OFF if params.logprobs is None else params.logprobs,
            _OFF if params.prompt_logprobs is None else params.prompt_logprobs,
            _is_plain_greedy(params),
            _defers(params),
        )
        if not _is_plain_greedy(params):
            self._not_plain.add(slot)
        if params.logit_bias:
            ids, values = zip(*params.logit_bias, strict=True)
            self._logit_bias[slot] = (np.array(ids, np.int64), np.array(values, np.float32))
        if params.min_tokens and ending_ids:
            self._min_token_ids[slot] = np.array(ending_ids, np.int64)

    def clear(self, slot: int) -> None:
        """Forget what `slot` held."""
        self._logit_bias.pop(slot, None)
        self._min_token_ids.pop(slot, None)
        self._not_plain.discard(slot)

    def defers(self, slots_R: IntArray) -> bool:
        """Whether all of these rows can be sampled without the tokens before and without a look at
        the result: no penalties on the history, no grammar, no logprobs."""
        return bool(self._columns["defers"][slots_R].all())

    def prompt_logprobs(self, slots_R: IntArray) -> IntArray:
        """Alternatives wanted per prompt position; -1 where prompt logprobs are off."""
        wanted: IntArray = self._columns["prompt_logprobs"][slots_R]
        return wanted

    def all_plain_greedy(self, slots_R: IntArray) -> bool:
        """Whether each of these slots wants its largest logit and nothing else."""
        return not self._not_plain or self._not_plain.isdisjoint(slots_R.tolist())

    def gather(
        self,
        slots_R: IntArray,
        *,
        num_prompt_R: IntArray,
        num_tokens_R: IntArray,
        token_ids_SC: npt.NDArray[np.int32],
        grammars: Grammars | None = None,
    ) -> ParamsBatch:
        """The batch of the given slots.

        Args:
            num_tokens_R: prompt + output tokens so far, which is the position to sample for.
            token_ids_SC: token ids by slot and position; referenced, not copied.
            grammars: of the slots that are bound to one.
        """
        return ParamsBatch(
            columns_R=self._columns[slots_R],
            slots_R=slots_R,
            num_prompt_R=num_prompt_R,
            num_tokens_R=num_tokens_R,
            token_ids_SC=token_ids_SC,
            logit_bias=self._logit_bias,
            min_token_ids=self._min_token_ids,
            grammars=grammars,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ParamsBatch:
    """What the sampler reads: R rows, in the order of the logits.

    Arrays are on the host; a feature becomes a tensor only when a row uses it.
    """

    columns_R: npt.NDArray[np.void]
    slots_R: IntArray
    num_prompt_R: IntArray
    num_tokens_R: IntArray
    token_ids_SC: npt.NDArray[np.int32]
    logit_bias: Mapping[int, BiasEntry]
    min_token_ids: Mapping[int, IntArray]
    grammars: Grammars | None

    def __len__(self) -> int:
        return len(self.slots_R)

    @property
    def is_plain_greedy(self) -> bool:
        """Whether every row wants its largest logit and nothing else."""
        return bool(self.columns_R["is_plain_greedy"].all())

    def column(self, name: str) -> npt.NDArray[Any]:
        """One parameter of all rows."""
        values: npt.NDArray[Any] = self.columns_R[name]
        return values

    def floats(self, name: str, rows: IntArray) -> Float64Array:
        """One parameter of some rows, as float64."""
        values: Float64Array = self.columns_R[name][rows].astype(np.float64)
        return values

    def ints(self, name: str, rows: IntArray) -> IntArray:
        """One parameter of some rows, as int64."""
        values: IntArray = self.columns_R[name][rows].astype(np.int64)
        return values

    def where(self, mask_R: npt.NDArray[np.bool_]) -> IntArray:
        """Row numbers at which `mask_R` is true."""
        return np.flatnonzero(mask_R).astype(np.int64)

    def row(self, index: int) -> ParamsBatch:
        """The batch of one row alone."""
        only = slice(index, index + 1)
        return ParamsBatch(
            columns_R=self.columns_R[only],
            slots_R=self.slots_R[only],
            num_prompt_R=self.num_prompt_R[only],
            num_tokens_R=self.num_tokens_R[only],
            token_ids_SC=self.token_ids_SC,
            logit_bias=self.logit_bias,
            min_token_ids=self.min_token_ids,
            grammars=self.grammars,
        )

    def history(self, rows: IntArray, *, with_prompt: bool) -> tuple[IntArray, IntArray]:
        """Tokens so far of some rows, flat: (index into `rows`, token id) of each."""
        end = self.num_tokens_R[rows]
        start = np.zeros_like(end) if with_prompt else self.num_prompt_R[rows]
        owner, position = ragged_ranges(start, end - start)
        tokens = self.token_ids_SC[self.slots_R[rows][owner], position].astype(np.int64)
        return owner, tokens

    def tokens_of(self, row: int) -> npt.NDArray[np.int32]:
        """Prompt + output of one row."""
        return self.token_ids_SC[self.slots_R[row], : self.num_tokens_R[row]]

    def output_of(self, row: int) -> list[int]:
        """Output so far of one row."""
        output: list[int] = self.tokens_of(row)[self.num_prompt_R[row] :].tolist()
        return output

    def uniforms(self, rows: IntArray) -> Float64Array:
        """The random number of each row's next token, in [0, 1)."""
        return uniform(
            self.columns_R["seed"][rows],
            self.columns_R["choice_index"][rows],
            self.num_tokens_R[rows],
        )


def _defers(params: SamplingParams) -> bool:
    return (
        params.repetition_penalty == 1.0
        and params.presence_penalty == params.frequency_penalty == 0.0
        and not params.no_repeat_ngram_size
        and params.logprobs is None
        and params.prompt_logprobs is None
        and not params.grammar
    )


def _is_plain_greedy(params: SamplingParams) -> bool:
    return (
        params.temperature == 0.0
        and params.repetition_penalty == 1.0
        and params.presence_penalty == params.frequency_penalty == 0.0
        and not params.no_repeat_ngram_size
        and not params.min_tokens
        and not params.logit_bias
        and not params.grammar
        and params.logprobs is None
    )
