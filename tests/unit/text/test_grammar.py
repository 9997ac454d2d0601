"""Grammars: outputs keep to them whatever the tokenizer, and no text of a stranger takes long or breaks anything."""

from __future__ import annotations

import gc
import json
import os
import random
import re
import signal
import time
import weakref
from concurrent.futures import ThreadPoolExecutor, wait

import pytest

from fewbit.errors import RequestError
from fewbit.text import Tokenizer, grammar
from fewbit.text import trial as trials
from fewbit.text.trial import Trial, trial

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def allowed(matcher) -> list[int]:
    mask = int.from_bytes(matcher.mask(), "little")
    return [i for i in range(mask.bit_length()) if mask >> i & 1]


def walk(tokenizer: Tokenizer, text: str, seed: int = 0, limit: int = 400, **more) -> str:
    """A random output that keeps to a grammar."""
    matcher, choose, ids = (
        grammar.compile(text, tokenizer, tokenizer.vocab_size, **more),
        random.Random(seed).choice,
        [],
    )
    while not matcher.done:
        token = choose(allowed(matcher))
        if token in tokenizer.eos_ids:
            break
        matcher.accept(token)
        ids.append(token)
        assert len(ids) < limit
    return b"".join(tokenizer.token_bytes(i) for i in ids).decode()


@pytest.mark.parametrize("make", ["byte_level", "metaspace"], indirect=True)
def test_random_outputs_keep_to_it(model_dir):
    tokenizer = Tokenizer.load(model_dir)
    for seed in range(4):
        person = json.loads(walk(tokenizer, grammar.from_json_schema(PERSON), seed))
        assert person.keys() == {"name", "age"}
        assert len(person["name"]) <= 8
        assert 0 <= person["age"] <= 150
        assert re.fullmatch(r"[a-f]{3,5}(-\d)?", walk(tokenizer, grammar.from_regex(r"^[a-f]{3,5}(-\d)?$"), seed))
        assert walk(tokenizer, grammar.from_choices(["one", "two three", "a+b?"]), seed) in {"one", "two three", "a+b?"}
        assert re.fullmatch("a*b", walk(tokenizer, grammar.from_lark('start: "a" start | "b"'), seed))
        assert re.fullmatch("ba*", walk(tokenizer, grammar.from_lark('start: start "a" | "b"'), seed)), "left recursion"
        assert re.fullmatch("(ab)+", walk(tokenizer, grammar.from_lark('root ::= "ab" | "ab" root'), seed))


@pytest.mark.parametrize("make", ["unigram"], indirect=True)
def test_a_vocabulary_without_the_characters(model_dir):
    tokenizer = Tokenizer.load(model_dir)
    assert re.fullmatch("[a-f]{2}", walk(tokenizer, grammar.from_regex("[a-f]{2}")))
    with pytest.raises(RequestError, match="no token of this model can come next"):
        grammar.compile(grammar.any_json_object(), tokenizer, tokenizer.vocab_size)


@pytest.fixture
def tokenizer(write_dir) -> Tokenizer:
    return Tokenizer.load(write_dir("byte_level"))


def follow(tokenizer, text: str, output: str, **more):
    matcher = grammar.compile(text, tokenizer, tokenizer.vocab_size, **more)
    for token in tokenizer.encode(output, add_special_tokens=False):
        matcher.accept(token)
    return matcher


def test_where_an_output_may_end(tokenizer):
    (eos,) = tokenizer.eos_ids
    words = grammar.from_regex("ab*")
    assert eos not in allowed(follow(tokenizer, words, ""))
    assert eos in allowed(follow(tokenizer, words, "ab"))
    assert not follow(tokenizer, words, "ab").done, "it may go on"
    done = follow(tokenizer, grammar.from_regex("ab{2}"), "abb")
    assert done.done
    assert allowed(done) == [eos]
    assert set(allowed(follow(tokenizer, words, "ab", eos_ids=(7, 9)))) >= {7, 9}
    assert allowed(follow(tokenizer, grammar.from_choices(["a"]), "a", eos_ids=())) == []
    assert follow(tokenizer, grammar.any_json_object(), '{"a": [1, 2]}').done


def test_any_object_is_an_object(tokenizer):
    matcher = grammar.compile(grammar.any_json_object(), tokenizer, tokenizer.vocab_size)
    assert {tokenizer.token_bytes(i)[:1] for i in allowed(matcher)} == {b"{"}
    for output in ('{"a": {"b": [1, null, true, "x"]}, "c": -1.5e3}', "{}"):
        assert follow(tokenizer, grammar.any_json_object(), output).done


