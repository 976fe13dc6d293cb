"""What an edited cluster file changes of a running one, and whether that can be done live. Pure.

Models are matched by name, so their order says nothing. What a replica or a port was built with
stays for as long as it lives; such a change is refused with its key, not ignored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from cluster.base.errors import ConfigError
from cluster.base.load import ClusterFile
from cluster.base.problems import ClusterFileError, Problem, shown

_LIVE = frozenset(
    {
        "cluster.drain",
        "gateway.replicas",
        "gateway.limits.default_timeout",
        "gateway.limits.max_active_requests",
        "gateway.limits.max_prompt_tokens_waiting",
        "gateway.limits.max_resumes",
        "gateway.limits.resume_wait",
    }
)
_LIVE_OF_MODELS = frozenset(
    {"replicas", "tool_call_parser", "overflow", "overflow.to", "overflow.waiting"}
)
_PATHS = frozenset({"path", "offload.disk_path"})
_RENAME = (
    "give the entry another name: it starts beside the old one, which leaves when its entry is gone"
)
_RESTART = "end the cluster and start it again"
_ABSENT = object()


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One key with another value than what runs has."""

    param: str
    """Key path in the edited file."""
    label: str
    """The same with the model's name for its index."""
    before: str
    after: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """All that an edited file asks for; everything in here can be done live."""

    fields: tuple[Change, ...] = ()
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.fields or self.added or self.removed)

    def expect(self, only: str) -> None:
        """Refuse whatever goes beyond the one change of that label; empty: anything goes.

        Raises:
            ConfigError: the file holds other edits that were not applied.
        """
        others = [change.label for change in self.fields if change.label != only]
        others += [*self.added, *self.removed]
        if only and others:
            raise ConfigError(
                f"The cluster file has other edits too: {', '.join(others)}.",
                "Apply them first with `penstock apply FILE`, or take them back.",
            )


def compare(running: ClusterFile, edited: ClusterFile) -> Changes:
    """The difference.

    Raises:
        ClusterFileError: keys that cannot change while the cluster runs, each with its line.
    """
    old = {model.name: index for index, model in enumerate(running.spec.models)}
    new = {model.name: index for index, model in enumerate(edited.spec.models)}
    found = list(_top_changes(running, edited))
    for name, index in new.items():
        if name in old:
            found += _model_changes(running, old[name], edited, index)
    fixed = [(change, why) for change, why in found if why]
    if fixed:
        raise ClusterFileError([_problem(edited, change, why) for change, why in fixed])
    return Changes(
        fields=tuple(change for change, _ in found),
        added=tuple(name for name in new if name not in old),
        removed=tuple(name for name in old if name not in new),
    )


def _top_changes(running: ClusterFile, edited: ClusterFile) -> Iterator[tuple[Change, str]]:
    for section in ("cluster", "dashboard", "gateway"):
        before = _flat(getattr(running.spec, section), section)
        after = _flat(getattr(edited.spec, section), section)
        for key in _differing(before, after):
            change = Change(
                param=key,
                label=key,
                before=_text(running, key, before.get(key)),
                after=_text(edited, key, after.get(key)),
            )
            yield (
                change,
                "" if key in _LIVE else f"fixed since the start of the cluster; {_RESTART}",
            )


def _model_changes(
    running: ClusterFile, old: int, edited: ClusterFile, new: int
) -> Iterator[tuple[Change, str]]:
    name = edited.spec.models[new].name
    before = _flat_model(running, old)
    after = _flat_model(edited, new)
    for key in _differing(before, after):
        param = f"models[{new}].{key}"
        change = Change(
            param=param,
            label=f"{name}: {key}",
            before=_text(running, f"models[{old}].{key}", before.get(key)),
            after=_text(edited, param, after.get(key)),
        )
        is_live = key in _LIVE_OF_MODELS
        yield change, "" if is_live else f"every replica of {name} was built with it; {_RENAME}"


def _problem(edited: ClusterFile, change: Change, why: str) -> Problem:
    cause, _, remedy = why.partition("; ")
    return Problem(
        file=str(edited.path),
        line=edited.line_of(change.param),
        param=change.param,
        message=f"cannot change from {change.before} to {change.after}: {cause}",
        hint=remedy if remedy == _RESTART else f"{remedy}; or {_RESTART}",
    )


def _differing(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    for key in dict.fromkeys([*before, *after]):
        if before.get(key, _ABSENT) != after.get(key, _ABSENT):
            yield key


def _flat_model(file: ClusterFile, index: int) -> dict[str, Any]:
    fields = _flat(file.spec.models[index], "")
    for key in _PATHS & fields.keys():
        if isinstance(fields[key], str) and fields[key] != "auto":
            fields[key] = str((file.directory / Path(fields[key]).expanduser()).resolve())
    return fields


def _flat(section: BaseModel, prefix: str) -> dict[str, Any]:
    """Key paths and values of a section and those in it; a section left out is no key."""
    flat: dict[str, Any] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        key = f"{prefix}.{name}" if prefix else name
        if isinstance(value, BaseModel):
            flat |= _flat(value, key)
        elif value is not None:
            flat[key] = value
    return flat


def _text(file: ClusterFile, param: str, value: Any) -> str:
    """The value as the file has it; where it leaves the key out, what that means."""
    written = file.written(param)
    if written is not None:
        return shown(written).strip('"')
    if value is None:
        return "nothing"
    return str(value) if isinstance(value, (int, str)) else "its default"
