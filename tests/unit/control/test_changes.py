"""What an edit of a cluster file may change of a running cluster, key by key."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.base.errors import ConfigError
from cluster.base.load import parse_cluster_text
from cluster.base.problems import ClusterFileError
from cluster.base.spec import ClusterSpec, ModelSpec
from cluster.control.changes import compare

BASE = """
cluster: {name: c, drain: 20s}
models:
  - {name: a, path: ckpt}
  - name: b
    path: ckpt
    replicas: 2
    limits: {max_context: 100}
"""


@pytest.fixture(scope="module")
def parse(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    (folder / "ckpt").mkdir()
    return lambda text: parse_cluster_text(text, folder / "c.yaml")


def labels(changes):
    return [(change.label, change.before, change.after) for change in changes.fields]


def test_the_same_meaning_in_other_words_is_no_change(parse):
    other = """
cluster: {drain: 20000ms, name: c}
models:   # in another order
  - {name: b, path: ./ckpt, replicas: 0x2, limits: {max_context: 100}}
  - {path: ckpt/../ckpt, name: a, dtype: auto, kv_cache: {}}
"""
    assert not compare(parse(BASE), parse(other))


def test_what_can_change_live(parse):
    text = BASE.replace("replicas: 2", "replicas: 3").replace("20s", "5s")
    text = text.replace("name: a, path: ckpt", "name: a, path: ckpt, overflow: {to: b}")
    text = text.replace("    replicas: 3", "    replicas: 3\n    tool_call_parser: hermes")
    text += "gateway: {replicas: 2, limits: {max_active_requests: 9, default_timeout: 5m}}\n"
    assert labels(compare(parse(BASE), parse(text))) == [
        ("cluster.drain", "20s", "5s"),
        ("gateway.replicas", "1", "2"),
        ("gateway.limits.max_active_requests", "auto", "9"),
        ("gateway.limits.default_timeout", "its default", "5m"),
        ("a: overflow.to", "nothing", "b"),
        ("a: overflow.waiting", "nothing", "auto"),
        ("b: tool_call_parser", "auto", "hermes"),
        ("b: replicas", "2", "3"),
    ]


def test_models_come_and_go_by_name(parse):
    changes = compare(parse(BASE), parse(BASE.replace("name: b", "name: z")))
    assert (changes.added, changes.removed, changes.fields) == (("z",), ("b",), ())


@pytest.mark.parametrize(
    ("old", "new", "line", "param"),
    [
        ("max_context: 100", "max_context: 200", 8, "models[1].limits.max_context"),
        ("name: a,", "dtype: bfloat16, name: a,", 4, "models[0].dtype"),
        ("name: a,", "speculation: {method: none}, name: a,", 4, "models[0].speculation.method"),
        ("name: c,", "name: d,", 2, "cluster.name"),
        ("models:", "dashboard: {port: 9}\nmodels:", 3, "dashboard.port"),
        ("models:", "gateway: {http_port: 9}\nmodels:", 3, "gateway.http_port"),
        ("models:", "gateway: {limits: {max_stop_strings: 9}}\nmodels:", 3,
         "gateway.limits.max_stop_strings"),
    ],
)  # fmt: skip
def test_what_cannot_is_refused_with_line_key_and_a_way_out(parse, old, new, line, param):
    with pytest.raises(ClusterFileError) as refused:
        compare(parse(BASE), parse(BASE.replace(old, new)))
    found = {problem.param: problem for problem in refused.value.problems}
    assert found[param].line == line
    assert "end the cluster and start it again" in found[param].hint
    assert ("another name" in found[param].hint) == param.startswith("models")


def test_every_refused_key_is_told_at_once(parse):
    text = BASE.replace("max_context: 100", "max_context: 9, max_step_tokens: 9")
    with pytest.raises(ClusterFileError) as refused:
        compare(parse(BASE), parse(text))
    assert [problem.param for problem in refused.value.problems] == [
        "models[1].limits.max_context",
        "models[1].limits.max_step_tokens",
    ]


def test_scale_refuses_edits_that_nobody_applied(parse):
    changes = compare(parse(BASE), parse(BASE.replace("replicas: 2", "replicas: 3")))
    changes.expect("b: replicas")
    changes.expect("")
    with pytest.raises(ConfigError, match="b: replicas"):
        changes.expect("a: replicas")


@given(st.lists(st.sampled_from("abcdef"), unique=True, min_size=1),
       st.lists(st.sampled_from("abcdef"), unique=True, min_size=1),
       st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 4)))  # fmt: skip
def test_each_model_is_added_removed_or_compared_once(parse, old, new, counts):
    def file(names, replicas):
        models = [ModelSpec(name=n, path="ckpt", replicas=replicas.get(n, 1)) for n in names]
        text = "models:\n" + "".join(
            f"  - {{name: {model.name}, path: ckpt, replicas: {model.replicas}}}\n"
            for model in models
        )
        parsed = parse(text)
        assert isinstance(parsed.spec, ClusterSpec)
        return parsed

    changes = compare(file(old, {}), file(new, counts))
    assert set(changes.added) == set(new) - set(old)
    assert set(changes.removed) == set(old) - set(new)
    scaled = {name for name in set(old) & set(new) if counts.get(name, 1) != 1}
    assert {change.label for change in changes.fields} == {f"{name}: replicas" for name in scaled}
