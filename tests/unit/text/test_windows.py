"""A corpus is cut into windows by one rule, lazily, and bad rows are named."""

from __future__ import annotations

import copy
import gzip
import json

import pytest

from fewbit.errors import RecipeError
from fewbit.text import ChatTemplate, Tokenizer, read_documents, windows
from helpers import TEMPLATE


@pytest.fixture
def tokenizer(write_dir):
    return Tokenizer.load(write_dir("byte_level"))


def file(tmp_path, name, text):
    path = tmp_path / name
    data = text.encode() if isinstance(text, str) else text
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


def joined(tokenizer, documents):
    return [i for d in documents for i in [tokenizer.bos_id, *tokenizer.encode(d, add_special_tokens=False)]]


@pytest.mark.parametrize("zipped", ["", ".gz"])
def test_reading(tmp_path, zipped):
    rows = '{"text": "a\\u2028b", "id": 3}\n\n{"ids": [1, 2]}\r\n{"text": "c"}'
    assert list(read_documents(file(tmp_path, f"d.jsonl{zipped}", rows))) == ["a\u2028b", [1, 2], "c"]
    assert list(read_documents(file(tmp_path, f"d.txt{zipped}", "a\r\n\nb\n"))) == ["a\r\n\nb\n"]


def test_reading_is_lazy(tmp_path):
    documents = read_documents(file(tmp_path, "d.jsonl", '{"text": "a"}\nnonsense'))
    assert next(documents) == "a"
    with pytest.raises(RecipeError, match="line 2"):
        next(documents)


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("d.jsonl", '{"text": "a"}\n{"text": ', r"line 2"),
        ("d.jsonl", '{"txt": "a"}', r"line 1: .* with one of \"text\", \"messages\" and \"ids\", got keys \['txt'\]"),
        ("d.jsonl", '{"messages": []}', r"line 1: \"messages\" must be a list of one or more objects"),
        ("d.jsonl", '{"messages": ["hi"]}', r"line 1: \"messages\" must be a list of one or more objects"),
        ("d.jsonl", '{"text": "a", "ids": [1]}', r"line 1: expected"),
        ("d.jsonl", "[1]", r"line 1: expected an object .* got list"),
        ("d.jsonl", '{"text": 3}', r"line 1: \"text\" must be a string, got int"),
        ("d.jsonl", '{"text": "\\ud800"}', r"line 1: .*surrogate"),
        ("d.jsonl", '{"ids": []}', r"line 1: \"ids\" must be"),
        ("d.jsonl", '{"ids": [1, true]}', r"line 1: \"ids\" must be"),
        ("d.jsonl", '{"ids": [1, 2.0]}', r"line 1: \"ids\" must be"),
        ("d.jsonl", "[" * 100_000, r"line 1"),
        ("d.jsonl", "\n\n", r"holds no text"),
        ("d.txt", "", r"holds no text"),
        ("d.txt.gz", "", r"holds no text"),
        ("d.txt", b"\xff\xfe\x00", r"not UTF-8"),
        ("d.csv", "a", r"expected a file ending in \.txt"),
    ],
)
def test_bad_files(tmp_path, name, text, why):
    with pytest.raises(RecipeError, match=why):
        list(read_documents(file(tmp_path, name, text)))


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(RecipeError, match="no such file"):
        read_documents(tmp_path / "gone.txt")
    (tmp_path / "d.txt.gz").write_bytes(b"plain")
    with pytest.raises(RecipeError, match="not readable"):
        list(read_documents(tmp_path / "d.txt.gz"))
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress(b'{"text": "abc"}' * 100)[:-20])
    with pytest.raises(RecipeError, match=r"e\.jsonl\.gz"):
        list(read_documents(tmp_path / "e.jsonl.gz"))


def test_documents_are_joined_with_bos_and_cut(tokenizer):
    documents = ["Once upon a time", "", "un deux trois quatre", "x"]
    ids = joined(tokenizer, [d for d in documents if d])
    got = windows(documents, tokenizer, 5)
    assert got == [ids[i : i + 5] for i in range(0, len(ids) - 4, 5)]
    assert windows(documents, tokenizer, 5, 2) == got[:2]
    assert windows(documents, tokenizer, 5, 99) == got


