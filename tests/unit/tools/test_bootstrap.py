"""Setup and lock helpers: the messages and the pins."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest

from tools.bootstrap import follow, pinned_names, why_not_python
from tools.lock import pins

ROOT = Path(__file__).parents[3]


def test_an_old_python_is_refused_with_a_remedy() -> None:
    reason = why_not_python((3, 9, 2), "/usr/bin/python3")
    assert "3.11 or newer; /usr/bin/python3 is 3.9" in reason
    assert "PYTHON=" in reason
    assert why_not_python((3, 11, 0), "python3") == ""
    assert why_not_python((3, 14, 1), "python3") == ""


def test_pins_drop_build_labels_and_accelerator_packages() -> None:
    names = [
        ("torch", "2.13.0+cpu"),
        ("nvidia-cublas-cu12", "12.1"),
        ("nvidia-nccl-cu13", "2.29"),
        ("A_b", "1"),
    ]
    report = {"install": [{"metadata": {"name": n, "version": v}} for n, v in names]}
    assert pins(report) == ["a-b==1", "torch==2.13.0"]


def test_the_committed_lock_pins_every_line() -> None:
    lock = ROOT / "requirements.lock"
    lines = [line for line in lock.read_text().splitlines() if not line.startswith("#")]
    assert all(len(line.split("==")) == 2 for line in lines)
    assert len(pinned_names(str(lock))) == len(lines)
    assert "torch==2.13.0" in lines


def test_pip_output_becomes_one_line_per_pinned_package(capsys: pytest.CaptureFixture[str]) -> None:
    log = io.StringIO()
    lines = [
        "Collecting Torch==2 (from x)\n",
        "Collecting other\n",
        "Processing /cache/typing_extensions-4.16-py3-none-any.whl (from y)\n",
        "Collecting torch\n",
        "Installing collected packages: torch\n",
        "Successfully installed torch\n",
    ]
    follow(iter(lines), log, {"torch", "typing-extensions", "ray"})
    assert capsys.readouterr().out == "  found 1/3 torch\n  found 2/3 typing-extensions\n"
    assert log.getvalue().splitlines(keepends=True) == lines[:5]


def test_a_failing_pip_ends_setup_with_its_output(tmp_path: Path) -> None:
    lock = tmp_path / "broken.lock"
    lock.write_text("not a requirement ==\n")
    stamp = tmp_path / "stamp"
    result = subprocess.run(
        [
            *(sys.executable, str(ROOT / "tools" / "bootstrap.py")),
            *("--venv", str(tmp_path / "venv"), "--lock", str(lock), "--stamp", str(stamp)),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 1
    assert "Invalid requirement" in result.stderr
    assert "install.log" in result.stderr
    assert not stamp.exists()
