"""Calls are found in what models write, however it is cut; what is no call stays text."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.tools.call_formats import CallFormat, ToolCall, format_of_template
from router.tools.call_reader import CallReader

NAMES = frozenset({"add", "get_weather"})
ADD = ToolCall(name="add", arguments='{"a": 1, "b": "}]</tool_call>"}')
WEATHER = ToolCall(name="get_weather", arguments='{"city": "Köln\\n\\"x\\""}')
HERMES, LLAMA3, MISTRAL = CallFormat.HERMES, CallFormat.LLAMA3_JSON, CallFormat.MISTRAL


def written(call, word="arguments"):
    return json.dumps({"name": call.name, word: json.loads(call.arguments)}, ensure_ascii=False)


A, W = written(ADD), written(WEATHER)
A3, W3 = written(ADD, "parameters"), written(WEATHER, "parameters")
CASES = [
    (HERMES, f"<tool_call>\n{A}\n</tool_call>", [ADD]),
    (HERMES, f"I will.\n\n<tool_call>{A}</tool_call>\n<tool_call>\n{W}\n</tool_call>\n",
     ["I will.", ADD, WEATHER]),
    (HERMES, f"<tool_call>{A}</tool_call> done <b>", [ADD, " done <b>"]),
    (HERMES, f"<tool_call>\n{A}\n", [ADD]),
    (HERMES, "a < b and <tool_cal and <tool_call>none", ["a < b and <tool_cal and",
                                                          "<tool_call>none"]),
    (HERMES, '<tool_call>{"name": "rm", "arguments": {}}</tool_call>',
     ['<tool_call>{"name": "rm", "arguments": {}}</tool_call>']),
    (HERMES, '<tool_call>{"name": "add", "arguments": {"a": NaN}}</tool_call>',
     ['<tool_call>{"name": "add", "arguments": {"a": NaN}}</tool_call>']),
    (HERMES, '<tool_call>{"name": "add", "argum', ['<tool_call>{"name": "add", "argum']),
    (HERMES, " plain\n", [" plain\n"]),
    (HERMES, "", []),
    (LLAMA3, A3, [ADD]),
    (LLAMA3, f"<|python_tag|>{A3}; {W3}", [ADD, WEATHER]),
    (LLAMA3, f"\n{A3}\n", [ADD]),
    (LLAMA3, f"Sure: {A3}", [f"Sure: {A3}"]),
    (LLAMA3, '{"a": 1}', ['{"a": 1}']),
    (LLAMA3, "{ is a brace", ["{ is a brace"]),
    (LLAMA3, f"{A3} and that is it", [ADD, " and that is it"]),
    (MISTRAL, f"[TOOL_CALLS][{A}, {W}]", [ADD, WEATHER]),
    (MISTRAL, f"[TOOL_CALLS] [{A}]", [ADD]),
    (MISTRAL, f"Well. [TOOL_CALLS]add{ADD.arguments}", ["Well.", ADD]),
    (MISTRAL, f"[TOOL_CALLS]add[CALL_ID]a1B2c3D4e[ARGS]{ADD.arguments}"
     f"[TOOL_CALLS]get_weather[ARGS]{WEATHER.arguments}", [ADD, WEATHER]),
    (MISTRAL, "[TOOL_CALLS]rm{}", ["[TOOL_CALLS]rm{}"]),
    (MISTRAL, "see [1] and [TOOL", ["see [1] and [TOOL"]),
    (None, f"[{A3}, {W3}]", [ADD, WEATHER]),
    (None, f"[\n  {A3}\n]", [ADD]),
    (None, f'[{A3}, {{"name": "ad', [ADD, ', {"name": "ad']),
]  # fmt: skip


def read(form, pieces):
    reader = CallReader(form, NAMES)
    found = [part for piece in pieces for part in reader.feed(piece)]
    return joined([*found, *reader.finish()])


def joined(parts):
    """Neighbouring texts as one; how text is cut says nothing."""
    whole = []
    for part in parts:
        if isinstance(part, str) and whole and isinstance(whole[-1], str):
            whole[-1] += part
        else:
            whole.append(part)
    return whole


def expected(parts):
    text = joined(parts)
    # A rest that began with blanks before a failed call keeps them or not; compared without.
    return [part.strip() if isinstance(part, str) else part for part in text]


@pytest.mark.parametrize(("form", "text", "parts"), CASES)
def test_whole_and_letter_by_letter(form, text, parts):
    for pieces in ([text], list(text)):
        found = read(form, pieces)
        if any("<tool_call>none" in part for part in parts if isinstance(part, str)):
            assert "".join(found).replace(" ", "") == text.replace(" ", "")
        else:
            assert expected(found) == expected(parts)


@given(st.sampled_from(CASES), st.lists(st.integers(0, 200), max_size=8))
def test_any_cut_gives_the_same(case, cuts):
    form, text, _ = case
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(edges)]
    assert expected(read(form, pieces)) == expected(read(form, [text]))


@given(st.sampled_from([HERMES, LLAMA3, MISTRAL]), st.text(max_size=60))
def test_plain_text_is_untouched(form, text):
    if "<tool_call>" in text or "[TOOL_CALLS]" in text or "<|python_tag|>" in text:
        return
    assert "".join(read(form, list(text))) == text


def test_text_is_not_held_back():
    reader = CallReader(HERMES, NAMES)
    assert list(reader.feed("Hello, wor")) == ["Hello, wor"]
    assert list(reader.feed("ld <too")) == ["ld"]
    assert list(reader.feed("th>")) == [" <tooth>"]
    reader = CallReader(LLAMA3, NAMES)
    assert list(reader.feed("Hello")) == ["Hello"]
    assert list(reader.feed(" {")) == [" {"]


def test_a_call_is_shown_when_it_is_closed():
    reader = CallReader(HERMES, NAMES)
    assert list(reader.feed(f"<tool_call>{A}")) == []
    assert list(reader.feed("</tool_call>")) == [ADD]


def test_deep_nesting_is_no_call():
    text = '<tool_call>{"name": "add", "arguments": ' + '{"a":' * 100_000
    assert "".join(read(HERMES, [text])) == text


@pytest.mark.parametrize(
    ("source", "form"),
    [
        ("{% if tools %}<tool_call>{% endif %}", HERMES),
        ("[AVAILABLE_TOOLS]{{ tools }}[TOOL_CALLS]", MISTRAL),
        ('{{ tools }} {"name": f, "parameters": d} ipython', LLAMA3),
        ("<tool_call><function=f>", None),
        ("{{ tools }}", None),
    ],
)
def test_the_format_is_seen_in_the_template(source, form):
    assert format_of_template(source) is form
