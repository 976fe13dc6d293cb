"""Log lines: one event, one line; plain for terminals, JSON for processes under Ray.

Call sites use the standard library (`logging.getLogger(__name__)`, facts in `extra={...}`).
Whatever a client managed to put into a message, a line stays one line: control characters, line
and paragraph separators and terminal escapes are written as backslash escapes.
"""

from __future__ import annotations

import enum
import json
import logging
import sys
import time
from typing import TextIO

from cluster.base.env import read_environment

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_MAX_VALUE = 2000
"""Longer values are cut: a log line is not a place for prompts."""


class LogStyle(enum.StrEnum):
    """How a line is written."""

    PLAIN = "plain"
    JSON = "json"


def configure_logging(level: str, style: LogStyle, stream: TextIO) -> None:
    """Make `stream` the only place where the process's log lines go.

    Replaces the root logger's handlers, so that calling it again cannot double lines.
    """
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter() if style is LogStyle.JSON else PlainFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())


def log_under_ray() -> None:
    """In a process that Ray started: JSON lines on stderr, which Ray's dashboard shows."""
    configure_logging(read_environment().log_level, LogStyle.JSON, sys.stderr)


class PlainFormatter(logging.Formatter):
    """`12:00:01.250 warning replicas.leader: text key=value`, local time."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        head = f"{clock}.{int(record.msecs):03d} {record.levelname.lower()} {record.name}:"
        facts = " ".join(f"{key}={_text(value)}" for key, value in _facts(record).items())
        parts = (head, neutral(record.getMessage()), facts, neutral(self._traceback(record)))
        return " ".join(part for part in parts if part)

    def _traceback(self, record: logging.LogRecord) -> str:
        return self.formatException(record.exc_info) if record.exc_info else ""


class JsonFormatter(logging.Formatter):
    """One JSON object per line: `time_s`, `level`, `logger`, `message`, then the facts."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line of ASCII JSON."""
        line: dict[str, object] = {
            "time_s": round(record.created, 6),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage()[:_MAX_VALUE],
        }
        for key, value in _facts(record).items():
            line.setdefault(key, value)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=_text)


def neutral(text: str) -> str:
    """The text with every character that could move a cursor or end a line escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _facts(record: logging.LogRecord) -> dict[str, object]:
    return {key: value for key, value in vars(record).items() if key not in _STANDARD}


def _text(value: object) -> str:
    return neutral(str(value))[:_MAX_VALUE]
