import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from replicas.text.control_text import BREAK, GUARD, SpecialBreaker, SpecialFinder
from replicas.text.tokenizer_files import AddedTokenSpec

SPECIALS = [f"<|reserved_{i}|>" for i in range(250)] + ["<|end|>", "<s>", "</s>", "ab", "abc", "#"]


def spec(content, **flags):
    return AddedTokenSpec(content=content, special=True, normalized=False, **flags)


def finder(*specs):
    return SpecialFinder([(entry, at) for at, entry in enumerate(specs)])


@given(st.lists(st.sampled_from([*SPECIALS[-5:], "<", "a", "b", "c", " "]), max_size=12))
def test_broken_text_holds_no_control_token(parts):
    text = "".join(parts)
    broken = SpecialBreaker(SPECIALS).break_specials(text)
    assert broken.replace(BREAK, "") == text
    pieces, ids = finder(*map(spec, SPECIALS)).split(broken)
    assert (pieces, ids) == ([text], [])


@given(
    st.lists(st.sampled_from(["<s>", "</s>", "ab", "abc", "<", " ", "\n", "x", "y "]), max_size=10)
)
@pytest.mark.parametrize("flags", [{}, {"lstrip": True}, {"rstrip": True}, {"single_word": True}])
def test_found_tokens_are_those_of_the_library(flags, parts):
    """Same ids and same cuts as `tokenizers`, flags included."""
    contents = ["<s>", "</s>", "ab", "abc"]
    backend = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split("\x00", "isolated")
    backend.add_special_tokens(
        [AddedToken(content, special=True, normalized=False, **flags) for content in contents]
    )
    text = "".join(parts)
    encoding = backend.encode(text)
    ours = finder(*(spec(content, **flags) for content in contents))
    pieces, ids = ours.split(text)
    assert [token_id - 1 for token_id in encoding.ids if token_id] == ids
    plain = [text[a:b] for i, (a, b) in zip(encoding.ids, encoding.offsets, strict=True) if not i]
    assert [piece for piece in pieces if piece] == plain


def test_longest_and_leftmost_win():
    pieces, ids = finder(spec("ab"), spec("abc"), spec("bcd")).split("xabcd ab")
    assert (pieces, ids) == (["x", "d ", ""], [1, 0])


def test_without_specials_nothing_happens():
    assert SpecialBreaker([]).break_specials("<s>") == "<s>"
    assert finder().split("<s>") == (["<s>"], [])


@pytest.mark.parametrize("flood", ["<", "<|reserved_", "<|", "</", "ab"])
def test_floods_of_beginnings_stay_linear(flood):
    text = flood * (400_000 // len(flood))
    breaker, find = SpecialBreaker(SPECIALS), finder(*map(spec, SPECIALS))
    start = time.thread_time()
    find.split(breaker.break_specials(text))
    assert time.thread_time() - start < 1.0


def test_guard_is_not_the_break():
    assert GUARD != BREAK
