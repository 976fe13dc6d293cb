import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicas.text.stop_strings import StopMatcher


def naive(text, stops, include):
    """The definition: stop at the first character that completes a stop string."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[:end] if include else text[: end - len(stop)], stop
    return text, None


def naive_held(text, stops):
    return max((k for s in stops for k in range(len(s)) if text.endswith(s[:k])), default=0)


few_letters = st.text(alphabet="abc", max_size=30)
stop_lists = st.lists(st.text(alphabet="abc", min_size=1, max_size=6), max_size=4)


@given(text=few_letters, stops=stop_lists, include=st.booleans(), data=st.data())
def test_any_split_equals_naive_search(text, stops, include, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    matcher = StopMatcher(stops, include)
    shown, stop = "", None
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        part, stop = matcher.push(text[start:end])
        shown += part
        if stop is None:
            assert len(shown) == end - naive_held(text[:end], stops)
    shown += matcher.flush()
    assert (shown, stop) == naive(text, stops, include)


def test_nothing_after_a_match():
    matcher = StopMatcher(["END"], include_in_output=False)
    assert matcher.push("abc E") == ("abc ", None)
    assert matcher.push("ND tail") == ("", "END")
    assert matcher.push("more") == ("", "END")
    assert matcher.flush() == ""


def test_without_stops_text_passes():
    matcher = StopMatcher([], include_in_output=True)
    assert matcher.push("anything") == ("anything", None)
    assert matcher.flush() == ""


@pytest.mark.parametrize("include", [True, False])
def test_stop_over_three_pushes(include):
    matcher = StopMatcher(["<|stop|>"], include)
    assert matcher.push("a<|") == ("a", None)
    assert matcher.push("stop") == ("", None)
    assert matcher.push("|>b") == ("<|stop|>" if include else "", "<|stop|>")


def test_a_crafted_stop_string_costs_no_more():
    stops = ["a" * 255 + "b" + str(i) for i in range(4)]
    matcher = StopMatcher(stops, include_in_output=False)
    start = time.thread_time()
    for _ in range(2000):
        matcher.push("aaaaa")
    assert (time.thread_time() - start) / 10_000 < 20e-6
