"""Replicas are set in the text of a cluster file, and nothing else of it changes."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.base.errors import ConfigError
from cluster.base.load import parse_cluster_text
from cluster.base.problems import ClusterFileError
from cluster.base.yaml_edit import set_replicas

FILE = Path("c.yaml")


@pytest.fixture(autouse=True)
def _checkpoint(tmp_path, monkeypatch):
    (tmp_path / "ckpt").mkdir()
    monkeypatch.chdir(tmp_path)


def edited(text: str, model: str = "m", replicas: int = 3) -> str:
    return set_replicas(text, FILE, model, replicas)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("models:\n- name: m # x\n  path: ckpt\n",
         "models:\n- name: m # x\n  replicas: 3\n  path: ckpt\n"),
        ("models:\n- path: ckpt\n  name: m", "models:\n- path: ckpt\n  name: m\n  replicas: 3\n"),
        ("models: [{name: m, path: ckpt}]", "models: [{name: m, replicas: 3, path: ckpt}]"),
        ("models:\n  - {path: ckpt, replicas:  0x2 , name: m} # why\n",
         "models:\n  - {path: ckpt, replicas:  3 , name: m} # why\n"),
        ("models:\r\n- name: m\r\n  path: ckpt\r\n",
         "models:\r\n- name: m\r\n  replicas: 3\r\n  path: ckpt\r\n"),
        ("models:\n- &a\n  path: ckpt\n  replicas: 2\n  name: x\n- <<: *a\n  name: m\n",
         "models:\n- &a\n  path: ckpt\n  replicas: 2\n  name: x\n- <<: *a\n  name: m\n"
         "  replicas: 3\n"),
    ],
)  # fmt: skip
def test_only_the_value_changes_or_one_line_comes(text, wanted):
    assert edited(text) == wanted


@pytest.mark.parametrize(
    "text",
    [
        "models:\n- {name: x, path: ckpt, replicas: &n 2}\n- {name: m, path: ckpt, replicas: *n}\n",
        "models:\n- {name: m, path: ckpt, replicas: &n 2}\n- {name: x, path: ckpt, replicas: *n}\n",
    ],
)
def test_what_other_entries_share_is_left_to_the_user(text):
    with pytest.raises(ConfigError, match="not edited here") as refused:
        edited(text)
    assert "replicas: 3" in refused.value.remedy


def test_unknown_models_and_impossible_numbers_are_refused():
    text = "models:\n- {name: m, path: ckpt}\n"
    with pytest.raises(ConfigError, match="no model named 'q'"):
        edited(text, "q")
    with pytest.raises(ClusterFileError, match="replicas"):
        edited(text, replicas=0)


@given(st.lists(st.sampled_from(["", "    # note\n", "    replicas: 2\n", "    dtype: float32\n"]),
                unique=True), st.integers(1, 256), st.booleans())  # fmt: skip
def test_the_edit_is_what_the_file_then_says(lines, replicas, second):
    entry = "  - name: m\n    path: ckpt\n" + "".join(lines)
    other = "  - {name: x, path: ckpt}\n"
    text = "models:\n" + (other + entry if second else entry + other) + "# end\n"
    result = edited(text, replicas=replicas)
    (model,) = [m for m in parse_cluster_text(result, FILE).spec.models if m.name == "m"]
    assert model.replicas == replicas
    assert edited(result, replicas=replicas) == result
    kept = [line for line in text.splitlines() if "replicas" not in line]
    assert [line for line in result.splitlines() if "replicas" not in line] == kept
