"""Cluster files: the good ones give a spec, the bad ones every problem with its line."""

from __future__ import annotations

from pathlib import Path

import pytest
from bad_cluster_files import MODEL, UNREADABLE, WRONG, BadFile

from cluster.base.errors import ConfigError
from cluster.base.load import load_cluster_file, parse_cluster_text
from cluster.base.problems import MAX_PROBLEMS, ClusterFileError


def _refusal(tmp_path: Path, text: str | bytes) -> ClusterFileError:
    file = tmp_path / "cluster.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ClusterFileError) as caught:
        load_cluster_file(file)
    return caught.value


@pytest.mark.parametrize("bad", UNREADABLE + WRONG, ids=lambda bad: bad.name)
def test_bad_file_names_line_key_and_remedy(bad: BadFile, tmp_path: Path):
    error = _refusal(tmp_path, bad.text)
    matching = [p for p in error.problems if p.param == bad.param and p.line == bad.line]
    assert matching, f"wanted line {bad.line} {bad.param!r}, got: {error}"
    for words in bad.says:
        assert any(words in str(problem) for problem in matching), f"{words!r} not in {error}"
    expected_place = f"cluster.yaml:{bad.line}: " if bad.line else "cluster.yaml: "
    assert expected_place in str(matching[0])
    assert all(line.isprintable() for line in error.cause.splitlines())


@pytest.mark.parametrize(
    "bad",
    [bad for bad in WRONG if bad.name != "unknown nested key"],
    ids=lambda bad: bad.name,
)
def test_one_mistake_gives_one_problem(bad: BadFile, tmp_path: Path):
    problems = _refusal(tmp_path, bad.text).problems
    assert len(problems) == 1, [str(problem) for problem in problems]


def test_every_problem_is_reported_at_once_in_order_of_lines(tmp_path: Path):
    error = _refusal(
        tmp_path,
        "cluster: {name: UPPER}\n"
        "models:\n"
        "  - name: a\n"
        "    repo: org/a\n"
        "    replicas: none\n"
        "    parallel: {tp: 0}\n"
        "  - name: a\n"
        "    repo: org/a\n"
        "    repo: org/b\n"
        "    limits: {max_contxt: 5}\n"
        "gateway: {grpc_port: 8000}\n",
    )
    assert [(problem.line, problem.param) for problem in error.problems] == [
        (1, "cluster.name"),
        (5, "models[0].replicas"),
        (6, "models[0].parallel.tp"),
        (7, "models[1].name"),
        (9, ""),
        (10, "models[1].limits.max_contxt"),
        (11, "gateway.grpc_port"),
    ]
    assert error.cause.count("\n") == 6


def test_problems_past_the_bound_are_counted(tmp_path: Path):
    lines = "".join(f"    key{i}: 1\n" for i in range(MAX_PROBLEMS + 7))
    error = _refusal(tmp_path, MODEL + lines)
    assert len(error.problems) == MAX_PROBLEMS
    assert "and 7 more problems" in error.cause


@pytest.mark.parametrize(
    ("data", "line", "words"),
    [
        (b"models: \xff\xfe\n", 1, "not UTF-8"),
        (b"a: 1\nb: \xc3(\n", 2, "not UTF-8"),
        (b"\x00" * 10, 1, "control character"),
        (b"#" + b"x" * (256 * 1024), 0, "larger than 256 KiB"),
    ],
)
def test_bytes_that_are_no_text(data: bytes, line: int, words: str, tmp_path: Path):
    (problem,) = _refusal(tmp_path, data).problems
    assert problem.line == line
    assert words in str(problem)


def test_missing_file_and_directory(tmp_path: Path):
    with pytest.raises(ConfigError, match="no such file"):
        load_cluster_file(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="is a directory"):
        load_cluster_file(tmp_path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_cluster_file("a\0b")


def test_defaults_and_name_from_the_file(tmp_path: Path):
    file = tmp_path / "My Cluster_2.yaml"
    file.write_text(MODEL)
    spec = load_cluster_file(file).spec
    assert spec.cluster.name == "my-cluster-2"
    assert (spec.gateway.grpc_port, spec.gateway.http_port, spec.dashboard.port) == (
        50051,
        8000,
        8265,
    )
    (model,) = spec.models
    assert (model.replicas, model.parallel.tp, model.device, model.dtype) == (1, 1, "auto", "auto")
    assert model.kv_cache.memory == "auto"
    assert model.limits.step_timeout == 10.0
    assert spec.gateway.limits.max_message == 4 * 2**20


def test_written_values_arrive(tmp_path: Path):
    (tmp_path / "weights").mkdir()
    file = tmp_path / "c.yaml"
    file.write_text(
        "cluster: {name: demo}\n"
        "gateway: {host: '::1', replicas: 3, limits: {max_message: 1MB, default_timeout: 90s}}\n"
        "models:\n"
        "  - name: no\n"
        "    path: weights\n"
        "    replicas: 010\n"
        "    parallel: {tp: 0x4}\n"
        "    kv_cache: {memory: 1.5 GiB, prefix_caching: False}\n"
        "    limits: {max_context: 4096, step_timeout: 250ms}\n"
        "    resources: {threads_per_rank: 2, cpus_per_rank: 0.5}\n"
    )
    spec = load_cluster_file(file).spec
    (model,) = spec.models
    assert model.name == "no"
    assert model.path == "weights"
    assert (model.replicas, model.parallel.tp) == (10, 4)
    assert model.kv_cache.memory == 3 * 2**29
    assert model.kv_cache.prefix_caching is False
    assert model.limits.step_timeout == 0.25
    assert model.resources.cpus_per_rank == 0.5
    assert spec.gateway.limits.max_message == 10**6
    assert spec.gateway.limits.default_timeout == 90.0


def test_anchors_and_merges_unfold():
    file = parse_cluster_text(
        "models:\n"
        "  - &base\n"
        "    name: a\n"
        "    repo: org/a\n"
        "    kv_cache: &kv {memory: 1GiB}\n"
        "  - <<: *base\n"
        "    name: b\n"
        "    kv_cache: *kv\n",
        Path("c.yaml"),
    )
    first, second = file.spec.models
    assert (second.name, second.repo) == ("b", "org/a")
    assert second.kv_cache == first.kv_cache


def test_line_of_finds_keys_and_nearest_parents():
    file = parse_cluster_text(MODEL + "    parallel:\n      tp: 2\n", Path("c.yaml"))
    assert file.line_of("models[0].parallel.tp") == 5
    assert file.line_of("models[0].limits.max_context") == 2
    assert file.line_of("models[0].repo") == 3
    assert file.line_of("gateway.host") == 1


def test_spec_is_frozen():
    spec = parse_cluster_text(MODEL, Path("c.yaml")).spec
    with pytest.raises(ValueError, match="frozen"):
        spec.models[0].replicas = 2


@pytest.mark.parametrize("name", ["demo.yaml", "two-replicas.yaml"])
def test_examples_are_valid(name: str):
    examples = Path(__file__).parents[3] / "examples"
    assert load_cluster_file(examples / name).spec.models[0].name == "demo-dense"
