"""Keeps control tokens apart from text that merely looks like them.

A chat template writes control tokens as strings ("<|im_end|>"), and a user can write the same
strings. Before rendering, `break_specials` puts `BREAK` inside every control-token string of a
message, so that in the rendered text an unbroken one is the template's own and a broken one is the
user's. Without such a string a message stays as it is, so rendering (trim, split, `in`) is
unaffected in every honest case. BREAK and GUARD are Unicode noncharacters: a text that holds one is
refused, so neither can be forged.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from cluster.base.errors import InvalidRequestError
from replicas.text.tokenizer_files import AddedTokenSpec

BREAK = "\ufdd1"
GUARD = "\ufdd2"

_RESERVED = re.compile(f"[{BREAK}{GUARD}\ud800-\udfff]")
_SPACE = re.compile(r"\s*")


def check_plain_text(text: str, param: str | None = None) -> None:
    """Refuse what no tokenizer can take as text.

    Raises:
        InvalidRequestError: a lone surrogate or a noncharacter reserved by this module.
    """
    found = _RESERVED.search(text)
    if found is not None:
        code = f"U+{ord(found.group()):04X}"
        raise InvalidRequestError(
            f"The text holds {code}, which is not a valid Unicode character.",
            "Remove it from the text.",
            param=param,
        )


class SpecialBreaker:
    """Breaks control-token strings inside text a user wrote."""

    def __init__(self, specials: Iterable[str]) -> None:
        self._pattern = re.compile(_overlapping_pattern(_trie(specials)))

    def break_specials(self, text: str) -> str:
        """Insert BREAK after the first character of every occurrence, overlapping ones too."""
        check_plain_text(text, param="messages")
        return self._pattern.sub(rf"\g<0>{BREAK}", text)


class SpecialFinder:
    """Finds the control tokens that a template wrote, as the tokenizer itself would.

    Leftmost, longest first, with the `lstrip`, `rstrip` and `single_word` flags of the token.
    """

    def __init__(self, specials: Sequence[tuple[AddedTokenSpec, int]]) -> None:
        self._specs = {spec.content: (spec, token_id) for spec, token_id in specials}
        self._pattern = re.compile(_longest_pattern(_trie(self._specs)))

    def split(self, text: str) -> tuple[list[str], list[int]]:
        """Text pieces and the control ids between them: len(pieces) == len(ids) + 1."""
        pieces: list[str] = []
        ids: list[int] = []
        begin = 0
        for found in self._pattern.finditer(text):
            spec, token_id = self._specs[found.group()]
            if found.start() < begin or not _stands(spec, text, found.start(), found.end()):
                continue
            before, after = text[begin : found.start()], found.end()
            if spec.lstrip:
                before = before.rstrip()
            if spec.rstrip:
                after = _end_of_space(text, after)
            pieces.append(before.replace(BREAK, ""))
            ids.append(token_id)
            begin = after
        pieces.append(text[begin:].replace(BREAK, ""))
        return pieces, ids


def _end_of_space(text: str, start: int) -> int:
    found = _SPACE.match(text, start)
    return start if found is None else found.end()


def _stands(spec: AddedTokenSpec, text: str, start: int, end: int) -> bool:
    """Whether a match is the template's own token."""
    # BREAK cannot part a one-character token, so it follows it.
    if text[end : end + 1] == BREAK:
        return False
    around = text[max(start - 1, 0) : start] + text[end : end + 1]
    return not (spec.single_word and any(c.isalnum() or c == "_" for c in around))


_Trie = dict[str, Any]
"""Character -> the rest; the key "" marks the end of a string."""


def _trie(strings: Iterable[str]) -> _Trie:
    root: _Trie = {}
    for string in strings:
        node = root
        for character in string:
            node = node.setdefault(character, {})
        node[""] = {}
    root.pop("", None)
    return root


def _longest_pattern(node: _Trie) -> str:
    """Matches the longest string of the trie; a shared prefix is tried once, whatever the text.

    Plain alternation would try hundreds of control tokens at every "<" of a hostile text.
    """
    if not node:
        return r"(?!)"
    branches = [re.escape(c) + _rest(rest) for c, rest in node.items() if c]
    return "|".join(branches)


def _rest(node: _Trie) -> str:
    if set(node) <= {""}:
        return ""
    return f"(?:{_longest_pattern(node)}){'?' if '' in node else ''}"


def _overlapping_pattern(node: _Trie) -> str:
    """Matches the first character of every string of the trie."""
    heads = [
        re.escape(c) if "" in rest else f"{re.escape(c)}(?={_longest_pattern(rest)})"
        for c, rest in node.items()
    ]
    return "|".join(heads) or r"(?!)"
