"""House rules on text files and on the whole tree, and the runner that puts them together."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tools.checks import hygiene, links, texts
from tools.checks.__main__ import run
from tools.checks.source import Severity, Source, repository_sources

ROOT = Path(__file__).parents[3]
SLASH = "/"


@pytest.mark.parametrize(
    "line",
    [
        f"path = '{SLASH}work/main/file'",
        f"see {SLASH}home/alice/penstock",
        f"{SLASH}Users/bob/x/y",
        f"{SLASH}root/.cache/x",
        "pip install --index" + "-url=somewhere torch",
        "https://" + "artifactory.example/simple",
        "from files.python" + "hosted.org",
    ],
)
def test_machine_and_registry_words_are_errors(line: str) -> None:
    assert len(list(texts.check(Source("docs/a.md", f"ok\n{line}\n")))) == 1


@pytest.mark.parametrize(
    "line",
    ["cluster/work/entry.py", "https://example.com/work/hours", "~/models/llama", "/tmp/x/y"],
)
def test_ordinary_paths_pass(line: str) -> None:
    assert list(texts.check(Source("docs/a.md", line))) == []


@pytest.mark.parametrize(
    ("text", "caught"),
    [
        ("one\n" + "<" * 7 + " HEAD\n", "merge marker"),
        ("=" * 7 + "\n", "merge marker"),
        ("one \n", "trailing whitespace"),
        ("one\t\r\n", "trailing whitespace"),
        ("one", "a file ends with exactly one newline"),
        ("one\n\n", "a file ends with exactly one newline"),
    ],
)
def test_untidy_files_are_errors(text: str, caught: str) -> None:
    assert [finding.message for finding in hygiene.check(Source("docs/a.md", text))] == [caught]


def test_tidy_files_pass_and_large_ones_do_not() -> None:
    assert list(hygiene.check(Source("moe/a.py", "x = 1\n"))) == []
    assert list(hygiene.check(Source("moe/__init__.py", ""))) == []
    assert len(list(hygiene.check(Source("data.json", "1" * 500_001)))) == 1


def test_links_must_lead_somewhere() -> None:
    page = Source("docs/a.md", "[b](b.md) [up](../README.md#x) [dir](../docs) [web](https://x.y/z)")
    broken = Source("docs/c.md", "one\n[gone](missing.md)\n")
    sources = [page, broken, Source("docs/b.md", ""), Source("README.md", "")]
    found = list(links.check_all(sources))
    assert [(finding.path, finding.line) for finding in found] == [("docs/c.md", 2)]


def test_names_resolve_aliases() -> None:
    source = Source("a.py", "import torch.nn as nn\nfrom os import path as p\nnn.Linear\np.join")
    assert {"torch.nn.Linear", "os.path.join"} <= {name for _, name in source.names}


def test_the_runner_reports_broken_python_and_goes_on() -> None:
    found = run([Source("moe/a.py", "def (\n"), Source("moe/utils.py", "")])
    assert [finding.path for finding in found] == ["moe/a.py", "moe/utils.py"]
    assert all(finding.severity is Severity.ERROR for finding in found)


def test_sources_outside_a_checkout_are_all_visible_files(tmp_path: Path) -> None:
    (tmp_path / "moe").mkdir()
    (tmp_path / "moe" / "gating.py").write_text("x = 1\n")
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "junk.py").write_text("x = 1\n")
    (tmp_path / "image.bin").write_bytes(b"\xff\xfe\x00")
    assert [source.path for source in repository_sources(tmp_path)] == ["moe/gating.py"]


def test_the_command_fails_on_an_error(tmp_path: Path) -> None:
    (tmp_path / "utils.py").write_text("x = 1\n")
    command = [sys.executable, "-m", "tools.checks"]
    result = subprocess.run(
        command,
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 1
    assert "utils.py:1: error" in result.stdout
