"""A tokenizer opens as transformers opens it, and says clearly why it does not."""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer

from fewbit.errors import CheckpointError, RequestError
from fewbit.text import Tokenizer


def same(directory, texts):
    ours, theirs = Tokenizer.load(directory), AutoTokenizer.from_pretrained(directory)
    for text in texts:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs.encode(text, add_special_tokens=special)
            for skip in (True, False):
                assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.special_ids == {i for i, t in theirs.added_tokens_decoder.items() if t.special}
    assert ours.vocab_size == len(theirs)
    return ours, theirs


def test_equals_transformers(model_dir, texts):
    ours, theirs = same(model_dir, texts)
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.eos_ids == {theirs.eos_token_id}


@pytest.mark.parametrize("flags", [{"add_bos_token": False}, {"add_bos_token": True, "add_eos_token": True}])
def test_the_post_processor_of_the_file_decides(write_dir, make, flags, texts):
    same(write_dir(make, flags), texts[:5])


def test_tokenizer_classes_that_transformers_rebuilds(write_dir, texts):
    # Llama's class there sets its own spaces at the start and after special tokens, whatever tokenizer.json says;
    # we follow the file.
    leading = [t for t in texts if not t.startswith((" ", "<"))]
    same(write_dir("metaspace", {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True}), leading)
    same(write_dir("byte_level", {"tokenizer_class": "GPT2TokenizerFast", "add_bos_token": False}), texts[:5])


def test_tokens_that_only_the_config_knows(write_dir):
    config = {
        "pad_token": {"__type": "AddedToken", "content": "<pad>", "special": True},
        "extra_special_tokens": ["<|tool|>"],
        "added_tokens_decoder": {"900": {"content": "<think>", "special": False, "normalized": False}},
    }
    ours, theirs = same(write_dir("byte_level", config), ["<pad>a<|tool|>b<think>c"])
    assert ours.encode("<|tool|>", add_special_tokens=False) == [theirs.convert_tokens_to_ids("<|tool|>")]


def test_special_tokens_map_of_older_directories(write_dir):
    directory = write_dir("byte_level", {"eos_token": None}, special_tokens_map={"eos_token": {"content": "<|end|>"}})
    ours, theirs = same(directory, ["hi<|end|>"])
    assert ours.eos_id == theirs.eos_token_id == ours.encode("<|end|>", add_special_tokens=False)[0]


def test_eos_ids_join_the_tokenizer_and_the_model(write_dir):
    ours = Tokenizer.load(
        write_dir(
            "byte_level",
            generation_config={"eos_token_id": [3, 4]},
            model_config={"eos_token_id": 2, "bos_token_id": 9},
        )
    )
    assert ours.eos_ids == {2, 3, 4}
    assert ours.bos_id == 1  # the tokenizer's own name for it wins


def test_ids_from_the_model_where_the_tokenizer_names_none(write_dir):
    ours = Tokenizer.load(
        write_dir(
            "byte_level", {"bos_token": None, "eos_token": None}, model_config={"bos_token_id": 3, "eos_token_id": [4]}
        )
    )
    assert (ours.bos_id, ours.eos_id, ours.eos_ids) == (3, 4, {4})


def test_no_ends_at_all(write_dir):
    ours = Tokenizer.load(write_dir("unigram", {"bos_token": None, "eos_token": None}))
    assert (ours.bos_id, ours.eos_id, ours.eos_ids, ours.chat_template) == (None, None, frozenset(), None)


def test_padding_and_truncation_of_the_file_are_off(write_dir, backends, tmp_path):
    directory = write_dir("byte_level")
    layout = json.loads((directory / "tokenizer.json").read_text())
    layout["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (directory / "tokenizer.json").write_text(json.dumps(layout))
    assert len(Tokenizer.load(directory).encode("a much longer text than four tokens")) > 4


def test_bytes_of_tokens_join_to_the_text(model_dir, make, texts):
    if make == "wordpiece":
        pytest.skip("its decoder puts spaces between tokens, no token holds them")
    ours = Tokenizer.load(model_dir)
    for text in ("naïve 🙂 東京 größer", "un deux trois"):
        ids = ours.encode(text, add_special_tokens=False)
        if make != "unigram":  # which has <unk> for what it never saw
            assert b"".join(ours.token_bytes(i) for i in ids).decode().removeprefix(" ") == text
    assert ours.token_bytes(ours.vocab_size + 5) == b""
    assert ours.token_bytes(1) == b"<s>"


def test_longest_token_bounds_the_count(model_dir):
    ours = Tokenizer.load(model_dir)
    text = "Once upon a time there was a little girl"
    assert len(ours.encode(text)) >= len(text) / ours.longest_token


def test_unknown_ids_decode_to_nothing(model_dir):
    assert Tokenizer.load(model_dir).decode([10**6, -1, 1 << 40]) == ""


def test_lone_surrogate_is_refused(model_dir):
    with pytest.raises(RequestError, match=r"lone surrogate \(U\+D800\) at character 2"):
        Tokenizer.load(model_dir).encode("ab\ud800c")


def test_missing_tokenizer_says_how_to_convert(tmp_path):
    with pytest.raises(CheckpointError, match=r"no tokenizer.json \(no other tokenizer file is there\)"):
        Tokenizer.load(tmp_path)
    (tmp_path / "vocab.json").write_bytes(b"{}")
    with pytest.raises(CheckpointError, match=r"holds vocab.json.*save_pretrained"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", ["", "[1]", "{", "{}", '{"model": {"type": "BPE", "vocab": 3}}'])
def test_broken_tokenizer_names_the_file(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_broken_config_names_the_file(write_dir):
    directory = write_dir("byte_level")
    (directory / "generation_config.json").write_text("{nope")
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        Tokenizer.load(directory)
