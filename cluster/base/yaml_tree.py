"""YAML text -> a small tree in which every key and value knows its line.

The parser sees only the plain data part of YAML: no tags, one document, bounded depth and size
(aliases count with all they stand for, so an alias bomb stops early). Plain scalars follow the
YAML 1.2 core schema: `no` and `on` are text, `010` is ten, only `true`/`false` are booleans.
Never constructs an object; whatever the bytes, the outcome is a tree or `ClusterFileError`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import yaml

from cluster.base.problems import ClusterFileError, Problem, shown

MAX_DEPTH = 16
MAX_NODES = 10_000

Scalar = str | int | float | bool | None

_INT = re.compile(r"[-+]?[0-9]{1,30}")
_BASED = re.compile(r"0o[0-7]{1,40}|0x[0-9a-fA-F]{1,40}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]{1,60}|[0-9]{1,60}(\.[0-9]{0,60})?)([eE][-+]?[0-9]{1,6})?")
_SPECIAL_FLOAT = re.compile(r"([-+]?)\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS: tuple[tuple[frozenset[str], Scalar], ...] = (
    (frozenset({"", "~", "null", "Null", "NULL"}), None),
    (frozenset({"true", "True", "TRUE"}), True),
    (frozenset({"false", "False", "FALSE"}), False),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A key's line and the value behind it."""

    line: int
    node: Node


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A value: scalar, list or mapping. `size` counts it and all below, aliases unfolded."""

    line: int
    value: Scalar | tuple[Node, ...] | dict[str, Entry]
    size: int = 1

    def plain(self) -> object:
        """The value as Python scalars, lists and dicts."""
        if isinstance(self.value, dict):
            return {key: entry.node.plain() for key, entry in self.value.items()}
        if isinstance(self.value, tuple):
            return [node.plain() for node in self.value]
        return self.value


def read_tree(text: str, file: str) -> tuple[Node, list[Problem]]:
    """Parse one YAML document.

    Returns:
        The tree, and problems that left it usable (a key written twice).

    Raises:
        ClusterFileError: the text is not one well-formed document of plain data.
    """
    builder = _Builder(file)
    try:
        return builder.document(yaml.parse(text, Loader=yaml.SafeLoader)), builder.problems
    except yaml.MarkedYAMLError as error:
        line = _mark_line(error)
        raise builder.fatal(line, _syntax_message(error), _syntax_hint(error)) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, int(error.position)) + 1
        raise builder.fatal(
            line, "holds a control character", "delete it; only printable text is allowed"
        ) from None
    except (ValueError, OverflowError):
        raise builder.fatal(0, "holds an escape or number that YAML cannot represent") from None


def scalar_value(text: str) -> Scalar:
    """What a plain (unquoted) scalar means in the YAML 1.2 core schema."""
    for words, value in _WORDS:
        if text in words:
            return value
    if _INT.fullmatch(text):
        return int(text)
    if _BASED.fullmatch(text):
        return int(text, 0)
    if special := _SPECIAL_FLOAT.fullmatch(text):
        return float(special.group(1) + "inf") if special.group(2) else float("nan")
    if _FLOAT.fullmatch(text):
        return float(text)
    return text


@dataclass(slots=True)
class _Builder:
    """Turns the event stream of one document into nodes."""

    file: str
    problems: list[Problem] = field(default_factory=list)
    anchors: dict[str, Node] = field(default_factory=dict)
    num_nodes: int = 0

    def fatal(self, line: int, message: str, hint: str = "") -> ClusterFileError:
        """The error that ends the reading, with what was found before it."""
        last = Problem(file=self.file, line=line, param="", message=message, hint=hint)
        return ClusterFileError([*self.problems, last])

    def document(self, events: Iterator[yaml.Event]) -> Node:
        """The only document of the stream."""
        root: Node | None = None
        for event in events:
            if isinstance(event, (yaml.StreamStartEvent, yaml.StreamEndEvent)):
                continue
            if isinstance(event, yaml.DocumentEndEvent):
                continue
            if isinstance(event, yaml.DocumentStartEvent):
                if root is not None:
                    raise self.fatal(
                        _line(event), "a second YAML document starts here", "one file, one cluster"
                    )
                continue
            root = self._node(event, events, 0)
        if root is None:
            raise self.fatal(0, "the file is empty", "it needs at least a list of models")
        return root

    def _node(self, event: yaml.Event, events: Iterator[yaml.Event], depth: int) -> Node:
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event)
        if depth > MAX_DEPTH:
            raise self.fatal(_line(event), f"nested deeper than {MAX_DEPTH} levels")
        self._refuse_tag(event)
        self._count(1, event)
        if isinstance(event, yaml.ScalarEvent):
            plain = event.style is None
            node = Node(
                line=_line(event), value=scalar_value(event.value) if plain else event.value
            )
        elif isinstance(event, yaml.SequenceStartEvent):
            node = self._sequence(event, events, depth)
        else:
            node = self._mapping(event, events, depth)
        anchor = getattr(event, "anchor", None)
        if anchor is not None:
            self.anchors[anchor] = node
        return node

    def _sequence(self, start: yaml.Event, events: Iterator[yaml.Event], depth: int) -> Node:
        items = []
        for event in events:
            if isinstance(event, yaml.SequenceEndEvent):
                break
            items.append(self._node(event, events, depth + 1))
        return Node(
            line=_line(start), value=tuple(items), size=1 + sum(item.size for item in items)
        )

    def _mapping(self, start: yaml.Event, events: Iterator[yaml.Event], depth: int) -> Node:
        entries: dict[str, Entry] = {}
        merged: dict[str, Entry] = {}
        size = 1
        for event in events:
            if isinstance(event, yaml.MappingEndEvent):
                break
            key, is_plain = self._key(event)
            node = self._node(next(events), events, depth + 1)
            size += node.size
            if key == "<<" and is_plain:
                merged = self._merge(node) | merged
            elif key in entries:
                self._duplicate(key, event, entries[key])
            else:
                entries[key] = Entry(line=_line(event), node=node)
        return Node(line=_line(start), value=merged | entries, size=size)

    def _key(self, event: yaml.Event) -> tuple[str, bool]:
        """The key's text, and whether it was written without quotes."""
        if not isinstance(event, yaml.ScalarEvent):
            raise self.fatal(_line(event), "a key must be a word")
        self._refuse_tag(event)
        self._count(1, event)
        return str(event.value), event.style is None

    def _merge(self, node: Node) -> dict[str, Entry]:
        if not isinstance(node.value, dict):
            raise self.fatal(node.line, "<< needs one mapping alias", "write `<<: *name`")
        return node.value

    def _duplicate(self, key: str, event: yaml.Event, first: Entry) -> None:
        message = f"key {shown(key)} is written twice"
        hint = f"first on line {first.line}; keep one"
        self.problems.append(
            Problem(file=self.file, line=_line(event), param="", message=message, hint=hint)
        )

    def _alias(self, event: yaml.AliasEvent) -> Node:
        node = self.anchors.get(str(event.anchor))
        if node is None:
            raise self.fatal(
                _line(event), f"alias *{event.anchor} has no anchor that ends before it"
            )
        self._count(node.size, event)
        return node

    def _count(self, size: int, event: yaml.Event) -> None:
        self.num_nodes += size
        if self.num_nodes > MAX_NODES:
            raise self.fatal(
                _line(event), f"more than {MAX_NODES} values, aliases unfolded", "make it smaller"
            )

    def _refuse_tag(self, event: yaml.Event) -> None:
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise self.fatal(
                _line(event), f"tag {shown(tag)} is not allowed", "write plain values, no !tags"
            )


def _line(event: yaml.Event) -> int:
    mark = event.start_mark
    return int(mark.line) + 1 if mark is not None else 0


def _mark_line(error: yaml.MarkedYAMLError) -> int:
    mark = error.problem_mark or error.context_mark
    return int(mark.line) + 1 if mark is not None else 0


def _syntax_message(error: yaml.MarkedYAMLError) -> str:
    context = f" {error.context}" if error.context else ""
    problem = (error.problem or "malformed").replace("\t", "\\t")
    clean = "".join(c if c.isprintable() else "?" for c in f"{problem}{context}")
    return f"not valid YAML: {clean}"


def _syntax_hint(error: yaml.MarkedYAMLError) -> str:
    if "'\\t'" in (error.problem or ""):
        return "indent with spaces, not tabs"
    return "check the indentation, the colons and the quotes around here"
