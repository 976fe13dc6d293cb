"""Typed reading of a checkpoint's `config.json`: every complaint names the key and what it holds.

Pure; knows nothing about model families. A value of the wrong type is an error, never coerced: a
string where a number belongs usually means the file is not what it claims to be.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from cluster.base.errors import ConfigError


class ConfigFields:
    """A `config.json` (or an object inside one) with checked access.

    Every getter takes aliases: the first key that is present and not null counts.

    Raises (every getter): ConfigError on a missing required key or a wrong type.
    """

    def __init__(self, values: Mapping[str, Any], where: str = "config.json") -> None:
        self._values = values
        self._where = where

    def __contains__(self, key: str) -> bool:
        """Whether the key is written at all, even as null."""
        return key in self._values

    def raw(self, *keys: str) -> Any:
        """The first of `keys` that is set, or None."""
        return next((self._values[key] for key in keys if self._values.get(key) is not None), None)

    def integer(self, *keys: str, default: int | None = None, minimum: int = 1) -> int:
        """A whole number of at least `minimum`; required when there is no default."""
        value = self.raw(*keys)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.wrong(keys[0], value, f"a whole number of at least {minimum}")
        return value

    def optional_integer(self, *keys: str) -> int | None:
        """A positive whole number, or None when absent or null."""
        return None if self.raw(*keys) is None else self.integer(*keys)

    def number(self, *keys: str, default: float | None = None) -> float:
        """A finite positive number; required when there is no default."""
        value = self.raw(*keys)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            raise self.wrong(keys[0], value, "a positive number")
        return float(value)

    def flag(self, *keys: str, default: bool) -> bool:
        """A boolean."""
        value = self.raw(*keys)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(keys[0], value, "true or false")
        return value

    def text(self, *keys: str, default: str | None = None) -> str:
        """A string; required when there is no default."""
        value = self.raw(*keys)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise self.wrong(keys[0], value, "a string")
        return value

    def section(self, *keys: str) -> Mapping[str, Any]:
        """A JSON object; empty when absent."""
        value = self.raw(*keys)
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise self.wrong(keys[0], value, "an object")
        return value

    def texts(self, *keys: str) -> tuple[str, ...] | None:
        """A list of strings, or None when absent."""
        value = self.raw(*keys)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            raise self.wrong(keys[0], value, "a list of strings")
        return tuple(value)

    def integers(self, *keys: str) -> tuple[int, ...]:
        """A list of whole numbers from zero on; empty when absent."""
        value = self.raw(*keys)
        entries = [] if value is None else value
        if not isinstance(entries, list) or any(
            isinstance(entry, bool) or not isinstance(entry, int) or entry < 0 for entry in entries
        ):
            raise self.wrong(keys[0], value, "a list of whole numbers from zero on")
        return tuple(entries)

    def token_ids(self, *keys: str) -> tuple[int, ...]:
        """One token id or a list of them; empty when absent."""
        value = self.raw(*keys)
        entries = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(entry, int) and not isinstance(entry, bool) for entry in entries):
            raise self.wrong(keys[0], value, "a token id or a list of token ids")
        return tuple(entries)

    def of_layer(self, index: int, keys: Collection[str]) -> ConfigFields:
        """The configuration of one layer: this one, and what `per_layer_config` says of it.

        Args:
            keys: what may differ between layers.

        Raises:
            ConfigError: the layer differs in something else.
        """
        own = self.section("per_layer_config").get(str(index)) or {}
        if not isinstance(own, Mapping):
            raise self.wrong("per_layer_config", own, "an object for each layer that differs")
        for key, value in own.items():
            if key not in keys and value != self._values.get(key):
                raise ConfigError(
                    f"per_layer_config in {self._where} gives layer {index} its own {key}.",
                    f"Layers may differ in {', '.join(sorted(keys))}.",
                    param="per_layer_config",
                )
        return ConfigFields({**self._values, **own}, self._where)

    def wrong(self, key: str, value: object, expected: str) -> ConfigError:
        """The error for a value that cannot be used (to be raised by the caller)."""
        found = "is missing" if value is None else f"is {value!r}"
        return ConfigError(
            f"{key} in {self._where} {found}.", f"It has to be {expected}.", param=key
        )
