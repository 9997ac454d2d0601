"""Every data set by its file, and what is said of a broken one."""

from __future__ import annotations

import gzip
import json

import pytest

from fewbit.demo import demo_model
from fewbit.errors import CheckpointError, RecipeError, RequestError
from fewbit.measure.load import Sample, Wanted, dataset_named, datasets, fingerprint, load_of
from fewbit.text import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    try:
        return Tokenizer.load(demo_model())
    except CheckpointError as error:
        pytest.skip(f"NO STORYTELLER, so no tokens were counted: {error}")


def written(path, rows) -> object:
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def asked(name: str, count: int, path=None, **options) -> list[Sample]:
    return dataset_named(name, path).read(Wanted(count, path, **options))


def test_random_prompts_have_their_lengths_and_share_their_prefix(tokenizer):
    found = asked(
        "random", 40, tokenizer=tokenizer, input_tokens=100, output_tokens=20, range_ratio=0.5, prefix_tokens=8
    )
    lengths = [len(s.prompt) for s in found]
    assert all(s.prompt_tokens == len(s.prompt) for s in found)
    assert 58 <= min(lengths) < 80 < max(lengths) <= 158
    assert 10 <= min(s.output_tokens for s in found) < max(s.output_tokens for s in found) <= 30
    assert len({s.prompt[:8] for s in found}) == 1
    assert len({s.prompt[8:16] for s in found}) == 40
    assert not {i for s in found for i in s.prompt} & tokenizer.special_ids
    assert found == asked(
        "random", 40, tokenizer=tokenizer, input_tokens=100, output_tokens=20, range_ratio=0.5, prefix_tokens=8
    )


def test_random_text_has_the_tokens_it_says(tokenizer):
    found = asked("random", 10, tokenizer=tokenizer, input_tokens=64, as_text=True)
    assert all(s.prompt_tokens == len(tokenizer.encode(s.prompt)) for s in found)
    assert all(abs(s.prompt_tokens - 64) <= 2 for s in found)


def test_sharegpt_is_filtered_as_vllm_does(tmp_path, tokenizer):
    def talk(*turns):
        return {"id": "x", "conversations": [{"from": "human", "value": turn} for turn in turns]}

    story = "Once upon a time there lived a king. "
    entries = [
        talk(story, story * 2, "more"),
        talk("Hi", story),  # a prompt under four tokens
        talk(story, "No."),  # an answer under four
        talk(story * 200, story),  # a prompt over 1,024
        talk(story * 50, story * 200),  # over 2,048 together
        talk(story),  # one turn
    ]
    path = tmp_path / "s.json"
    path.write_text(json.dumps(entries))
    (one,) = {s.prompt: s for s in asked("sharegpt", 3, path, tokenizer=tokenizer)}.values()
    assert one.prompt == story
    assert one.output_tokens == len(tokenizer.encode(story * 2))
    assert one.prompt_tokens == len(tokenizer.encode(story))
    assert asked("sharegpt", 1, path, tokenizer=tokenizer, output_tokens=9)[0].output_tokens == 9


def test_jsonl_of_every_kind(tmp_path):
    rows = [
        {"prompt": "a", "output_tokens": 5, "id": 1},
        {"prompt": [1, 2]},
        {"text": "b"},
        {"ids": [3]},
        {"messages": [{"role": "user", "content": "c"}]},
        {"turns": ["d", "e"], "words": [1, 1]},
    ]
    found = asked("jsonl", 6, written(tmp_path / "a.jsonl.gz", [*rows, ""]))
    by = {json.dumps(s.prompt): s for s in found}
    assert by.keys() == {'"a"', "[1, 2]", '"b"', "[3]", '[{"role": "user", "content": "c"}]', '"d"'}
    assert by['"a"'].output_tokens == 5
    assert by['"b"'].output_tokens == 128
    assert by["[1, 2]"].prompt_tokens == 2


def test_a_small_file_comes_again_only_when_all_was_asked(tmp_path):
    path = written(tmp_path / "a.jsonl", [{"prompt": str(i)} for i in range(10)])
    found = [s.prompt for s in asked("jsonl", 25, path, seed=4)]
    assert len(set(found[:10])) == len(set(found[10:20])) == 10
    assert found[:10] != sorted(found[:10])


def test_trtllm(tmp_path):
    rows = [{"task_id": 0, "prompt": "a", "output_tokens": 3}, {"task_id": 1, "input_ids": [5, 6], "output_tokens": 4}]
    found = asked("trtllm", 2, written(tmp_path / "d.jsonl", rows))
    assert sorted((str(s.prompt), s.output_tokens) for s in found) == [("(5, 6)", 4), ("a", 3)]


