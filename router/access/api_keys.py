"""API keys: read from a file, held as digests, compared in constant time.

A line of the file is `KEY` or `NAME: KEY`; `#` begins a comment. Keys are what a `Bearer` header
can carry. Nothing here, and no error or log line, ever shows one.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cluster.base.errors import ConfigError

MAX_FILE_BYTES = 1 << 20
MAX_KEYS = 1000
"""All of them are compared for every request: 0.2 us each."""
PARAM = "gateway.api_keys_file"

_KEY = re.compile(r"[\x21-\x7e]{1,1024}")
_NAME = re.compile(r"[\w.@+-]{1,64}:")
_FORM = "A line is KEY, or NAME: KEY; keys are printable ASCII without blanks."


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedKey:
    """A key of the file."""

    name: str
    """The user's word for it, or `line N`."""
    key: str = field(repr=False)


class ApiKeys:
    """Keys that are accepted."""

    def __init__(self, keys: Sequence[NamedKey]) -> None:
        self.names = tuple(key.name for key in keys)
        self._digests = tuple(_digest(key.key.encode()) for key in keys)

    def accept(self, given: bytes) -> bool:
        """Whether `given` is one of them; takes the same time whichever it is, or none."""
        digest = _digest(given)
        found = False
        for known in self._digests:
            found |= hmac.compare_digest(digest, known)
        return found


def read_keys(file: str | Path) -> tuple[NamedKey, ...]:
    """The keys of a file, which may have none.

    Raises:
        ConfigError: it cannot be read, or a line is wrong; names the line, never its text.
    """
    try:
        with Path(file).open("rb") as stream:
            raw = stream.read(MAX_FILE_BYTES + 1)
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise _refusal(f"{file} cannot be read: {error.strerror}.", "Check the path.") from None
    except UnicodeDecodeError:
        raise _refusal(f"{file} is not UTF-8 text.", _FORM) from None
    if len(raw) > MAX_FILE_BYTES:
        raise _refusal(f"{file} is larger than {MAX_FILE_BYTES >> 20} MiB.", "Is it the right one?")
    keys: dict[str, NamedKey] = {}
    for number, line in enumerate(text.splitlines(), 1):
        key = _parse(line, f"{file}:{number}", number)
        if key is None:
            continue
        if other := keys.get(key.key):
            raise _refusal(f"{file}:{number} repeats the key of {other.name}.", "Delete one.")
        keys[key.key] = key
    if len(keys) > MAX_KEYS:
        raise _refusal(f"{file} has {len(keys)} keys; the limit is {MAX_KEYS}.", "Share some.")
    return tuple(keys.values())


def exposure(file: str | Path) -> str:
    """Who else may read or change a secret file; empty if only its owner and group read it."""
    mode = stat.S_IMODE(Path(file).stat().st_mode)
    if mode & (stat.S_IROTH | stat.S_IWOTH):
        return f"every user of this machine may read it (mode {mode:04o})"
    return f"its group may change it (mode {mode:04o})" if mode & stat.S_IWGRP else ""


def _parse(line: str, place: str, number: int) -> NamedKey | None:
    words = line.split()
    comment = next((at for at, word in enumerate(words) if word.startswith("#")), len(words))
    match words[:comment]:
        case []:
            return None
        case [key]:
            name = f"line {number}"
        case [label, key] if _NAME.fullmatch(label):
            name = label[:-1]
        case _:
            raise _refusal(f"{place} is neither a key nor a name and a key.", _FORM)
    if _KEY.fullmatch(key) is None:
        raise _refusal(f"{place}: the key cannot be sent in a header.", _FORM)
    return NamedKey(name=name, key=key)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _refusal(cause: str, remedy: str) -> ConfigError:
    return ConfigError(cause, remedy, param=PARAM)
