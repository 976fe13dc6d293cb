"""What `make ops` says of the kernels it compiles ahead."""

from __future__ import annotations

import pytest

from cluster.base.errors import ConfigError
from replicas.kernels import ahead
from replicas.kernels.cpu_ops import CpuKernels


def test_kernels_that_are_there_are_told(
    cpu_kernels: CpuKernels, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ahead.main() == 0
    assert capsys.readouterr().out == "kernels: built\n"


def test_a_reason_is_told_where_there_is_no_compiler(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise ConfigError("The compiled kernels cannot run here: there is no C++ compiler.")

    monkeypatch.setattr(ahead, "select_kernels", refuse)
    assert ahead.main() == 1
    assert "not available, because The compiled kernels" in capsys.readouterr().out
