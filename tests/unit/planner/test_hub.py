"""Repositories: the cache first, then the network, and what is said when neither helps."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import pytest
from fake_checkpoints import write_checkpoint
from huggingface_hub import errors as hub_errors

from cluster.base.errors import ConfigError
from cluster.planner.hub import Hub


class FakeHub:
    """A cache directory and a network that may fail."""

    def __init__(self, cached: Path | None, network: Path | Exception) -> None:
        self.cached = cached
        self.network = network
        self.calls: list[tuple[str, str | None, bool]] = []

    def __call__(self, repo: str, revision: str | None, local_files_only: bool) -> Path:
        self.calls.append((repo, revision, local_files_only))
        if local_files_only:
            if self.cached is None:
                raise hub_errors.LocalEntryNotFoundError("not cached")
            return self.cached
        if isinstance(self.network, Exception):
            raise self.network
        return self.network


def _http_error(kind: type[hub_errors.HfHubHTTPError]) -> Exception:
    return kind("first line\nsecond line", response=Mock(headers={}))


def test_a_complete_cache_needs_no_network(tmp_path: Path):
    directory = write_checkpoint(tmp_path)
    fake = FakeHub(directory, AssertionError("network used"))
    assert Hub(download=fake).resolve("org/m", "v1") == directory
    assert fake.calls == [("org/m", "v1", True)]


def test_an_incomplete_cache_is_completed(tmp_path: Path):
    directory = write_checkpoint(tmp_path / "full")
    fake = FakeHub(tmp_path, directory)
    assert Hub(download=fake).resolve("org/m", None) == directory
    assert [call[2] for call in fake.calls] == [True, False]


def test_offline_says_how_to_fill_the_cache():
    fake = FakeHub(None, AssertionError("network used"))
    with pytest.raises(ConfigError, match="org/m cannot be fetched: the network is") as caught:
        Hub(offline=True, download=fake).resolve("org/m", None)
    assert "hf download org/m" in caught.value.remedy
    assert "path" in caught.value.remedy


@pytest.mark.parametrize(
    ("failure", "cause", "remedy"),
    [
        (hub_errors.LocalEntryNotFoundError("x"), "no network", "hf download org/m"),
        (ConnectionError("name resolution"), "ConnectionError: name resolution", "hf download"),
        (RuntimeError("a\nb"), "RuntimeError: a.", "hf download"),
        (_http_error(hub_errors.RepositoryNotFoundError), "does not exist", "spelling"),
        (_http_error(hub_errors.GatedRepoError), "gated", "hf auth login"),
        (_http_error(hub_errors.RevisionNotFoundError), "no revision v9", "revision"),
    ],
)
def test_every_failure_has_a_remedy(failure: Exception, cause: str, remedy: str):
    with pytest.raises(ConfigError, match=cause) as caught:
        Hub(download=FakeHub(None, failure)).resolve("org/m", "v9")
    assert remedy in caught.value.remedy
    assert "\n" not in str(caught.value)


def test_the_real_client_offline_gives_the_same_error(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match="cannot be fetched"):
        Hub(offline=True).resolve("org/never-downloaded", None)
