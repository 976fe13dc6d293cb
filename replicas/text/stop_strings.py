"""Stop strings over streamed text: what may be shown now, and where the text ends.

A text ends with the first character at which any stop string is complete (if several complete at
once, the longest counts). That rule is causal, so the result does not depend on how the text was
cut into pushes. Held back is exactly the longest end of the text that could begin a stop string.
Cost: amortised constant per character and stop string (Knuth, Morris, Pratt 1977), whatever the
text, so a crafted stop string cannot slow a stream.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Finds the end of one choice's text.

    Args:
        stops: strings to stop at; an empty string would match at once and is never given.
        include_in_output: show the stop string itself too.
    """

    def __init__(self, stops: Sequence[str], include_in_output: bool) -> None:
        unique = sorted(dict.fromkeys(stops), key=len, reverse=True)
        self._automata = [_PrefixAutomaton(stop) for stop in unique]
        self._include = include_in_output
        self._held = ""
        self._matched: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """Take the next text.

        Returns:
            The text to show now, and the stop string that ended it or None. After a match every
            further push shows nothing.
        """
        if self._matched is not None:
            return "", self._matched
        if not self._automata:
            return text, None
        for position, character in enumerate(text):
            stop = self._advance(character)
            if stop is not None:
                return self._finish(self._held + text[: position + 1], stop), stop
        whole = self._held + text
        keep = max(automaton.matched for automaton in self._automata)
        visible = len(whole) - keep
        self._held = whole[visible:]
        return whole[:visible], None

    def flush(self) -> str:
        """The text is over without a stop string: show what was held back."""
        held, self._held = self._held, ""
        return held

    def _advance(self, character: str) -> str | None:
        """Feed one character to every automaton; the longest stop string that is now complete."""
        complete = None
        for automaton in self._automata:
            if automaton.step(character) and complete is None:
                complete = automaton.pattern
        return complete

    def _finish(self, text: str, stop: str) -> str:
        self._matched, self._held = stop, ""
        return text if self._include else text[: -len(stop)]


class _PrefixAutomaton:
    """How much of `pattern` the text read so far ends with."""

    __slots__ = ("_fallback", "matched", "pattern")

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.matched = 0
        self._fallback = _failure_function(pattern)

    def step(self, character: str) -> bool:
        """Read one character; True when the whole pattern has just been read."""
        matched = self.matched
        if matched == len(self.pattern):
            matched = self._fallback[matched]
        while matched and self.pattern[matched] != character:
            matched = self._fallback[matched]
        if self.pattern[matched] == character:
            matched += 1
        self.matched = matched
        return matched == len(self.pattern)


def _failure_function(pattern: str) -> list[int]:
    """`f[k]`: length of the longest proper prefix of pattern[:k] that it also ends with."""
    fallback = [0] * (len(pattern) + 1)
    length = 0
    for index in range(1, len(pattern)):
        while length and pattern[index] != pattern[length]:
            length = fallback[length]
        if pattern[index] == pattern[length]:
            length += 1
        fallback[index + 1] = length
    return fallback
