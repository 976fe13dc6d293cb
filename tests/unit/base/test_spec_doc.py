"""The reference page of the cluster file is what the spec says today."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from cluster.base.findings import section_of
from cluster.base.rules import Rule
from cluster.base.section import Section
from cluster.base.spec import ClusterSpec
from cluster.base.spec_doc import render

PAGE = Path(__file__).parents[3] / "docs" / "cluster-yaml.md"


def _sections(section: type[Section]) -> Iterator[type[Section]]:
    yield section
    for key in section.model_fields:
        inner = section_of(section, key)
        if inner is not None:
            yield from _sections(inner)


def test_the_page_is_up_to_date():
    assert PAGE.read_text() == render(), (
        "run: python -m cluster.base.spec_doc > docs/cluster-yaml.md"
    )


def test_every_key_has_a_description_and_a_rule():
    for section in _sections(ClusterSpec):
        for key, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{key}"
            is_mapping = section_of(section, key) is not None
            has_rule = any(isinstance(item, Rule) for item in field.metadata)
            assert has_rule or is_mapping, f"{section.__name__}.{key}"
            assert f"| `{key}` |" in render()
