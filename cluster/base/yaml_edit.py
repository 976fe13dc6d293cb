"""One value of a cluster file changed in its text; every other byte stays.

Comments, order and layout are the user's. So nothing is written anew: the place of the value is
looked up in the text, and what comes out is read back to see that only this has changed.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from cluster.base.errors import ConfigError
from cluster.base.load import parse_cluster_text
from cluster.base.problems import ClusterFileError
from cluster.base.spec import ClusterSpec


def set_replicas(text: str, file: Path, model: str, replicas: int) -> str:
    """The text with another number of replicas of a model.

    Raises:
        ConfigError: no such model, or the file says it in a way that cannot be edited here.
        ClusterFileError: the text is no cluster file, or the number is out of range.
    """
    spec = parse_cluster_text(text, file).spec
    names = [entry.name for entry in spec.models]
    if model not in names:
        raise ConfigError(
            f"{file} has no model named {model!r}.", f"It has: {', '.join(names)}.", param="models"
        )
    index = names.index(model)
    edited = _edited(text, index, replicas)
    wanted = list(spec.models)
    wanted[index] = wanted[index].model_copy(update={"replicas": replicas})
    expected = spec.model_copy(update={"models": tuple(wanted)})
    if edited is None or _read_back(edited, file) != expected:
        raise ConfigError(
            f"{file} says models[{index}].replicas in a way that is not edited here.",
            f"Write `replicas: {replicas}` there, and run `penstock apply {file}`.",
            param=f"models[{index}].replicas",
        )
    return edited


def _read_back(text: str, file: Path) -> ClusterSpec | None:
    """What the edited text says; None where the edit broke something else, such as an anchor."""
    try:
        return parse_cluster_text(text, file).spec
    except ClusterFileError as error:
        if any(problem.param.endswith(".replicas") for problem in error.problems):
            raise  # the number itself
        return None


def _edited(text: str, index: int, replicas: int) -> str | None:
    """The text with the value put in its place; None where an alias stands for the entry."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    entry = _value(_value(root, "models"), index)
    value, name = _value(entry, "replicas"), _value(entry, "name")
    if not isinstance(entry, yaml.MappingNode):
        return None
    if value is not None:
        if not _is_inside(value, entry):
            return None
        return text[: value.start_mark.index] + str(replicas) + text[value.end_mark.index :]
    if name is None or not _is_inside(name, entry):
        return None
    if entry.flow_style:
        at = name.end_mark.index
        return f"{text[:at]}, replicas: {replicas}{text[at:]}"
    return _with_line(text, name, f"replicas: {replicas}", _column(entry))


def _with_line(text: str, after: yaml.Node, line: str, column: int) -> str:
    """The text with a line after the one on which a node ends."""
    at = text.find("\n", after.end_mark.index)
    newline = "\r\n" if at > 0 and text[at - 1] == "\r" else "\n"
    if at < 0:
        return f"{text}{newline}{' ' * column}{line}{newline}"
    return f"{text[: at + 1]}{' ' * column}{line}{newline}{text[at + 1 :]}"


def _column(mapping: yaml.MappingNode) -> int:
    key, _ = mapping.value[0]
    return int(key.start_mark.column)


def _value(node: yaml.Node | None, key: str | int) -> yaml.Node | None:
    if isinstance(node, yaml.SequenceNode) and isinstance(key, int):
        found: yaml.Node = node.value[key]
        return found
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            if name.value == key:
                return value if isinstance(value, yaml.Node) else None
    return None


def _is_inside(node: yaml.Node, outer: yaml.Node) -> bool:
    """Whether a node is written within another one, and not an alias of something elsewhere."""
    start, end = outer.start_mark.index, outer.end_mark.index
    return bool(start <= node.start_mark.index and node.end_mark.index <= end)
