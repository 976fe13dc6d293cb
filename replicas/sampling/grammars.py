"""Which tokens may come next of a row whose output has to match a grammar, by row slot.

Grammars are llguidance's (its JSON of a schema, regular expression or Lark grammar). A row's answer
is a function of the grammar and the row's output so far: matchers are kept only to save time, and
go back and forth over drafts. So preempted, replayed and speculated rows get the same masks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

BoolArray = npt.NDArray[np.bool_]


@dataclass(slots=True)
class _State:
    """A matcher and the tokens it has taken."""

    matcher: LLMatcher
    taken: list[int] = field(default_factory=list)


class Grammars:
    """The grammars of a rank's live rows.

    Args:
        read_tokenizer: the tokenizer's JSON; called when the first grammar comes.
        vocab_size: V, the width of the logits.
    """

    def __init__(self, read_tokenizer: Callable[[], str], vocab_size: int) -> None:
        self._read_tokenizer = read_tokenizer
        self._vocab_size = vocab_size
        self._vocabularies: dict[tuple[int, ...], LLTokenizer] = {}
        self._states: dict[int, _State] = {}

    def put(self, slot: int, grammar: str, eos_token_ids: Sequence[int]) -> None:
        """Bind a slot's output to a grammar; at its end one of `eos_token_ids` must follow.

        Raises:
            ValueError: the grammar or the tokenizer is none.
        """
        # An engine without structured output needs no llguidance.
        from llguidance import LLMatcher

        matcher = LLMatcher(self._vocabulary(tuple(eos_token_ids)), grammar, log_level=0)
        if matcher.is_error():
            raise ValueError(f"the grammar is none: {matcher.get_error()}")
        self._states[slot] = _State(matcher)

    def clear(self, slot: int) -> None:
        """Forget what `slot` was bound to."""
        self._states.pop(slot, None)

    def clear_all(self) -> None:
        """Forget all slots; the tokenizer stays."""
        self._states.clear()

    def allowed(self, slot: int, output: list[int]) -> BoolArray | None:
        """Tokens that may follow `output`, (V,).

        Returns:
            None where the grammar does not allow `output` itself: behind a draft's wrong token, or
            an end that a step ran past. What is sampled there is nobody's.

        Raises:
            ValueError: the grammar has become too complex for the matcher.
        """
        state = self._states[slot]
        shared = _shared(state.taken, output)
        if shared < len(state.taken):
            state.matcher.rollback(len(state.taken) - shared)
            del state.taken[shared:]
        rest = output[shared:]
        num_taken = state.matcher.try_consume_tokens(rest) if rest else 0
        state.taken += rest[:num_taken]
        if num_taken < len(rest):
            return None
        bits = state.matcher.compute_bitmask()
        if error := state.matcher.get_error():
            raise ValueError(f"the grammar cannot be followed: {error}")
        packed = np.frombuffer(bits, np.uint8)
        return np.unpackbits(packed, bitorder="little")[: self._vocab_size].astype(np.bool_)

    def _vocabulary(self, eos_token_ids: tuple[int, ...]) -> LLTokenizer:
        found = self._vocabularies.get(eos_token_ids)
        if found is None:
            from llguidance import LLTokenizer

            found = LLTokenizer(
                self._read_tokenizer(), n_vocab=self._vocab_size, eos_token=list(eos_token_ids)
            )
            self._vocabularies[eos_token_ids] = found
        return found


def _shared(taken: list[int], output: list[int]) -> int:
    """Tokens that two sequences begin with in common."""
    num = min(len(taken), len(output))
    if taken[:num] == output[:num]:  # but for drafts that were wrong
        return num
    return next(at for at in range(num) if taken[at] != output[at])
