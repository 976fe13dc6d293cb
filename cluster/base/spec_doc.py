"""The reference page of the cluster file, written from the spec: `python -m cluster.base.spec_doc`.

A test compares the page in docs/ with what this renders, so the page cannot fall behind.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from pydantic.fields import FieldInfo

from cluster.base.amount_text import duration_text, size_text
from cluster.base.findings import section_of
from cluster.base.quantities import Duration, Size
from cluster.base.rules import Rule
from cluster.base.section import Section
from cluster.base.spec import ClusterSpec

_HEAD = """# The cluster file

One YAML file describes a cluster: what is served, how it is split, what is accepted. This page is
generated from `cluster/base/spec.py` and its sections by
`python -m cluster.base.spec_doc > docs/cluster-yaml.md`.

```yaml
models:
  - name: demo-dense
    path: models/demo-dense
    replicas: 2
    parallel: {tp: 2}
```

- `penstock validate FILE` checks the file alone; `penstock plan FILE --explain` also looks into the
  checkpoints and at the machine, and says what every `auto` became and why.
- `penstock apply FILE` brings a running cluster to the edited file. These keys can change live:
  `models` (entries come and go, in any order), `models[].replicas`, `models[].overflow`,
  `models[].tool_call_parser`, `gateway.replicas`, `cluster.drain` and of `gateway.limits`
  `max_active_requests`, `max_prompt_tokens_waiting`, `default_timeout`, `max_resumes` and
  `resume_wait`. All others are refused with their line.
- Unknown keys, keys written twice and values of the wrong type are errors; all of them are
  reported at once, each with its line.
- Plain words mean what YAML 1.2 says: `no` and `on` are text. Tags (`!...`) are refused; anchors,
  aliases and `<<` merges work. One document per file, UTF-8, at most 256 KiB.
- Sizes are bytes or have a unit (`256MiB`, `2GB`); durations need one (`10s`, `500ms`, `2m`).
"""


def render() -> str:
    """The whole page, Markdown."""
    return _HEAD + "".join(_section(ClusterSpec, ""))


def _section(section: type[Section], prefix: str) -> Iterator[str]:
    """The table of one mapping, then those of the mappings in it."""
    title = f"`{prefix}`" if prefix else "Top level"
    doc = (section.__doc__ or "").strip().splitlines()[0]
    yield f"\n## {title}\n\n{doc}\n\n| key | value | default | meaning |\n|---|---|---|---|\n"
    nested: list[tuple[type[Section], str]] = []
    for key, field in section.model_fields.items():
        inner = section_of(section, key)
        if inner is not None:
            nested.append((inner, _path(prefix, key, field)))
        yield f"| `{key}` | {_allowed(field, inner)} | {_default(field)} | {_cell(field)} |\n"
    for key, reason in section.later_keys.items():
        yield f"\n`{key}` is refused: {reason}.\n"
    for inner, path in nested:
        yield from _section(inner, path)


def _path(prefix: str, key: str, field: FieldInfo) -> str:
    name = f"{prefix}.{key}" if prefix else key
    return f"{name}[]" if _is_list(field) else name


def _is_list(field: FieldInfo) -> bool:
    return getattr(field.annotation, "__origin__", None) is tuple


def _cell(field: FieldInfo) -> str:
    return (field.description or "").replace("|", "\\|")


def _allowed(field: FieldInfo, inner: type[Section] | None) -> str:
    if inner is not None:
        return "list of mappings" if _is_list(field) else "mapping"
    rule = _rule(field)
    return rule.allowed if rule is not None else ""


def _rule(field: FieldInfo) -> Rule | None:
    return next((item for item in field.metadata if isinstance(item, Rule)), None)


def _default(field: FieldInfo) -> str:
    value = field.default
    if field.is_required():
        return "required"
    if value is None or isinstance(value, Section):
        return ""
    rule = _rule(field)
    if isinstance(rule, Size) and isinstance(value, int):
        return f"`{size_text(value)}`"
    if isinstance(rule, Duration) and isinstance(value, float):
        return f"`{duration_text(value)}`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


if __name__ == "__main__":
    sys.stdout.write(render())
