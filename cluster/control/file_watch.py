"""Sees that a cluster file has been edited, once per edit."""

from __future__ import annotations

from pathlib import Path

from cluster.base.load import ClusterFile, load_cluster_file


class FileWatch:
    """Looks at one file; an edit counts when two looks in a row see the same.

    Editors write in several steps, so what is seen first may be half of it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known = self._seen = self._read()

    def edited(self) -> ClusterFile | None:
        """The file if it is another one than at the last edit.

        Raises:
            ClusterFileError: it is, and it is wrong; told once.
        """
        now = self._read()
        is_settled = now == self._seen
        self._seen = now
        if now is None or not is_settled or now == self._known:
            return None
        self._known = now
        return load_cluster_file(self._path)

    def _read(self) -> bytes | None:
        """What the file holds; None while it cannot be read, as between two names of an editor."""
        try:
            return self._path.read_bytes()
        except OSError:
            return None
