"""SentencePiece models as tokenizer.json: the library's own ids for any text."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest
import sentencepiece

from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.text.tokenizer import Tokenizer

TEXT = [
    "Once upon a time there was a little fox who was afraid of the dark and lived with his mother under an old oak.",
    "The rain came down all day, and the children sat at the window and told each other stories about the sea.",
    "un, deux, trois, quatre, cinq; größer, naïve, 東京 🙂 def f(x): return x + 1",
] * 20
LLAMA = {
    "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "split_digits": True,
    "remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True,
}  # fmt: skip
KINDS = {
    "as Llama": LLAMA,
    "no first space": LLAMA | {"add_dummy_prefix": False},
    "symbols of the user": LLAMA | {"add_dummy_prefix": False, "user_defined_symbols": ["<|user|>"]},
    "unigram": {"model_type": "unigram", "byte_fallback": True, "hard_vocab_limit": False},
    "unigram without bytes": {"model_type": "unigram", "hard_vocab_limit": False},
}


def train(folder: Path, **options: object) -> sentencepiece.SentencePieceProcessor:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_prefix=str(folder / "tokenizer"), vocab_size=400, minloglevel=2, **options
    )
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


@pytest.mark.parametrize("kind", KINDS)
def test_the_ids_are_those_of_the_library(kind, tmp_path):
    theirs, ours = train(tmp_path, **KINDS[kind]), Tokenizer.load(tmp_path)
    r = random.Random(0)
    words = " ".join(TEXT[:3]).split(" ")
    for _ in range(100):
        text = r.choice(["", " ", "  "]) + " ".join(r.choices([*words, "x", "7", "", "é", "zz\n", "<|user|>"], k=12))
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text), repr(text)
    ids = ours.encode("The rain came down")
    assert ids[0] == theirs.bos_id() == ours._backend.token_to_id("<s>")
    assert ours.decode(ids) == "The rain came down"


def test_it_is_converted_once(tmp_path):
    train(tmp_path, **LLAMA)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False, "add_eos_token": True}))
    made = Tokenizer.load(tmp_path)
    assert made.encode("sea")[-1] == made._backend.token_to_id("</s>")
    assert made.encode("sea")[0] != made._backend.token_to_id("<s>")
    (tmp_path / "tokenizer.model").unlink()
    assert Tokenizer.load(tmp_path).encode("the sea") == made.encode("the sea")


def test_without_the_extra_one_line_says_so(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UnsupportedError, match=r"only tokenizer.model: install .*'fewbit\[sentencepiece\]'"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"x", b"\x0a\xff\xff"])
def test_a_damaged_model_is_named(tmp_path, content):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.model is no SentencePiece model"):
        Tokenizer.load(tmp_path)


def test_words_are_not_supported(tmp_path):
    train(tmp_path, model_type="char", hard_vocab_limit=False)
    with pytest.raises(UnsupportedError, match="neither a BPE nor a unigram"):
        Tokenizer.load(tmp_path)
