"""A cluster file -> `ClusterFile`: the spec, and where each key stands.

Every problem of the file is reported at once, as `file.yaml:12: models[0].parallel.tp: ...` with
what is allowed and the nearest valid key. Whatever the bytes, the outcome is a `ClusterFile` or a
`ClusterFileError`; nothing is imported, constructed or fetched on the file's behalf.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cluster.base.errors import ConfigError
from cluster.base.findings import Finding, Loc, cross_findings, field_findings
from cluster.base.front_spec import IdentitySpec
from cluster.base.problems import ClusterFileError, Problem, shown
from cluster.base.spec import ClusterSpec
from cluster.base.yaml_tree import Node, read_tree

MAX_FILE_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterFile:
    """A checked cluster file. Relative paths in it are relative to `directory`."""

    path: Path
    spec: ClusterSpec
    tree: Node

    @property
    def directory(self) -> Path:
        """Where the file stands."""
        return self.path.resolve().parent

    def line_of(self, param: str) -> int:
        """Line of a key path such as `models[0].parallel.tp`, or of its nearest written parent."""
        return _line_of(self.tree, _parse_param(param))

    def written(self, param: str) -> object:
        """The value at a key path as the file has it; None where it leaves the key out."""
        value: Any = self.tree.plain()
        for part in _parse_param(param):
            try:
                value = value[part]
            except (KeyError, IndexError, TypeError):
                return None
        return value


def load_cluster_file(path: Path | str) -> ClusterFile:
    """Read and check a cluster file.

    Raises:
        ClusterFileError: everything that is wrong with it.
    """
    file = Path(path)
    return parse_cluster_text(_read_text(file), file)


def parse_cluster_text(text: str, file: Path) -> ClusterFile:
    """Check the text of a cluster file; `file` names it and anchors its relative paths.

    Raises:
        ClusterFileError: everything that is wrong with it.
    """
    tree, problems = read_tree(text, str(file))
    data = tree.plain()
    if not isinstance(data, dict):
        message = f"the file must be a mapping of keys, got {shown(data)}"
        hint = "start with `models:`"
        raise ClusterFileError(
            [Problem(file=str(file), line=tree.line, param="", message=message, hint=hint)]
        )
    findings = list(cross_findings(data, file.resolve().parent))
    spec: ClusterSpec | None = None
    try:
        spec = ClusterSpec.model_validate(_with_name(data, file))
    except ValidationError as error:
        findings += field_findings(error)
    problems += [_problem(tree, str(file), finding) for finding in findings]
    if problems or spec is None:
        raise ClusterFileError(problems)
    return ClusterFile(path=file, spec=spec, tree=tree)


@contextmanager
def pinned_to_lines(file: ClusterFile) -> Iterator[None]:
    """Name the line of the key at fault.

    Raises:
        ClusterFileError: in place of a ConfigError.
    """
    try:
        yield
    except ConfigError as error:
        param = error.param or ""
        problem = Problem(
            file=str(file.path),
            line=file.line_of(param) if param else 0,
            param=param,
            message=error.cause,
        )
        raise ClusterFileError([problem], remedy=error.remedy) from error


def _read_text(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise _whole_file(file, "no such file", "check the path") from None
    except IsADirectoryError:
        raise _whole_file(file, "is a directory", "name the YAML file in it") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a usable file name"
        raise _whole_file(file, f"cannot be read: {reason}") from None
    if len(data) > MAX_FILE_BYTES:
        raise _whole_file(file, f"is larger than {MAX_FILE_BYTES // 1024} KiB")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise _whole_file(file, "is not UTF-8 text", "save it as UTF-8", line) from None


def _whole_file(file: Path, message: str, hint: str = "", line: int = 0) -> ClusterFileError:
    name = shown(str(file))[1:-1] if len(str(file)) > 200 else str(file)
    return ClusterFileError([Problem(file=name, line=line, param="", message=message, hint=hint)])


def _with_name(data: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """The data with `cluster.name` defaulted from the file's name."""
    cluster = data.get("cluster", {})
    if not isinstance(cluster, dict) or "name" in cluster:
        return dict(data)
    stem = re.sub(r"[^a-z0-9-]+", "-", file.stem.lower())[:40].strip("-")
    name = stem or str(IdentitySpec.model_fields["name"].default)
    return {**data, "cluster": {**cluster, "name": name}}


# Key paths and lines.


def _problem(tree: Node, file: str, finding: Finding) -> Problem:
    return Problem(
        file=file,
        line=_line_of(tree, finding.loc),
        param=_param(finding.loc),
        message=finding.message,
        hint=finding.hint,
    )


def _param(loc: Loc) -> str:
    text = ""
    for part in loc:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            key = part if re.fullmatch(r"[\w.-]{1,64}", part) else shown(part)
            text += f".{key}" if text else key
    return text


def _parse_param(param: str) -> Loc:
    parts = re.findall(r"([^.\[\]]+)|\[([0-9]+)\]", param)
    return tuple(int(number) if number else word for word, number in parts)


def _line_of(tree: Node, loc: Loc) -> int:
    node, line = tree, tree.line
    for part in loc:
        if isinstance(node.value, dict) and part in node.value:
            entry = node.value[str(part)]
            node, line = entry.node, entry.line
        elif isinstance(node.value, tuple) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.line
        else:
            break
    return line
