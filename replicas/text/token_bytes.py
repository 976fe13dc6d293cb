"""The exact bytes each token prints, for decoders where a token's bytes do not depend on others.

Covers byte-level BPE (GPT-2, Llama 3, Qwen) and sentencepiece-style BPE with byte fallback
(Llama 2, Mistral, Gemma); for any other decoder `from_backend` returns None and the detokenizer
asks the library. With bytes per token, streaming text is one dictionary look-up and one incremental
UTF-8 decode per token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer as BackendTokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True)
class TokenBytes:
    """Bytes by token id; an id without an entry prints nothing."""

    table: Mapping[int, bytes]
    strips_first_space: bool
    """The decoder drops one leading space at the very start of a text."""

    @classmethod
    def from_backend(cls, backend: BackendTokenizer) -> TokenBytes | None:
        """Read the decoder's declaration; None when its tokens are not independent."""
        decoder = json.loads(backend.to_str()).get("decoder")
        rule = _rule(decoder)
        if rule is None:
            return None
        to_bytes, strips = rule
        vocabulary = backend.get_vocab(with_added_tokens=True)
        return cls({token_id: to_bytes(token) for token, token_id in vocabulary.items()}, strips)


def _rule(decoder: Any) -> tuple[Callable[[str], bytes], bool] | None:
    if not isinstance(decoder, Mapping):
        return None
    if decoder.get("type") == "ByteLevel":
        return _byte_level_rule(), False
    if decoder.get("type") == "Sequence":
        return _sequence_rule(decoder.get("decoders") or [])
    return None


def _sequence_rule(
    steps: Sequence[Mapping[str, Any]],
) -> tuple[Callable[[str], bytes], bool] | None:
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return _byte_level_rule(), False
    if kinds not in (
        ["Replace", "ByteFallback", "Fuse"],
        ["Replace", "ByteFallback", "Fuse", "Strip"],
    ):
        return None
    pattern = steps[0].get("pattern") or {}
    strip = {"content": " ", "start": 1, "stop": 0}
    if pattern != {"String": "\u2581"} or steps[0].get("content") != " ":
        return None
    if len(steps) == 4 and any(steps[3].get(key) != value for key, value in strip.items()):
        return None
    return _byte_fallback_bytes, len(steps) == 4


def _byte_fallback_bytes(token: str) -> bytes:
    found = _BYTE_TOKEN.fullmatch(token)
    if found is not None:
        return bytes([int(found.group(1), 16)])
    return token.replace("\u2581", " ").encode("utf-8", "replace")


def _byte_level_rule() -> Callable[[str], bytes]:
    to_byte = {character: byte for byte, character in byte_level_alphabet().items()}

    def to_bytes(token: str) -> bytes:
        try:
            return bytes([to_byte[character] for character in token])
        except KeyError:  # an added token that was not written in the byte alphabet
            return token.encode("utf-8", "replace")

    return to_bytes


def byte_level_alphabet() -> dict[int, str]:
    """Byte to character as in GPT-2: printable bytes are themselves, the rest start at U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {byte: chr(byte) for byte in printable}
    others = [byte for byte in range(256) if byte not in alphabet]
    alphabet.update({byte: chr(256 + index) for index, byte in enumerate(others)})
    return alphabet
