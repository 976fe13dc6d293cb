"""The planner's refusals carry the line of the key at fault."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_checkpoints import write_checkpoint
from tokenizers import Tokenizer as BackendTokenizer
from tokenizers.models import WordLevel

from cluster.base.load import load_cluster_file
from cluster.base.problems import ClusterFileError
from cluster.dist.topology import Node, Topology
from cluster.planner.plan_file import plan_file

LAPTOP = Topology(nodes=(Node(node_id="n", host="n", cores=2, memory_bytes=16 * 2**30),))


def test_refusals_name_line_key_and_remedy(tmp_path: Path):
    write_checkpoint(tmp_path / "ckpt")
    file = tmp_path / "c.yaml"
    file.write_text("models:\n  - name: m\n    path: ckpt\n    parallel:\n      tp: 3\n")
    with pytest.raises(ClusterFileError) as caught:
        plan_file(load_cluster_file(file), LAPTOP)
    (problem,) = caught.value.problems
    assert (problem.line, problem.param) == (5, "models[0].parallel.tp")
    assert "Set tp to 2 or 4" in caught.value.remedy


def test_a_refusal_about_a_default_points_at_its_model(tmp_path: Path):
    write_checkpoint(tmp_path / "ckpt")
    (tmp_path / "ckpt" / "tokenizer.json").unlink()
    file = tmp_path / "c.yaml"
    file.write_text("models:\n  - name: m\n    path: ckpt\n")
    with pytest.raises(ClusterFileError, match=r"c\.yaml:3: models\[0\]\.path: .*tokenizer\.json"):
        plan_file(load_cluster_file(file), LAPTOP)


@pytest.mark.parametrize(
    ("name", "text", "cause"),
    [
        ("tokenizer.json", "{}", "not a valid tokenizer"),
        ("chat_template.jinja", "{% for %}", "chat template is not valid"),
        ("tokenizer_config.json", "[]", "must hold a JSON object"),
    ],
)
def test_what_gateways_could_not_read_is_refused(tmp_path: Path, name, text, cause):
    write_checkpoint(tmp_path / "ckpt")
    BackendTokenizer(WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "ckpt/tokenizer.json"))
    (tmp_path / "ckpt" / name).write_text(text)
    file = tmp_path / "c.yaml"
    file.write_text("models:\n  - name: m\n    path: ckpt\n")
    with pytest.raises(ClusterFileError, match=rf"c\.yaml:3: models\[0\]\.path: .*{cause}"):
        plan_file(load_cluster_file(file), LAPTOP)


def test_a_good_file_gives_a_plan(tmp_path: Path):
    write_checkpoint(tmp_path / "ckpt")
    BackendTokenizer(WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "ckpt/tokenizer.json"))
    file = tmp_path / "c.yaml"
    file.write_text("models:\n  - name: m\n    path: ckpt\n")
    assert plan_file(load_cluster_file(file), LAPTOP).name == "c"
