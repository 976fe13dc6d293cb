"""Rules for single values of a cluster file: what is allowed, in words and in code.

Each rule is a frozen value put in a field's `Annotated[...]`; pydantic calls `parse`, the
reference page prints `allowed`. Parsing is strict (`true` is not a number, `2` is not text) and
every refusal says what would be accepted. Numbers, sizes and durations: `quantities.py`.
"""

from __future__ import annotations

import ipaddress
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from pydantic_core import PydanticCustomError, core_schema

from cluster.base.problems import shown

_HOSTNAME = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(\.(?!-)[A-Za-z0-9-]{1,63})*")


class Rule(ABC):
    """One value's rule."""

    @property
    @abstractmethod
    def allowed(self) -> str:
        """What is accepted, in words."""

    @abstractmethod
    def parse(self, value: object) -> Any:
        """The value in its internal form.

        Raises:
            PydanticCustomError: the value is not allowed.
        """

    def refuse(self, value: object, why: str = "") -> PydanticCustomError:
        """The refusal of `value`, with what is allowed."""
        reason = why or f"{shown(value)} is not accepted"
        return PydanticCustomError(
            "rule", "{reason}; allowed: {allowed}", {"reason": reason, "allowed": self.allowed}
        )

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(self.parse)


@dataclass(frozen=True)
class Choice(Rule):
    """One of a few words; `later` maps words that exist but cannot be served yet to a reason."""

    options: tuple[str, ...]
    later: tuple[tuple[str, str], ...] = ()

    @property
    def allowed(self) -> str:
        """The words."""
        return " or ".join(self.options) if len(self.options) < 3 else ", ".join(self.options)

    def parse(self, value: object) -> str:
        """The word."""
        if isinstance(value, str) and value in self.options:
            return value
        reason = dict(self.later).get(value) if isinstance(value, str) else None
        raise self.refuse(value, f"{shown(value)} is {reason}" if reason else "")


@dataclass(frozen=True)
class Flag(Rule):
    """true or false."""

    @property
    def allowed(self) -> str:
        """The two words."""
        return "true or false"

    def parse(self, value: object) -> bool:
        """The flag itself."""
        if not isinstance(value, bool):
            raise self.refuse(value)
        return value


@dataclass(frozen=True)
class Text(Rule):
    """Text of a given form."""

    what: str
    pattern: str
    max_length: int

    @property
    def allowed(self) -> str:
        """The form, in words."""
        return f"{self.what}, at most {self.max_length} characters"

    def parse(self, value: object) -> str:
        """The text itself."""
        if not isinstance(value, str):
            hint = " (put it in quotes)" if isinstance(value, (int, float)) else ""
            raise self.refuse(value, f"{shown(value)} is not text{hint}")
        if not value or len(value) > self.max_length or not value.isprintable():
            raise self.refuse(value)
        if re.fullmatch(self.pattern, value) is None:
            raise self.refuse(value)
        return value


@dataclass(frozen=True)
class Host(Rule):
    """An address to listen on."""

    @property
    def allowed(self) -> str:
        """The forms."""
        return "an IPv4 or IPv6 address or a host name (127.0.0.1, ::1, localhost)"

    def parse(self, value: object) -> str:
        """The address as written."""
        if not isinstance(value, str) or not 1 <= len(value) <= 253:
            raise self.refuse(value)
        try:
            ipaddress.ip_address(value)
        except ValueError:
            looks_numeric = re.fullmatch(r"[0-9.]+", value) is not None
            if looks_numeric or _HOSTNAME.fullmatch(value) is None:
                raise self.refuse(value) from None
        return value