def test_a_trace_keeps_its_order_its_times_and_its_shared_blocks(tmp_path, tokenizer):
    rows = [
        {"timestamp": 500, "input_length": 1100, "output_length": 7, "hash_ids": [1, 2, 3]},
        {"timestamp": 600, "input_length": 600, "output_length": 8, "hash_ids": [1, 9]},
        {"timestamp": 1500.5, "text_input": "hello", "output_length": 9},
    ]
    path = written(tmp_path / "t.jsonl", rows)
    reader = dataset_named("trace", path)
    found = reader.read(wanted := Wanted(3, path, tokenizer))
    assert [len(s.prompt) for s in found[:2]] == [1100, 600]
    assert found[0].prompt[:512] == found[1].prompt[:512]
    assert found[0].prompt[512:600] != found[1].prompt[512:600]
    assert [s.output_tokens for s in found] == [7, 8, 9]
    assert load_of(reader, wanted, rate=None).due == pytest.approx([0, 0.1, 1.0005])
    assert load_of(reader, wanted, rate=None, time_scale=2).due == pytest.approx([0, 0.2, 2.001])
    assert load_of(reader, wanted, rate=1).due[-1] == pytest.approx(3)  # the rate asked for has the last word
    other = reader.read(Wanted(3, path, tokenizer, seed=1))
    assert other[0].prompt != found[0].prompt
    assert fingerprint(other) != fingerprint(found) == fingerprint(reader.read(wanted))


BROKEN = [
    ("jsonl", ['{"prompt": "a"}', "{"], "line 2: not JSON"),
    ("jsonl", ["[1]"], "line 1: expected an object, found list"),
    ("jsonl", ['{"prompt": "a"}', "", '{"promt": "a"}'], "line 3: expected one of prompt, text, .* found none"),
    ("jsonl", [{"prompt": "a", "text": "b"}], "line 1: .*found prompt and text"),
    ("jsonl", [{"prompt": ""}], "line 1: prompt holds no text"),
    ("jsonl", [{"turns": []}], "line 1: turns holds no text"),
    ("jsonl", [{"ids": [1, -1]}], "line 1: expected token ids"),
    ("jsonl", [{"messages": "hi"}], "line 1: expected messages"),
    ("jsonl", [{"prompt": "a", "output_tokens": 0}], "line 1: output_tokens is 0; expected a whole number from 1 on"),
    ("jsonl", [""], "holds no row"),
    ("trtllm", [{"prompt": "a"}], "line 1: output_tokens is missing"),
    ("trtllm", [{"output_tokens": 1}], "line 1: expected prompt"),
    ("trace", [{"input_length": 3}], "line 1: timestamp is None"),
    ("trace", [{"timestamp": 5, "text_input": "a"}, {"timestamp": 4, "text_input": "a"}], "line 2: timestamp 4 comes"),
    ("trace", [{"timestamp": 0, "text_input": "a"}], "holds 1 requests, 2 are wanted"),
    ("trace", [{"timestamp": 0, "input_length": 9}], "give the model's directory with --tokenizer"),
    ("trace", [{"timestamp": 0}], "line 1: expected one of input_length"),
]


@pytest.mark.parametrize(("name", "rows", "says"), BROKEN, ids=[f"{n}-{i}" for i, (n, _, _) in enumerate(BROKEN)])
def test_a_broken_file_is_told_by_its_line(name, rows, says, tmp_path):
    with pytest.raises((RecipeError, RequestError), match=says):
        asked(name, 2, written(tmp_path / "a.jsonl", rows))


def test_sharegpt_that_is_none(tmp_path, tokenizer):
    path = tmp_path / "s.json"
    for text, says in [
        ("[\n{]", "line 2: not JSON"),
        ("{}", "expected a list of conversations, found dict"),
        ('[{"conversations": "x"}]', "entry 1: expected conversations"),
        ('[{"conversations": []}]', "none of 1 conversations passes"),
    ]:
        path.write_text(text)
        with pytest.raises(RequestError, match=says):
            asked("sharegpt", 1, path, tokenizer=tokenizer)


def test_files_and_names_that_are_none(tmp_path):
    assert datasets().keys() == {"random", "jsonl", "sharegpt", "trtllm", "trace"}
    with pytest.raises(RequestError, match="no data set 'sharegtp'; did you mean 'sharegpt'"):
        dataset_named("sharegtp", None)
    with pytest.raises(RequestError, match="jsonl is read from a file"):
        dataset_named("jsonl", None)
    with pytest.raises(RequestError, match="random reads no file"):
        dataset_named("random", tmp_path)
    with pytest.raises(RequestError, match=r"random draws tokens .* give the model's directory"):
        asked("random", 1)
    with pytest.raises(RecipeError, match="cannot be read"):
        asked("jsonl", 1, tmp_path / "missing.jsonl")
    (tmp_path / "a.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(RecipeError, match="cannot be read"):
        asked("jsonl", 1, tmp_path / "a.jsonl.gz")
    (tmp_path / "b.jsonl").write_bytes(b"\xff")
    with pytest.raises(RecipeError, match="not UTF-8 at byte 0"):
        asked("jsonl", 1, tmp_path / "b.jsonl")


def test_prompts_of_the_shared_data(shared_data):
    found = asked("jsonl", 64, shared_data / "prompts" / "long_prompts.jsonl.gz")
    assert len({s.prompt for s in found}) == 64
