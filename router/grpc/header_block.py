"""Header blocks of answers: HPACK (RFC 7541) without what a short answer gains nothing from.

Each field is a literal that the client's table does not keep (6.2.2), its strings not packed. h2's
own encoder searches and fills a table and packs with Huffman codes, in Python: of an answer's two
blocks that was most of the time, to save a hundred bytes of ids that never come again.
"""

from __future__ import annotations

from collections.abc import Iterable

import hpack

_LITERAL = b"\x00"
_NO_TABLE = b"\x20"
"""Sets the size of the client's table to 0 (6.3): it never has to be told of a new limit."""

_LARGEST_IN_PREFIX = 127


class LiteralEncoder(hpack.Encoder):
    """Takes the place of `hpack.Encoder` in one `H2Connection`."""

    def __init__(self) -> None:
        super().__init__()
        self._opening = _NO_TABLE

    def encode(self, headers: Iterable[tuple[bytes, bytes]], huffman: bool = True) -> bytes:  # type: ignore[override]
        """One header block; `huffman` is there for its caller and makes no difference."""
        parts, self._opening = [self._opening], b""
        for name, value in headers:
            parts += (_LITERAL, _length(len(name)), name, _length(len(value)), value)
        return b"".join(parts)


def _length(count: int) -> bytes:
    """An integer with a prefix of 7 bits (5.1); its highest bit 0 says: not packed."""
    if count < _LARGEST_IN_PREFIX:
        return bytes((count,))
    digits = bytearray((_LARGEST_IN_PREFIX,))
    count -= _LARGEST_IN_PREFIX
    while count >= 0x80:
        digits.append(count & 0x7F | 0x80)
        count >>= 7
    digits.append(count)
    return bytes(digits)
