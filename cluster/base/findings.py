"""What is wrong with a parsed cluster file, in this project's words.

Two sources: pydantic's errors on the fields, and checks across keys (names and ports used twice,
paths that are not there). The latter read the raw data, so that they are reported beside the
former. Pure but for looking whether directories exist.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from cluster.base.engine_spec import SpeculationSpec
from cluster.base.front_spec import DashboardSpec, GatewaySpec
from cluster.base.problems import shown
from cluster.base.section import Section
from cluster.base.spec import ClusterSpec

Loc = tuple[int | str, ...]

_PORT_KEYS: tuple[tuple[str, str, type[Section]], ...] = (
    ("gateway", "grpc_port", GatewaySpec),
    ("gateway", "http_port", GatewaySpec),
    ("dashboard", "port", DashboardSpec),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something wrong at a place in the tree."""

    loc: Loc
    message: str
    hint: str = ""


def field_findings(error: ValidationError) -> list[Finding]:
    """What pydantic found wrong with single fields."""
    return [
        _field_finding(detail)
        for detail in error.errors(include_url=False)
        # pydantic calls a list too short when its entries are wrong; they speak themselves.
        if not (detail["type"] == "too_short" and detail["input"])
    ]


def _field_finding(detail: ErrorDetails) -> Finding:
    loc, value, kind = detail["loc"], detail["input"], detail["type"]
    message, hint = detail["msg"], ""
    match kind:
        case "extra_forbidden":
            message, hint = _unknown_key(loc)
        case "missing":
            message = "is required"
        case "model_type" | "model_attributes_type" | "dict_type":
            message = f"must be a mapping of keys, got {shown(value)}"
            hint = "keys: " + ", ".join(_section_at(loc).model_fields)
        case "tuple_type":
            message = f"must be a list, got {shown(value)}"
            hint = "start each entry with a dash: `- name: ...`"
        case "too_short":
            message = "is empty; at least one is needed"
        case "too_long":
            message = "has too many entries; at most 32 are allowed"
    if value is None and kind not in ("missing", "extra_forbidden"):
        allowed = message.partition("; ")[2]
        message = f"has no value; {allowed}" if allowed else "has no value"
        hint = hint or "leave the key out to get its default"
    return Finding(loc=loc, message=message, hint=hint)


def _unknown_key(loc: Loc) -> tuple[str, str]:
    section = _section_at(loc[:-1])
    key = str(loc[-1])
    if reason := section.later_keys.get(key):
        return reason, ""
    known = list(section.model_fields)
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    hint = f"did you mean `{nearest[0]}`?" if nearest else "known keys: " + ", ".join(known)
    return "unknown key", hint


def _section_at(loc: Loc) -> type[Section]:
    """The spec class of the mapping at `loc`."""
    section: type[Section] = ClusterSpec
    for part in loc:
        if isinstance(part, str):
            section = section_of(section, part) or section
    return section


def section_of(section: type[Section], key: str) -> type[Section] | None:
    """The spec class behind a key, or None when the key holds a single value."""
    annotation: Any = section.model_fields[key].annotation if key in section.model_fields else None
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None


# Checks across keys, on the raw data so that they run beside field errors.


def cross_findings(data: Mapping[str, Any], directory: Path) -> Iterator[Finding]:
    """What is wrong between keys; values of wrong types are left to the field errors."""
    yield from _port_findings(data)
    models = data.get("models")
    if not isinstance(models, list):
        return
    first_use: dict[str, int] = {}
    for index, model in enumerate(models):
        if not isinstance(model, dict):
            continue
        name = model.get("name")
        if isinstance(name, str) and first_use.setdefault(name, index) != index:
            message = f"{shown(name)} is already the name of models[{first_use[name]}]"
            hint = "every model needs a name of its own"
            yield Finding(loc=("models", index, "name"), message=message, hint=hint)
        yield from _source_findings(model, index, directory)
        engine = model.get("engine", "auto")
        if "offload" in model and engine not in ("auto", "offload"):
            message = f"`offload` has no effect with `engine: {shown(engine)[1:-1]}`"
            hint = "delete it, or set `engine: offload`"
            yield Finding(loc=("models", index, "offload"), message=message, hint=hint)
        yield from _speculation_findings(model, index)


def _speculation_findings(model: Mapping[str, Any], index: int) -> Iterator[Finding]:
    section = model.get("speculation")
    if not isinstance(section, dict):
        return
    loc: Loc = ("models", index, "speculation")
    others = [key for key in section if key != "method"]
    if section.get("method") == "none" and others:
        message = f"`{others[0]}` has no effect with `method: none`"
        yield Finding(loc=(*loc, others[0]), message=message, hint="delete it, or the method")
    keys = ("prompt_lookup_min", "prompt_lookup_max")
    shortest, longest = (
        section.get(key, SpeculationSpec.model_fields[key].default) for key in keys
    )
    if isinstance(shortest, int) and isinstance(longest, int) and shortest > longest:
        key = keys[1] if keys[1] in section else keys[0]
        message = f"prompt_lookup_min {shortest} is more than prompt_lookup_max {longest}"
        yield Finding(loc=(*loc, key), message=message, hint="set both")


def _port_findings(data: Mapping[str, Any]) -> Iterator[Finding]:
    """Ports used twice; the complaint goes to a written key rather than to a default."""
    ports: list[tuple[bool, int, str, str]] = []
    for section, key, spec in _PORT_KEYS:
        mapping = data.get(section, {})
        if isinstance(mapping, dict):
            port = mapping.get(key, spec.model_fields[key].default)
            if isinstance(port, int) and not isinstance(port, bool):
                ports.append((key in mapping, port, section, key))
    seen: dict[int, str] = {}
    for _, port, section, key in sorted(ports, key=lambda item: item[0]):
        name = f"{section}.{key}"
        other = seen.setdefault(port, name)
        if other != name:
            message = f"port {port} is also {other}"
            yield Finding(loc=(section, key), message=message, hint="give each its own port")


def _source_findings(model: Mapping[str, Any], index: int, directory: Path) -> Iterator[Finding]:
    loc: Loc = ("models", index)
    if "path" not in model and "repo" not in model:
        yield Finding(loc=loc, message="needs `path` (a directory) or `repo` (org/name)")
    if "path" in model and "repo" in model:
        message = "`path` and `repo` exclude each other"
        yield Finding(loc=(*loc, "repo"), message=message, hint="keep one")
    if "revision" in model and "repo" not in model:
        hint = "delete it, or use `repo`"
        yield Finding(loc=(*loc, "revision"), message="`revision` belongs to `repo`", hint=hint)
    path = model.get("path")
    if isinstance(path, str) and 0 < len(path) <= 4096 and path.isprintable():
        yield from _path_findings((*loc, "path"), path, directory)


def _path_findings(loc: Loc, path: str, directory: Path) -> Iterator[Finding]:
    full = directory / Path(path)
    try:
        if full.is_dir():
            return
        kind = "is a file, not a directory" if full.exists() else "does not exist"
    except (OSError, ValueError):
        kind = "is not a usable path"
    hint = f"looked at {shown(str(full), limit=200)[1:-1]}"
    yield Finding(loc=loc, message=f"{shown(path)} {kind}", hint=hint)