def test_ids_that_are_no_text_are_never_allowed(tokenizer):
    matcher = grammar.compile(grammar.from_regex("(?s:.)*"), tokenizer, tokenizer.vocab_size + 70)
    found = set(allowed(matcher))
    assert len(matcher.mask()) == -(-(tokenizer.vocab_size + 70) // 32) * 4
    assert max(found) < tokenizer.vocab_size
    assert found & tokenizer.special_ids == set(tokenizer.eos_ids)


def test_a_token_that_is_not_allowed_is_an_error(tokenizer):
    matcher = grammar.compile(grammar.from_regex("ab"), tokenizer, tokenizer.vocab_size)
    with pytest.raises(RequestError, match="left the grammar"):
        matcher.accept(tokenizer.encode("x", add_special_tokens=False)[0])


def test_matchers_of_one_grammar_know_nothing_of_each_other(tokenizer):
    text = grammar.from_regex("ab|cd")
    first, second = (grammar.compile(text, tokenizer, tokenizer.vocab_size) for _ in range(2))
    before = second.mask()
    first.accept(tokenizer.encode("a", add_special_tokens=False)[0])
    assert second.mask() == before != first.mask()


def nested(depth: int) -> dict:
    schema: dict = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def laughs(kind: str) -> dict:
    def two(i):
        return [{"$ref": f"#/$defs/a{i + 1}"}, {"type": "array", "items": {"$ref": f"#/$defs/a{i + 1}"}}]

    return {"$defs": {f"a{i}": {kind: two(i)} for i in range(40)} | {"a40": {"type": "string"}}, "$ref": "#/$defs/a0"}


BAD = {
    "regex that ends early": (lambda: grammar.from_regex("("), "invalid regular expression: unclosed group"),
    "half an escape": (lambda: grammar.from_regex("a\\"), "the grammar cannot be used"),
    "look-around": (lambda: grammar.from_regex("(?=a)b"), "look-around"),
    "empty regex": (lambda: grammar.from_regex(""), "at least one character, got ''"),
    "remote reference": (lambda: grammar.from_json_schema({"$ref": "http://x.y/z"}), "'http://x.y/z' leads out of"),
    "file": (lambda: grammar.from_json_schema({"$ref": "file:///etc/passwd"}), "nothing is fetched"),
    "reference to nothing": (lambda: grammar.from_json_schema({"$ref": "#/$defs/x"}), "does not exist"),
    "reference to itself": (lambda: grammar.from_json_schema({"$ref": "#"}), "nothing satisfies it"),
    "a million values": (lambda: grammar.from_json_schema({"enum": list(range(1_000_000))}), "1000001 values"),
    "long values": (lambda: grammar.from_json_schema({"const": "x" * (1 << 21)}), "1048576 at most"),
    "deep": (lambda: grammar.from_json_schema(nested(10_000)), "nested more than 128 levels"),
    "pattern of a wrong type": (
        lambda: grammar.from_json_schema({"pattern": 5, "type": "string"}),
        "for 'pattern', got 5",
    ),
    "unknown type": (lambda: grammar.from_json_schema({"type": "strin"}), "Invalid type: strin"),
    "empty range": (lambda: grammar.from_json_schema({"type": "integer", "minimum": 5, "maximum": 3}), "Unsatisfiable"),
    "contradiction": (
        lambda: grammar.from_json_schema({"allOf": [{"type": "string"}, {"type": "integer"}]}),
        "Unsatisfiable",
    ),
    "not": (lambda: grammar.from_json_schema({"not": {}}), "Unimplemented keys"),
    "no schema": (lambda: grammar.from_json_schema([]), "a JSON schema is an object, got list"),  # type: ignore[arg-type]
    "no choice": (lambda: grammar.from_choices([]), "1 to 10000 texts, got 0"),
    "empty choice": (lambda: grammar.from_choices(["a", ""]), "choice[1]"),
    "rule without an end": (lambda: grammar.from_lark("start: start"), "nothing satisfies it"),
    "unknown rule": (lambda: grammar.from_lark("start: x"), 'unknown name: "x"'),
    "empty grammar": (lambda: grammar.from_lark("  "), "the grammar is empty"),
    "EBNF that ends early": (lambda: grammar.from_lark("root ::= ("), "cannot be converted: Expected ')'"),
    "deep EBNF": (lambda: grammar.from_lark("root ::= " + "(" * 9000 + '"a"' + ")" * 9000), "cannot be converted"),
    "long EBNF": (lambda: grammar.from_lark("root ::= " + '"a" ' * 50_000), "65536 characters, got 200009"),
    "slow schema": (lambda: grammar.from_json_schema({"type": "integer", "multipleOf": 999_983}), "too complex"),
    "no grammar at all": (lambda: "{}", "the grammar cannot be used"),
}
FINE = {
    "nested stars": lambda: grammar.from_regex("(a+)+$"),
    "nested counts": lambda: grammar.from_regex("(.{1,5000}){1,5000}"),
    "many states": lambda: grammar.from_regex(".*a.{20}b"),
    "many choices": lambda: grammar.from_choices([f"choice {i}" for i in range(5000)]),
    "a list that refers to itself": lambda: grammar.from_json_schema(
        {"$defs": {"n": {"type": "object", "properties": {"next": {"$ref": "#/$defs/n"}}}}, "$ref": "#/$defs/n"}
    ),
    "doubling references": lambda: grammar.from_json_schema(laughs("anyOf")),
    "oneOf": lambda: grammar.from_json_schema({"oneOf": [nested(1), {"type": "integer"}]}),
    "ambiguous": lambda: grammar.from_lark('start: start start | "a" | "aa" | "aaa"'),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_used_is_said_in_one_line_at_once(tokenizer, case):
    make, words = BAD[case]
    trial("{}")  # the child is there
    began = time.monotonic()
    with pytest.raises(RequestError) as caught:
        grammar.compile(make(), tokenizer, tokenizer.vocab_size)
    assert time.monotonic() - began < 60  # one on a quiet machine, and minutes without the limits
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert caught.value.param == "grammar"


@pytest.mark.parametrize("case", FINE)
def test_what_looks_bad_and_is_fine(tokenizer, case):
    began = time.monotonic()
    matcher = grammar.compile(FINE[case](), tokenizer, tokenizer.vocab_size)
    choose, slowest = random.Random(1).choice, 0.0
    for _ in range(60):
        start = time.thread_time()
        try:
            if matcher.done:
                break
            options = [i for i in allowed(matcher) if i not in tokenizer.eos_ids]
            matcher.accept(choose(options))
        except RequestError as error:
            assert "too complex" in str(error)  # noqa: PT017 - the walk may end so, in words
            break
        slowest = max(slowest, time.thread_time() - start)
    assert time.monotonic() - began < 60
    assert slowest < 5  # some 20 ms on a quiet machine


def test_a_child_that_is_killed_or_breaks_down_is_replaced():
    own = Trial()
    assert own(grammar.from_regex("a")) == ""
    child = own._child
    child.kill()
    child.wait()
    assert own(grammar.from_regex("b")) == ""
    assert own._child.pid != child.pid
    own._child.stdin.write(b"no json\n")
    own._child.stdin.flush()
    assert "broke down" in own(grammar.from_regex("c"))
    assert own(grammar.from_regex("d")) == ""
    own._child.stdin.close()
    assert own._child.wait(60) == 0, "it ends with its parent"


def test_the_same_grammar_is_tried_once(monkeypatch):
    own = Trial()
    slow = grammar.from_json_schema({"type": "integer", "multipleOf": 999_979})
    tries, try_it = [], own._try
    monkeypatch.setattr(own, "_try", lambda text: (tries.append(text), try_it(text))[1])
    for _ in range(2):
        assert "too complex: compiling it took more than 0.6 s" in own(slow)
        assert own(grammar.from_regex("a")) == ""
    assert tries == [slow, grammar.from_regex("a")]
    own.stop()


def test_a_child_that_a_busy_machine_holds_up_is_waited_for(monkeypatch):
    own = Trial()
    assert own(grammar.from_regex("a")) == ""
    os.kill(own._child.pid, signal.SIGSTOP)
    monkeypatch.setattr(trials, "_PATIENCE", 100)
    with ThreadPoolExecutor(1) as pool:
        trying = pool.submit(own, grammar.from_regex("b"))
        done, _ = wait([trying], timeout=2 * trials.LIMIT_S)
        os.kill(own._child.pid, signal.SIGCONT)
        assert (done, trying.result(60)) == (set(), "")
    own.stop()


def test_a_grammar_that_was_late_is_tried_again_and_one_that_is_wrong_is_not(monkeypatch):
    own, good = Trial(), grammar.from_regex("a")
    assert own(grammar.from_regex("b")) == ""
    os.kill(own._child.pid, signal.SIGSTOP)
    monkeypatch.setattr(trials, "_PATIENCE", 0.2)
    assert "too complex" in own(good)
    monkeypatch.setattr(trials, "_PATIENCE", 100)
    assert "too complex" in own(good)
    wrong = own("{}")
    monkeypatch.setattr(trials.time, "monotonic", lambda now=time.monotonic: now() + 31)
    assert own(good) == ""
    monkeypatch.setattr(own, "_try", None)
    assert own("{}") == wrong != ""
    own.stop()


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """A child may take minutes to import what it needs where others run too."""
    monkeypatch.setattr(trials, "_START_S", 300.0)


def test_a_child_that_does_not_start_says_nothing_of_the_grammar(monkeypatch, tmp_path):
    own, mute = Trial(), tmp_path / "mute.py"
    mute.write_text("import time; time.sleep(600)")
    monkeypatch.setattr(trials, "__file__", str(mute))
    monkeypatch.setattr(trials, "_START_S", 0.1)
    assert "did not start" in own(grammar.from_regex("a"))


def test_what_is_compiled_does_not_keep_a_tokenizer_alive(write_dir):
    mine = Tokenizer.load(write_dir("byte_level"))
    grammar.compile(grammar.from_regex("a"), mine, mine.vocab_size)
    gone = weakref.ref(mine)
    del mine
    gc.collect()
    assert gone() is None
