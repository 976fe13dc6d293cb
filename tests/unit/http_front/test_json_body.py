"""Parsing alone: each cap on both of its sides, without the validator behind it."""

import json

import pytest

from cluster.base.errors import InvalidRequestError
from router.http.json_body import parse_json_object
from router.http.json_text import json_bytes
from router.http.limits import HttpLimits
from router.http.request_head import head_fault

LIMITS = HttpLimits(max_json_depth=8, max_json_keys=10, max_json_containers=20)


def parse(body):
    return parse_json_object(body if isinstance(body, bytes) else body.encode(), LIMITS)


def nested(depth):
    return '{"a":' + "[" * (depth - 1) + "]" * (depth - 1) + "}"


def test_depth():
    parse(nested(8))
    with pytest.raises(InvalidRequestError, match="nested"):
        parse(nested(9))


def test_brackets_inside_strings_do_not_count():
    text = "[{" * 1000 + '"\\'
    assert parse(json.dumps({"a": text, "b": [text]})) == {"a": text, "b": [text]}


def test_keys():
    parse(json.dumps(dict.fromkeys("abcdefghij", 0)))
    with pytest.raises(InvalidRequestError, match="keys"):
        parse(json.dumps(dict.fromkeys("abcdefghijk", 0)))
    with pytest.raises(InvalidRequestError, match="keys"):
        parse(json.dumps({"a": dict.fromkeys("bcdefghijk", 0)}))


def test_containers():
    parse(json.dumps({"a": [[]] * 18}))
    with pytest.raises(InvalidRequestError, match="too many lists"):
        parse(json.dumps({"a": [[]] * 19}))


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e400", "-1e400"])
def test_numbers_that_are_not_finite(literal):
    with pytest.raises(InvalidRequestError, match=r"not JSON|too large"):
        parse(f'{{"a": {literal}}}')


def test_finite_numbers_keep_their_kind():
    found = parse('{"a": 1, "b": 1.0, "c": 1e3, "d": 18446744073709551616}')
    assert found == {"a": 1, "b": 1.0, "c": 1000.0, "d": 2**64}
    assert [type(value) for value in found.values()] == [int, float, float, int]


def test_repeated_keys():
    with pytest.raises(InvalidRequestError, match="repeats"):
        parse('{"a": {"b": 1, "b": 1}}')


@pytest.mark.parametrize("text", ["\u2028", "a\u0085b", "\x1c", "\r\n", "\ud800", "\U0001f600"])
def test_printed_text_is_one_line_for_every_splitter(text):
    printed = json_bytes({"text": text}).decode("utf-8")
    assert len(printed.splitlines()) == 1
    assert json.loads(printed)["text"] == text.replace("\ud800", "?")


def scope(*headers, version="1.1", query=b""):
    return {
        "headers": [(b"host", b"a"), *headers],
        "http_version": version,
        "raw_path": b"/v1/models",
        "query_string": query,
    }


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([], None),
        ([(b"content-length", b"2")], None),
        ([(b"content-length", b"2"), (b"content-length", b"2")], 400),
        ([(b"content-length", b"2"), (b"transfer-encoding", b"chunked")], 400),
        ([(b"transfer-encoding", b"chunked"), (b"transfer-encoding", b"chunked")], 400),
        ([(b"host", b"b")], 400),
        ([(b"x", b"y")] * 99, None),
        ([(b"x", b"y")] * 100, 431),
        ([(b"x", b"y" * 16_000)], None),
        ([(b"x", b"y" * 17_000)], 431),
    ],
)
def test_heads(headers, status):
    fault = head_fault(scope(*headers), HttpLimits())
    assert (fault and fault[0]) == status


def test_urls_and_old_http():
    assert head_fault(scope(query=b"q" * 8_000), HttpLimits()) is None
    assert head_fault(scope(query=b"q" * 8_200), HttpLimits())[0] == 414
    hostless = scope() | {"headers": []}
    assert head_fault(hostless, HttpLimits())[0] == 400
    assert head_fault(hostless | {"http_version": "1.0"}, HttpLimits()) is None
