"""The training text: the Python standard library's own sources, split by file.

A file is either wholly in the train split or wholly held out; the split depends on the file's path
and the seed alone. Tests, generated tables and machine-specific files are left out. The digest pins
what was read, so that a rerun under another Python version is told apart.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

SKIPPED_DIRECTORIES = frozenset(
    {
        "site-packages",
        "__pycache__",
        "test",
        "tests",
        "idle_test",
        "lib2to3",
        "encodings",
        "pydoc_data",
        "lib-dynload",
        "_bundled",
    }
)
SKIPPED_PREFIXES = ("config-", "_sysconfigdata")


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """One source file; `path` is relative to the library root, with forward slashes."""

    path: str
    text: str

    @property
    def num_bytes(self) -> int:
        """Size in UTF-8 bytes."""
        return len(self.text.encode())


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """The two splits, both in the seeded order, and the digest of all that was read."""

    train: tuple[SourceFile, ...]
    held_out: tuple[SourceFile, ...]
    digest: str


def load_corpus(seed: int, held_out_share: float = 0.05, root: Path | None = None) -> Corpus:
    """Read the library below `root` (the running Python's by default) and split it by file.

    Raises:
        FileNotFoundError: there are too few sources below `root` to split.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    files = sorted(read_sources(root), key=lambda file: _rank(file.path, seed))
    num_held_out = round(len(files) * held_out_share)
    if not 0 < num_held_out < len(files):
        raise FileNotFoundError(
            f"{root} holds {len(files)} usable Python sources, too few to split"
        )
    return Corpus(
        train=tuple(files[num_held_out:]),
        held_out=tuple(files[:num_held_out]),
        digest=corpus_digest(files),
    )


def read_sources(root: Path) -> list[SourceFile]:
    """All UTF-8 `*.py` files below `root` that are not skipped and not empty, by path."""
    found = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _is_skipped(PurePosixPath(relative.as_posix())):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            found.append(SourceFile(path=relative.as_posix(), text=text))
    return found


def corpus_digest(files: Sequence[SourceFile]) -> str:
    """SHA-256 over paths and texts in path order."""
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.path):
        for part in (file.path, file.text):
            data = part.encode()
            digest.update(len(data).to_bytes(8, "big"))
            digest.update(data)
    return digest.hexdigest()


def held_out_sample(
    files: Sequence[SourceFile], max_bytes: int = 64_000, bytes_per_file: int = 4_000
) -> str:
    """A small fixed text: the head of each file in order, cut at a line end, until it is full."""
    parts: list[str] = []
    left = max_bytes
    for file in files:
        head = _head(file.text, min(bytes_per_file, left))
        left -= len(head.encode())
        parts.append(head)
        if left < bytes_per_file // 4:
            break
    return "".join(parts)


def _head(text: str, max_bytes: int) -> str:
    lines = []
    used = 0
    for line in text.splitlines(keepends=True):
        used += len(line.encode())
        if used > max_bytes:
            break
        lines.append(line)
    return "".join(lines)


def _is_skipped(path: PurePosixPath) -> bool:
    if SKIPPED_DIRECTORIES.intersection(path.parts):
        return True
    return any(part.startswith(SKIPPED_PREFIXES) for part in path.parts)


def _rank(path: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}:{path}".encode()).digest()
