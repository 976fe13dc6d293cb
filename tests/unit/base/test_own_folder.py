"""Temporary directories go with their process, also with one that is killed; limits are raised."""

import resource
import signal
import stat
import subprocess
import sys
import tempfile

import pytest

from cluster.base.own_folder import OwnFolder, remove_left_folders
from cluster.base.process_limits import raise_open_files

LIVE = """
import sys, time
from cluster.base.own_folder import OwnFolder
folder = OwnFolder("test")
(folder.path / "file").write_text("x")
print(folder.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _own_temporary_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)


def living():
    process = subprocess.Popen(
        [sys.executable, "-c", LIVE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    return process, process.stdout.readline().strip()


def test_it_is_private_and_goes_when_it_is_closed():
    folder = OwnFolder("test")
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    assert remove_left_folders() == 0
    assert folder.path.is_dir()
    folder.close()
    folder.close()
    assert not folder.path.exists()


def test_what_a_killed_process_left_is_removed_and_what_lives_is_not(tmp_path):
    killed, left = living()
    other, kept = living()
    (tmp_path / "penstock-of-another-kind").mkdir()
    killed.send_signal(signal.SIGKILL)
    killed.wait(10)
    assert (tmp_path / left).is_dir()
    assert remove_left_folders() == 1
    assert not (tmp_path / left).exists()
    assert (tmp_path / kept / "file").read_text() == "x"
    assert (tmp_path / "penstock-of-another-kind").is_dir()
    other.communicate("", timeout=10)
    assert not (tmp_path / kept).exists(), "a process that ends by itself leaves none"


def test_a_link_to_a_foreign_place_is_left_alone(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "alive").touch()
    (tmp_path / "penstock-trap-x").symlink_to(tmp_path / "elsewhere")
    assert remove_left_folders() == 0
    assert (tmp_path / "elsewhere" / "alive").exists()


def test_open_files_up_to_the_hard_limit():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, hard), hard))
        assert raise_open_files() == hard
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
