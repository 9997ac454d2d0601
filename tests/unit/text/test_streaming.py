"""Streamed text equals text decoded at once, and stop strings cut it at the same place however tokens fall."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_makes import write

from fewbit.text import Detokenizer, TextStream, Tokenizer


@pytest.fixture(scope="module")
def tokenizers(backends, tmp_path_factory):
    root = tmp_path_factory.mktemp("makes")
    return {name: Tokenizer.load(write(root / name, backend)) for name, backend in backends.items()}


@pytest.fixture
def tokenizer(tokenizers, make):
    return tokenizers[make]


def stream(tokenizer, ids, **kwargs):
    d = Detokenizer(tokenizer, **kwargs)
    pieces = [d.push(i) for i in ids]
    return [*pieces, d.finish()]


def test_text_streams_whole(tokenizer, texts):
    for text in texts:
        ids = tokenizer.encode(text)
        for skip in (True, False):
            assert "".join(stream(tokenizer, ids, skip_special_tokens=skip)) == tokenizer.decode(ids, skip)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_ids_stream_to_their_text(tokenizers, data):
    tokenizer = tokenizers[data.draw(st.sampled_from(sorted(tokenizers)))]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    skip = data.draw(st.booleans())
    assert "".join(stream(tokenizer, ids, skip_special_tokens=skip)) == tokenizer.decode(ids, skip)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_runs_of_bytes_stream_to_their_text(tokenizers, data):
    tokenizer = tokenizers["metaspace"]
    space = tokenizer.encode("  ", add_special_tokens=False)[-1]
    pool = [*sorted(tokenizer.byte_ids)[:4], *sorted(tokenizer.byte_ids)[120:], space, 1, tokenizer.vocab_size - 1]
    ids = data.draw(st.lists(st.sampled_from(pool), max_size=30))
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_text_that_goes_on_keeps_its_space(tokenizers):
    for make in ("byte_level", "metaspace"):
        tokenizer = tokenizers[make]
        ids = tokenizer.encode("the cat and the dog", add_special_tokens=False)
        for cut in range(1, len(ids)):
            continued = "".join(stream(tokenizer, ids[cut:], after=ids[:cut]))
            assert tokenizer.decode(ids[:cut]) + continued == tokenizer.decode(ids)


def test_half_a_character_is_never_sent(tokenizers):
    for make in ("byte_level", "metaspace"):
        tokenizer = tokenizers[make]
        ids = tokenizer.encode("a👩‍👩‍👧b ∑ż", add_special_tokens=False)
        pieces = stream(tokenizer, ids)
        assert "".join(pieces) == "a👩‍👩‍👧b ∑ż"
        assert not any("\ufffd" in p for p in pieces)


def test_text_comes_while_tokens_come(tokenizers):
    tokenizer = tokenizers["byte_level"]
    ids = tokenizer.encode("Once upon a time", add_special_tokens=False)
    assert all(stream(tokenizer, ids)[:-1])


def test_peek_is_what_finish_would_give(tokenizers):
    tokenizer = tokenizers["metaspace"]
    d = Detokenizer(tokenizer)
    for i in tokenizer.encode("x\n", add_special_tokens=False):
        d.push(i)
    assert d.peek() == d.peek() == d.finish() == "\n"
    assert d.finish() == ""


def run(tokenizer, text, stop, **kwargs):
    s = TextStream(tokenizer, stop, **kwargs)
    pieces = []
    for i in tokenizer.encode(text, add_special_tokens=False):
        pieces.append(s.push(i))
        if s.stopped is not None:
            break
    return "".join([*pieces, s.finish()]), s


def test_without_stop_strings_all_text_passes(tokenizer):
    text = "un deux trois"
    assert run(tokenizer, text, [])[0] == tokenizer.decode(tokenizer.encode(text))
    assert run(tokenizer, text, [""])[0] == tokenizer.decode(tokenizer.encode(text))


@pytest.mark.parametrize("make", ["byte_level", "metaspace"])
@pytest.mark.parametrize(
    ("text", "stop", "expected", "stopped"),
    [
        ("un deux trois", ["deux"], "un ", "deux"),
        ("un deux trois", ["x tro"], "un deu", "x tro"),  # across tokens
        ("un deux trois", ["u"], "", "u"),  # the first character
        ("un deux trois", ["quatre", "trop"], "un deux trois", None),  # a beginning that was none
        ("un deux trois", ["deux", "ux"], "un ", "deux"),  # both end together: the longer one
        ("un deux trois", ["deux trois", "eu"], "un d", "eu"),  # the first that is complete
        ("line\nline", ["\n"], "line", "\n"),
        ("a 🙂🙃 b", ["🙃"], "a 🙂", "🙃"),
        ("abab abac", ["abac"], "abab ", "abac"),
    ],
)
def test_stop_strings(tokenizers, make, text, stop, expected, stopped):
    got, s = run(tokenizers[make], text, stop)
    assert (got, s.stopped) == (expected, stopped)
    with_stop, _ = run(tokenizers[make], text, stop, include_stop=True)
    assert with_stop == expected + (stopped or "")


def test_a_stop_held_back_as_a_byte_ends_at_once(tokenizers):
    tokenizer = tokenizers["metaspace"]
    s = TextStream(tokenizer, ["\n"])
    for i in tokenizer.encode("x\n", add_special_tokens=False):
        s.push(i)
    assert s.stopped == "\n"
    assert s.push(5) == s.finish() == ""


def test_a_possible_beginning_is_held_and_then_let_go(tokenizers):
    tokenizer = tokenizers["byte_level"]
    s = TextStream(tokenizer, ["deux trois quatre"])
    sent = "".join(s.push(i) for i in tokenizer.encode("un deux trois", add_special_tokens=False))
    assert sent == "un "
    assert s.finish() == "deux trois"


def test_min_tokens_come_before_any_stop(tokenizers):
    tokenizer = tokenizers["byte_level"]
    ids = tokenizer.encode("u u u", add_special_tokens=False)
    s = TextStream(tokenizer, ["u"], min_tokens=2)
    text = "".join(s.push(i) for i in ids)
    whole, free = tokenizer.decode(ids), len(tokenizer.decode(ids[:2]))
    assert (text, s.stopped) == (whole[: whole.index("u", free)], "u")


@settings(max_examples=200, deadline=None)
@given(
    ids=st.lists(st.integers(5, 260), max_size=30), stop=st.lists(st.text("abe <u", min_size=1, max_size=3), max_size=3)
)
def test_the_cut_does_not_depend_on_the_tokens(tokenizers, ids, stop):
    tokenizer = tokenizers["byte_level"]
    whole = tokenizer.decode(ids)
    ends = [(whole.find(s) + len(s), whole.find(s), s) for s in stop if s in whole]
    expected = (whole[: min(ends)[1]], min(ends)[2]) if ends else (whole, None)
    s = TextStream(tokenizer, stop)
    text = "".join([*(s.push(i) for i in ids), s.finish()])
    assert (text, s.stopped) == expected
