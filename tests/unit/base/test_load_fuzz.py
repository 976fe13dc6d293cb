"""Whatever the bytes, loading gives a spec or a `ClusterFileError`, and quickly."""

from __future__ import annotations

from pathlib import Path

import pytest
from bad_cluster_files import MODEL, UNREADABLE, WRONG
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cluster.base.load import ClusterFile, load_cluster_file, parse_cluster_text
from cluster.base.problems import ClusterFileError

GOOD = (
    "cluster: {name: demo}\n"
    "gateway:\n  host: 127.0.0.1\n  limits: {max_message: 4MiB, default_timeout: 10m}\n"
    + MODEL
    + "    parallel: &p {tp: 2}\n    kv_cache: {memory: 256MiB, prefix_caching: true}\n"
    "    limits:\n      step_timeout: 10s\n      max_context: auto\n"
)
SNIPPETS = [
    *"\t\n:-[]{}&*!|>'\"%@`#,?~\\\x00\x85\u2028\ud800\U0001f600",
    "<<: *p", "!!python/object:os.x", "&a", "*a", "---\n", "...\n", "%YAML 9.9\n", '"\\UFFFFFFFF"',
    "? ", ".nan", "-.inf", "1e999", "9" * 400, "0x" + "f" * 60, "null", "true", "auto", "[" * 50,
]  # fmt: skip

mutations = st.lists(
    st.tuples(
        st.integers(0, len(GOOD)),
        st.integers(0, 6),
        st.one_of(st.sampled_from(SNIPPETS), st.text(max_size=4)),
    ),
    min_size=1,
    max_size=6,
)


def _outcome(text: str) -> ClusterFile | ClusterFileError:
    try:
        return parse_cluster_text(text, Path("c.yaml"))
    except ClusterFileError as refusal:
        error = refusal
    assert error.problems
    assert all(line.isprintable() for line in error.cause.splitlines())
    return error


@given(mutations)
@settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow])
@example([(0, 0, '"\\UFFFFFFFF": 1\n')])
def test_mutated_text(changes: list[tuple[int, int, str]]):
    text = GOOD
    for position, removed, inserted in changes:
        text = text[:position] + inserted + text[position + removed :]
    _outcome(text)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=6,
)


@given(
    st.sampled_from([bad.text for bad in WRONG + UNREADABLE] + [GOOD]),
    st.integers(0, 1000),
    json_values,
)
@settings(max_examples=150)
def test_any_value_behind_any_key(text: str, choice: int, value: object):
    lines = text.splitlines()
    keys = [index for index, line in enumerate(lines) if ":" in line]
    if keys:
        index = keys[choice % len(keys)]
        lines[index] = f"{lines[index].partition(':')[0]}: {value!r}"
    _outcome("\n".join(lines))


@given(st.binary(max_size=200))
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes(tmp_path: Path, data: bytes):
    file = tmp_path / "c.yaml"
    file.write_bytes(data)
    with pytest.raises(ClusterFileError):
        load_cluster_file(file)


def test_the_unmutated_text_is_good():
    assert isinstance(_outcome(GOOD), ClusterFile)
