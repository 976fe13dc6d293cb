"""The library cache: built once, whole or not at all, and never a reason to stop."""

from __future__ import annotations

import logging
import multiprocessing
import shutil
from pathlib import Path

import pytest
import torch

from cluster.base.env import default_cache_dir
from cluster.base.errors import ConfigError
from cluster.base.file_lock import file_lock
from replicas.kernels import build, select, triton_ops
from replicas.kernels.build import BuildPlan, KernelsUnavailableError, build_library
from replicas.kernels.loader import CpuLibrary, TilesRefusedError
from replicas.kernels.select import select_kernels

SMALL = 'extern "C" int pk_abi() { return -1; }\n'
needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in build.COMPILERS), reason="there is no C++ compiler here"
)


def plan(folder: Path, text: str = SMALL, **changes: float) -> BuildPlan:
    """A library of one function, which compiles at once."""
    sources = folder / "sources"
    sources.mkdir(exist_ok=True)
    (sources / "small.cpp").write_text(text)
    return BuildPlan(compiler=build.find_compiler(), sources=sources, **changes)


def build_in_child(folder: Path, answers: multiprocessing.Queue) -> None:
    answers.put(str(build_library(plan(folder), folder / "cache")))


@needs_compiler
def test_second_build_is_the_first(tmp_path: Path) -> None:
    first = build_library(plan(tmp_path), tmp_path / "cache")
    changed_s = first.stat().st_mtime_ns
    assert build_library(plan(tmp_path), tmp_path / "cache") == first
    assert first.stat().st_mtime_ns == changed_s
    other = build_library(plan(tmp_path, SMALL + "// changed\n"), tmp_path / "cache")
    assert other != first


@needs_compiler
def test_a_damaged_library_is_built_again(tmp_path: Path) -> None:
    first = build_library(plan(tmp_path), tmp_path / "cache")
    whole = first.read_bytes()
    first.write_bytes(whole[: len(whole) // 2])
    again = build_library(plan(tmp_path), tmp_path / "cache")
    assert again.stem.endswith(build._digest(again))
    assert len(again.read_bytes()) == len(whole)


@needs_compiler
def test_two_processes_at_once_agree(tmp_path: Path) -> None:
    plan(tmp_path)
    context = multiprocessing.get_context("fork")
    answers: multiprocessing.Queue = context.Queue()
    children = [context.Process(target=build_in_child, args=(tmp_path, answers)) for _ in range(2)]
    for child in children:
        child.start()
    paths = {answers.get(timeout=60) for _ in children}
    for child in children:
        child.join(timeout=60)
        assert child.exitcode == 0
    assert len(paths) == 1
    assert len(list((tmp_path / "cache").glob("*.so"))) == 1


@needs_compiler
def test_a_left_over_lock_file_holds_nobody_up(tmp_path: Path) -> None:
    wanted = plan(tmp_path)
    (tmp_path / "cache").mkdir(mode=0o700)
    (tmp_path / "cache" / f"{wanted.key()}.lock").write_text("of a process that died")
    assert build_library(wanted, tmp_path / "cache").exists()


@needs_compiler
def test_a_stuck_holder_costs_the_deadline_only(tmp_path: Path) -> None:
    wanted = plan(tmp_path, lock_timeout_s=0.2)
    (tmp_path / "cache").mkdir(mode=0o700)
    with file_lock(tmp_path / "cache" / f"{wanted.key()}.lock", 1.0):
        assert build_library(wanted, tmp_path / "cache").exists()


@needs_compiler
def test_a_compiler_error_is_the_reason(tmp_path: Path) -> None:
    with pytest.raises(KernelsUnavailableError, match=r"failed: .*error"):
        build_library(plan(tmp_path, "int f() { return nothing; }\n"), tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.so"))


def test_a_directory_open_to_others_is_refused(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    cache.chmod(0o777)
    with pytest.raises(KernelsUnavailableError, match="written by others"):
        build_library(BuildPlan(compiler="c++"), cache)


@needs_compiler
def test_a_foreign_library_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KernelsUnavailableError, match="another interface"):
        CpuLibrary(build_library(plan(tmp_path), tmp_path / "cache"))


def test_no_compiler_means_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(build.shutil, "which", lambda _: None)
    with caplog.at_level(logging.INFO):
        assert select_kernels("auto", torch.float32, "cpu", tmp_path).name == "torch"
    assert "kernels: torch, because there is no C++ compiler" in caplog.text


def test_native_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="float16") as refusal:
        select_kernels("native", torch.float16, "cpu", tmp_path)
    assert refusal.value.param == "kernels"
    monkeypatch.setattr(build.shutil, "which", lambda _: None)
    with pytest.raises(ConfigError, match=r"no C\+\+ compiler"):
        select_kernels("native", torch.float32, "cpu", tmp_path)


def test_choices(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level(logging.INFO):
        assert select_kernels("off", torch.float32, "cpu", tmp_path).name == "torch"
        assert select_kernels("auto", torch.float16, "cpu", tmp_path).name == "torch"
        monkeypatch.setattr(triton_ops.importlib.util, "find_spec", lambda _: None)
        assert select_kernels("auto", torch.float16, "cuda:0", tmp_path).name == "torch"
    assert "switched off" in caplog.text
    assert "they know float32 and bfloat16, not torch.float16" in caplog.text
    assert "kernels: torch, because of Triton's: triton is not installed" in caplog.text
    with pytest.raises(ConfigError, match="triton is not installed"):
        select_kernels("fp8", torch.bfloat16, "cuda:0", tmp_path)
    with pytest.raises(ConfigError, match=", ".join(select.CHOICES)):
        select_kernels("fast", torch.float32, "cpu", tmp_path)


@needs_compiler
def test_tiles_that_the_system_keeps_are_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plans: list[BuildPlan] = []

    def library(path: Path) -> CpuLibrary:
        if not plans[-1].without_tiles:
            raise TilesRefusedError("the system does not grant matrix tiles")
        return CpuLibrary(path)

    def build_noted(plan: BuildPlan, cache_dir: Path) -> Path:
        plans.append(plan)
        return build_library(BuildPlan(compiler=plan.compiler, march="native"), cache_dir)

    monkeypatch.setattr(select, "CpuLibrary", library)
    monkeypatch.setattr(select, "build_library", build_noted)
    with caplog.at_level(logging.INFO):
        chosen = select_kernels("auto", torch.float32, "cpu", default_cache_dir() / "kernels")
    assert chosen.name == "cpu"
    assert [plan.without_tiles for plan in plans] == [False, True]
    assert "does not grant matrix tiles" in caplog.text
