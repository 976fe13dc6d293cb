"""Turns a model repository into a local directory: the cache first, then a download.

Only data files are ever asked for (JSON, safetensors, tokenizer, chat template): no code, no
pickles. Knows nothing of what is in them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors as hub_errors

from cluster.base.errors import ConfigError
from cluster.planner.checkpoint_info import INDEX_FILE, read_checkpoint

DATA_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "model.safetensors",
    "model-*.safetensors",
    INDEX_FILE,
)
"""What a served model needs; shards in other layouts of the same repository are left alone."""

Download = Callable[[str, str | None, bool], Path]
"""(repo, revision, local files only) -> snapshot directory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hub:
    """Where repositories come from. `offline` forbids the network."""

    offline: bool = False
    download: Download = field(default_factory=lambda: _snapshot)

    def resolve(self, repo: str, revision: str | None) -> Path:
        """Directory of a complete snapshot of `repo`.

        Raises:
            ConfigError: it is not in the cache and cannot be fetched; says why and what to do.
        """
        cached = self._cached(repo, revision)
        if cached is not None:
            return cached
        if self.offline:
            raise _cannot_fetch(repo, "the network is switched off (HF_HUB_OFFLINE)")
        try:
            return self.download(repo, revision, False)
        except hub_errors.GatedRepoError:
            raise ConfigError(
                f"{repo} is gated: its owners grant access one by one.",
                "Ask for access on its page, then log in with `hf auth login`.",
            ) from None
        except hub_errors.RevisionNotFoundError:
            raise ConfigError(
                f"{repo} has no revision {revision or 'main'}.", "Check `revision`."
            ) from None
        except hub_errors.RepositoryNotFoundError:
            raise ConfigError(
                f"{repo} does not exist, or is private.",
                "Check the spelling, or log in with `hf auth login`.",
            ) from None
        except (hub_errors.LocalEntryNotFoundError, hub_errors.OfflineModeIsEnabled):
            raise _cannot_fetch(repo, "no network, and it is not in the cache") from None
        except Exception as error:
            # The hub client lets errors of its HTTP library through; all of them mean the same.
            raise _cannot_fetch(repo, f"{type(error).__name__}: {_first_line(error)}") from error

    def _cached(self, repo: str, revision: str | None) -> Path | None:
        """The cached snapshot, unless it is missing or incomplete."""
        try:
            directory = self.download(repo, revision, True)
            read_checkpoint(directory)
        except (hub_errors.LocalEntryNotFoundError, ConfigError, OSError, ValueError):
            return None
        return directory


def _snapshot(repo: str, revision: str | None, local_files_only: bool) -> Path:
    return Path(
        huggingface_hub.snapshot_download(
            repo,
            revision=revision,
            allow_patterns=list(DATA_FILES),
            local_files_only=local_files_only,
        )
    )


def _cannot_fetch(repo: str, why: str) -> ConfigError:
    return ConfigError(
        f"{repo} cannot be fetched: {why}.",
        f"Put it in the cache with `hf download {repo}` on a connected machine, or give a local "
        "directory with `path`.",
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0][:200] if lines else "no details"
