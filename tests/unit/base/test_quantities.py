"""Sizes, durations and hosts: what is read, what is refused, and the way back to text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic_core import PydanticCustomError

from cluster.base.amount_text import duration_text, size_text
from cluster.base.problems import shown
from cluster.base.quantities import Duration, Real, Size, Whole
from cluster.base.rules import Choice, Host, Text


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        (123456, 123456),
        ("256MiB", 256 * 2**20),
        ("256mib", 256 * 2**20),
        ("2GB", 2 * 10**9),
        ("1.5 GiB", 3 * 2**29),
        ("64KiB", 65536),
        ("100B", 100),
    ],
)
def test_sizes(text: object, num_bytes: int):
    assert Size(1, 2**50).parse(text) == num_bytes


@pytest.mark.parametrize("value", ["", "MiB", "1", "1 2MiB", "-1MiB", "1e3MiB", 1.5, True, None])
def test_not_a_size(value: object):
    with pytest.raises(PydanticCustomError, match="allowed: a size from 1B to 1024TiB"):
        Size(1, 2**50).parse(value)


@pytest.mark.parametrize(
    ("text", "seconds"), [("10s", 10), ("250ms", 0.25), ("2m", 120), ("1.5h", 5400), ("3 s", 3)]
)
def test_durations(text: str, seconds: float):
    assert Duration(0, 10_000).parse(text) == pytest.approx(seconds)


@pytest.mark.parametrize("value", ["", "10", "s", "10 sec", "-1s", "1d", 10, True, None, "1:30"])
def test_not_a_duration(value: object):
    with pytest.raises(PydanticCustomError):
        Duration(0, 10_000).parse(value)


@given(st.integers(0, 2**60))
def test_size_text_is_close(num_bytes: int):
    read = Size(0, 2**70).parse(size_text(num_bytes))
    assert isinstance(read, int)
    assert abs(read - num_bytes) <= 0.005 * max(num_bytes, 1) + 1


@given(st.sampled_from([0.1, 0.25, 1.0, 10.0, 90.0, 120.0, 3600.0, 5400.0, 86400.0]))
def test_duration_text_reads_back(seconds: float):
    assert Duration(0, 10**6).parse(duration_text(seconds)) == pytest.approx(seconds)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "0.0.0.0", "localhost", "node-1.example.org"])
def test_hosts(host: str):
    assert Host().parse(host) == host


@pytest.mark.parametrize(
    "host", ["", "1.2.3", "1.2.3.400", "a b", "-a", "a..b", "x" * 254, 5, None]
)
def test_not_a_host(host: object):
    with pytest.raises(PydanticCustomError):
        Host().parse(host)


def test_numbers_are_strict():
    assert Whole(1, 5, auto=True).parse("auto") == "auto"
    assert Real(0, 5).parse(3) == 3.0
    for value in (True, "3", 3.0, None, [3]):
        with pytest.raises(PydanticCustomError):
            Whole(1, 5).parse(value)
    for value in (True, "3", float("nan"), float("inf"), 10**400):
        with pytest.raises(PydanticCustomError):
            Real(0, 5).parse(value)


def test_choice_tells_what_comes_later():
    rule = Choice(("auto",), (("offload", "not there yet"),))
    with pytest.raises(PydanticCustomError, match='"offload" is not there yet; allowed: auto'):
        rule.parse("offload")


def test_text_refuses_what_does_not_print():
    for value in ("a\nb", "a\x1b[31m", "a\u202eb", "", "abcdef"):
        with pytest.raises(PydanticCustomError):
            Text("letters", ".+", 5).parse(value)


def test_shown_is_short_and_printable():
    assert shown("a\x1b[31m\r\n") == '"a\\x1b[31m\\r\\n"'
    assert len(shown("x" * 1000)) <= 50
    assert shown(None) == "nothing"
    assert shown({"secret": 1}) == "a mapping"
