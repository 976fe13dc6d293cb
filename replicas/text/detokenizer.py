"""Incremental text of a growing list of token ids, never splitting a character.

Invariant: decode(prompt) + all pushes + flush == decode(prompt + tokens), for any way of cutting
the tokens into pushes. Two strategies: exact bytes per token where `Tokenizer.token_bytes` has them
(about 1 us per token), else a sliding window over the library's decode. The two differ from
the library in one case: with byte fallback the library prints one U+FFFD per byte of a whole run of
byte tokens when any of it is broken, while here the characters before the break stay as streamed.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from replicas.text.token_bytes import TokenBytes
from replicas.text.tokenizer import Tokenizer

_CONTEXT_TOKENS = 8
"""Prompt tokens that can still shape the first output character (UTF-8 needs 4 bytes)."""


class _Strategy(Protocol):
    def push(self, token_ids: Sequence[int]) -> str: ...

    def flush(self) -> str: ...


class IncrementalDetokenizer:
    """Streams the text of one choice.

    Args:
        tokenizer: the checkpoint's tokenizer.
        prompt_ids: what comes before; decides about a leading space and a split character.
        skip_special_tokens: print nothing for control tokens.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int], skip_special_tokens: bool
    ) -> None:
        self._strategy: _Strategy
        hidden = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        if tokenizer.token_bytes is not None:
            self._strategy = _ByteDecoder(tokenizer.token_bytes, prompt_ids, hidden)
        else:
            self._strategy = _WindowDecoder(tokenizer, prompt_ids, skip_special_tokens)

    def push(self, token_ids: Sequence[int]) -> str:
        """Text that is now certain; the last part of a character is held back."""
        return self._strategy.push(token_ids)

    def flush(self) -> str:
        """What was held back; U+FFFD for a character that never got complete."""
        return self._strategy.flush()


class _ByteDecoder:
    def __init__(
        self, token_bytes: TokenBytes, prompt_ids: Sequence[int], hidden: frozenset[int]
    ) -> None:
        self._table = token_bytes.table
        self._hidden = hidden
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        context = self._bytes(prompt_ids[-_CONTEXT_TOKENS:])
        self._decoder.decode(context)
        # Only a text that starts here loses its leading space.
        self._strip = token_bytes.strips_first_space and not context and not self._bytes(prompt_ids)

    def push(self, token_ids: Sequence[int]) -> str:
        return self._emit(self._decoder.decode(self._bytes(token_ids)))

    def flush(self) -> str:
        return self._emit(self._decoder.decode(b"", final=True))

    def _bytes(self, token_ids: Sequence[int]) -> bytes:
        table, hidden = self._table, self._hidden
        return b"".join([table.get(i, b"") for i in token_ids if i not in hidden])

    def _emit(self, text: str) -> str:
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text


class _WindowDecoder:
    """Decodes a short window twice per push: with and without the new tokens."""

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int], skip_special_tokens: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        # Hidden tokens are dropped up front, or a window of only hidden ones would look like
        # the start of the text.
        self._hidden = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._ids = [i for i in prompt_ids if i not in self._hidden][-_CONTEXT_TOKENS:]
        self._shown = self._decode(self._ids)
        self._stable = len(self._ids)
        if self._shown.endswith("\ufffd"):
            self._shown = self._shown.rstrip("\ufffd")

    def push(self, token_ids: Sequence[int]) -> str:
        parts = [self._push_one(i) for i in token_ids if i not in self._hidden]
        return "".join(parts)

    def flush(self) -> str:
        text = self._decode(self._ids)
        new, self._shown = text[len(self._shown) :], text
        return new

    def _push_one(self, token_id: int) -> str:
        self._ids.append(token_id)
        text = self._decode(self._ids)
        if text.endswith("\ufffd") or len(text) <= len(self._shown):
            return ""
        new = text[len(self._shown) :]
        # Keep the tokens of this piece as context for the next one, forget what came before.
        self._ids = self._ids[self._stable :] or self._ids[-1:]
        self._stable = len(self._ids)
        self._shown = self._decode(self._ids)
        return new

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)
