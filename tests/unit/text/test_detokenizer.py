import itertools
import time

import pytest
from checkpoint_files import gpt2, llama2, llama3, qwen, unigram
from hypothesis import given
from hypothesis import strategies as st

from replicas.text.detokenizer import IncrementalDetokenizer
from replicas.text.tokenizer import Tokenizer

TEXTS = [
    "Hello world, this is a test.",
    "family 👩\u200d👩\u200d👧\u200d👦 and flags 🇩🇪🇯🇵",
    "combining e\u0301 a\u0308\u0323 and Zalgo Z\u0351\u036b\u0343",
    "日本語 русский العربية हिन्दी",
    "  leading, double  and trailing  ",
    "a\ufffdb \ufffd\ufffd replacement characters",
    "\n\n\t mixed \r\n whitespace\u00a0\u2003",
]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    builders = (gpt2, qwen, llama3, llama2, unigram)
    return {
        build.__name__: Tokenizer.from_directory(build(root / build.__name__)) for build in builders
    }


def stream(tokenizer, prompt_ids, ids, cuts, skip=True):
    detokenizer = IncrementalDetokenizer(tokenizer, prompt_ids, skip)
    bounds = [0, *sorted(cuts), len(ids)]
    parts = [detokenizer.push(ids[a:b]) for a, b in itertools.pairwise(bounds)]
    return "".join(parts) + detokenizer.flush()


def test_which_decoders_have_a_byte_table(tokenizers):
    found = {name: t.token_bytes is not None for name, t in tokenizers.items()}
    assert found == {"gpt2": True, "qwen": True, "llama3": True, "llama2": True, "unigram": False}


@pytest.mark.parametrize("name", ["gpt2", "qwen", "llama3", "llama2", "unigram"])
@given(
    text=st.one_of(st.sampled_from(TEXTS), st.text(max_size=40)),
    data=st.data(),
)
def test_any_split_equals_one_decode(tokenizers, name, text, data):
    tokenizer = tokenizers[name]
    text = text.replace("\ufdd1", "").replace("\ufdd2", "")
    ids = tokenizer.encode(text)
    cuts = data.draw(st.lists(st.integers(0, len(ids)), max_size=12))
    skip = data.draw(st.booleans())
    prompt = data.draw(st.integers(0, len(ids)))
    expected = tokenizer.decode(ids, skip)
    assert stream(tokenizer, [], ids, cuts, skip) == expected
    prompt_text = tokenizer.decode(ids[:prompt], skip)
    if not prompt_text.endswith("\ufffd"):
        tail = stream(tokenizer, ids[:prompt], ids[prompt:], [c for c in cuts if c < prompt], skip)
        assert prompt_text + tail == expected


@pytest.mark.parametrize("name", ["gpt2", "qwen", "llama3"])
@given(data=st.data())
def test_arbitrary_byte_level_ids_equal_one_decode(tokenizers, name, data):
    """Also for token lists no text encodes to: broken UTF-8, control tokens in the middle."""
    tokenizer = tokenizers[name]
    size = tokenizer.vocab_size
    ids = data.draw(st.lists(st.integers(0, size + 3), max_size=30))
    cuts = data.draw(st.lists(st.integers(0, len(ids)), max_size=8))
    skip = data.draw(st.booleans())
    assert stream(tokenizer, [], ids, cuts, skip) == tokenizer.decode(ids, skip)


def test_no_push_shows_half_a_character(tokenizers):
    for name in ("gpt2", "llama2"):
        tokenizer = tokenizers[name]
        ids = tokenizer.encode("x😀y", add_special_tokens=False)
        detokenizer = IncrementalDetokenizer(tokenizer, [], True)
        shown = [detokenizer.push([i]) for i in ids]
        assert "😀" in shown
        assert not any("\ufffd" in part for part in shown)


def test_cut_off_character_is_flushed_as_replacement(tokenizers):
    tokenizer = tokenizers["llama2"]
    ids = tokenizer.encode("x😀", add_special_tokens=False)[:-1]
    detokenizer = IncrementalDetokenizer(tokenizer, [], True)
    assert detokenizer.push(ids) == "x"
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


def test_prompt_that_ends_inside_a_character(tokenizers):
    for name in ("gpt2", "llama2"):
        tokenizer = tokenizers[name]
        ids = tokenizer.encode("x😀y", add_special_tokens=False)
        detokenizer = IncrementalDetokenizer(tokenizer, ids[:-2], True)
        assert detokenizer.push(ids[-2:]) == "😀y"


def test_long_streams_stay_linear(tokenizers):
    """20,000 tokens, many of them parts of characters, far below the 15 us per token we allow."""
    for name in ("gpt2", "llama2", "unigram"):
        tokenizer = tokenizers[name]
        ids = (tokenizer.encode("hello 😀 world 日本 ", add_special_tokens=False) * 3000)[:20000]
        detokenizer = IncrementalDetokenizer(tokenizer, [], True)
        start = time.thread_time()
        for token_id in ids:
            detokenizer.push([token_id])
        per_token_us = (time.thread_time() - start) / len(ids) * 1e6
        assert per_token_us < 15, (name, per_token_us)
