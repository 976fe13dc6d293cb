"""Reads a checkpoint's tokenizer.json and tokenizer_config.json into plain values.

Owns which files are looked at and what a missing or broken one means; knows nothing of encoding.
Only fast tokenizers (tokenizer.json) are served: a sentencepiece or Python tokenizer would need
code or a conversion that this project does not run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.base.errors import ConfigError, CorruptWeightsError

NAMED_SPECIALS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
EXTRA_SPECIALS = ("additional_special_tokens", "extra_special_tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class AddedTokenSpec:
    """One added token as the files declare it."""

    content: str
    token_id: int | None = None
    special: bool = False
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerFiles:
    """What the two files say; `named` maps bos_token and its kin to their text."""

    directory: Path
    backend_json: str
    added: tuple[AddedTokenSpec, ...]
    config: Mapping[str, Any]
    named: Mapping[str, str]
    extra_specials: tuple[str, ...]

    def special_texts(self) -> tuple[str, ...]:
        """Every string that stands for a control token, without repeats."""
        listed = [spec.content for spec in self.added if spec.special]
        return tuple(dict.fromkeys([*listed, *self.named.values(), *self.extra_specials]))


def read_tokenizer_files(directory: str | Path) -> TokenizerFiles:
    """Load the tokenizer files of a checkpoint directory.

    Raises:
        ConfigError: there is no tokenizer.json.
        CorruptWeightsError: a file is not valid JSON or has the wrong shape.
    """
    root = Path(directory)
    path = root / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(
            f"{root} has no tokenizer.json.",
            "Only fast tokenizers are supported: save the checkpoint with a fast tokenizer.",
        )
    backend_json = _read_text(path)
    backend = _parse_object(path, backend_json)
    config = read_json_object(root / "tokenizer_config.json") or {}
    added = {spec.content: spec for spec in _backend_added(path, backend)}
    for spec in _config_added(root / "tokenizer_config.json", config):
        added.setdefault(spec.content, spec)
    return TokenizerFiles(
        directory=root,
        backend_json=backend_json,
        added=tuple(added.values()),
        config=config,
        named=_named_specials(config, read_json_object(root / "special_tokens_map.json") or {}),
        extra_specials=_extra_specials(config),
    )


def read_json_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in `path`, or None when there is no such file.

    Raises:
        CorruptWeightsError: the file is not a JSON object.
    """
    if not path.is_file():
        return None
    return _parse_object(path, _read_text(path))


def token_content(value: Any) -> str | None:
    """The text of a token given as a string or as an AddedToken dictionary."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CorruptWeightsError(f"{path} cannot be read: {error}.") from error


def _parse_object(path: Path, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CorruptWeightsError(
            f"{path} is not valid JSON: {error}.", "Download the checkpoint again."
        ) from error
    if not isinstance(value, dict):
        raise CorruptWeightsError(f"{path} must hold a JSON object.")
    return value


def _backend_added(path: Path, backend: Mapping[str, Any]) -> list[AddedTokenSpec]:
    entries = backend.get("added_tokens") or []
    if not isinstance(entries, list):
        raise CorruptWeightsError(f"{path}: added_tokens must be a list.")
    return [_added_spec(path, entry, entry.get("id")) for entry in entries]


def _config_added(path: Path, config: Mapping[str, Any]) -> list[AddedTokenSpec]:
    entries = config.get("added_tokens_decoder") or {}
    if not isinstance(entries, Mapping) or not all(str(key).isdigit() for key in entries):
        raise CorruptWeightsError(f"{path}: added_tokens_decoder must map token ids to tokens.")
    ordered = sorted(entries.items(), key=lambda item: int(item[0]))
    return [_added_spec(path, entry, int(key)) for key, entry in ordered]


def _added_spec(path: Path, entry: Any, token_id: Any) -> AddedTokenSpec:
    content = token_content(entry)
    if content is None or not isinstance(token_id, int):
        raise CorruptWeightsError(f"{path}: an added token lacks its content or id.")
    flags = entry if isinstance(entry, Mapping) else {}
    special = bool(flags.get("special", False))
    return AddedTokenSpec(
        content=content,
        token_id=token_id,
        special=special,
        single_word=bool(flags.get("single_word", False)),
        lstrip=bool(flags.get("lstrip", False)),
        rstrip=bool(flags.get("rstrip", False)),
        normalized=bool(flags.get("normalized", not special)),
    )


def _named_specials(config: Mapping[str, Any], fallback: Mapping[str, Any]) -> dict[str, str]:
    named = {}
    for name in NAMED_SPECIALS:
        source = config if name in config else fallback
        content = token_content(source.get(name))
        if content is not None:
            named[name] = content
    return named


def _extra_specials(config: Mapping[str, Any]) -> tuple[str, ...]:
    found: list[str] = []
    for key in EXTRA_SPECIALS:
        values = config.get(key) or []
        if isinstance(values, Mapping):
            values = list(values.values())
        found += [content for value in values if (content := token_content(value)) is not None]
    return tuple(dict.fromkeys(found))