def test_the_short_rest_is_dropped_unless_it_is_all(tokenizer):
    ids = joined(tokenizer, ["Once upon"])
    assert windows(["Once upon"], tokenizer, 1000) == [ids]
    assert windows(["Once upon"], tokenizer, len(ids) - 1) == [ids[:-1]]


def test_eos_joins_where_there_is_no_bos_and_nothing_where_there_is_neither(write_dir):
    eos = Tokenizer.load(write_dir("byte_level", {"bos_token": None, "add_bos_token": False}))
    assert windows(["abc"], eos, 99)[0][0] == eos.eos_id
    bare = Tokenizer.load(write_dir("unigram", {"bos_token": None, "eos_token": None}))
    assert windows(["un"], bare, 99) == [bare.encode("un", add_special_tokens=False)]


def test_rows_of_ids_are_windows_as_they_are(tokenizer):
    text = "Once upon a time"
    n = len(joined(tokenizer, [text]))
    assert windows([[1, 2, 3], text, [4]], tokenizer, n) == [[1, 2, 3], joined(tokenizer, [text]), [4]]
    with pytest.raises(RecipeError, match="token id 100000, outside the vocabulary"):
        windows([[1, 100000]], tokenizer, 4)


@pytest.mark.parametrize("make", ["byte_level", "metaspace", "unigram"])
def test_only_what_is_needed_is_tokenized(write_dir, make, monkeypatch):
    tokenizer = Tokenizer.load(write_dir(make))
    text = "Once upon a time there was a little girl.\n\n  naïve 東京 🙂  x\n" * 20000
    whole = windows([text[:60_000]], tokenizer, 64)
    seen, encode = [], tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda t, **k: seen.append(len(t)) or encode(t, **k))
    never = (pytest.fail("read on") for _ in range(1))
    got = windows((d for part in ([text], never) for d in part), tokenizer, 64, 16)
    assert got == whole[:16]
    assert sum(seen) < 60_000


def test_conversations_are_written_by_the_models_template(tmp_path, tokenizer):
    """What the template opens with is not doubled."""
    talker = copy.copy(tokenizer)
    names = {"bos_token": tokenizer.decode([tokenizer.bos_id], skip_special_tokens=False)}
    talker.chat_template = ChatTemplate(TEMPLATE, names)
    talk = [{"role": "user", "content": "Who is there?"}, {"role": "assistant", "content": "The fox."}]
    path = file(tmp_path, "c.jsonl", "\n".join(json.dumps({"messages": talk}) for _ in range(3)))
    text = talker.chat_template.render(talk, add_generation_prompt=False)
    each = tokenizer.encode(text, add_special_tokens=False)
    assert each[0] == tokenizer.bos_id
    assert [t for w in windows(read_documents(path), talker, len(each)) for t in w] == each * 3
    with pytest.raises(RecipeError, match="the model has no chat template"):
        windows(read_documents(path), tokenizer, 8)
    talker.chat_template = ChatTemplate("{{ raise_exception('no') }}", names)
    with pytest.raises(RecipeError, match="chat messages of the data: "):
        windows(read_documents(path), talker, 8)


def test_settings_that_make_no_sense(tokenizer):
    for length, count in ((0, None), (8, 0)):
        with pytest.raises(RecipeError, match="at least 1"):
            windows(["x"], tokenizer, length, count)
    with pytest.raises(RecipeError, match="no text"):
        windows(["", ""], tokenizer, 8)


def test_corpus_of_json_lines_end_to_end(tmp_path, tokenizer):
    path = file(tmp_path, "c.jsonl.gz", "\n".join(json.dumps({"text": f"story {i} un deux"}) for i in range(50)))
    got = windows(read_documents(path), tokenizer, 8, 4)
    assert [len(w) for w in got] == [8] * 4
