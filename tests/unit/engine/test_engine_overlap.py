"""A step is planned while the one before it runs: nobody can tell from the answers."""

from __future__ import annotations

import pytest
from tiny_engine import EOS, engine, request, run

from fewbit.engine.engine import generate

PROMPTS = [[5, 9, 1, 40], list(range(1, 23)), [7], [11, 12] * 9, list(range(1, 20))]
WISHES = [
    {},
    {"temperature": 0.9, "top_k": 20, "seed": 3},
    {"repetition_penalty": 1.3, "frequency_penalty": 0.4},
    {"bad_words": ((9,), (1, 2)), "logprobs": 2},
    {"min_tokens": 6, "ignore_eos": False, "temperature": 1.0, "seed": 1},
    {"max_tokens": 1},
]


@pytest.mark.parametrize(
    "options", [{}, {"max_batch_tokens": 8}, {"num_blocks": 13}, {"block_size": 1, "num_blocks": 40}]
)
def test_answers_are_those_of_one_step_at_a_time(options):
    asked = [(p, {"max_tokens": 14} | w) for p in PROMPTS for w in WISHES]

    def answers(overlapping: bool):
        machine = engine(overlapping=overlapping, **options)
        outputs = generate(machine, [request(p, f"r{i}", **w) for i, (p, w) in enumerate(asked)])
        assert machine.stats().blocks_free == machine.stats().blocks
        assert not machine.has_work
        return [(o.tokens, len(o.logprobs), o.ending.reason) for o in outputs]

    assert answers(True) == answers(False)


def test_an_abort_while_a_step_runs():
    machine = engine(overlapping=True)
    for name in "ab":
        machine.submit(request([1, 2, 3], name))
    machine.step()
    machine.step()
    assert [e.ending.reason for e in machine.abort("a")] == ["abort"]
    machine.submit(request([4, 5], "a", max_tokens=2))  # the same name again, while the old one's step is under way
    events = run(machine)
    assert sum(e.id == "a" and e.token is not None for e in events) == 2
    assert [e.id for e in events if e.ending] == ["a", "b"]


def test_a_stop_token_ends_what_was_launched_beyond_it():
    machine = engine(overlapping=True)
    (free,) = generate(engine(), [request([5, 9], max_tokens=8)])
    stop = free.tokens[3]
    (output,) = generate(machine, [request([5, 9], max_tokens=8, stop_token_ids=(stop,))])
    assert output.tokens == free.tokens[: free.tokens.index(stop)]
    assert output.ending.reason == "stop"
    assert machine.stats().blocks_free == machine.stats().blocks
    assert EOS not in output.tokens


@pytest.mark.parametrize("where", ["launch", "collect"])
def test_a_step_that_fails_ends_its_own_requests_only(where, monkeypatch):
    machine = engine(overlapping=True)
    machine.submit(request([1, 2, 3], "early", max_tokens=6))
    for _ in range(3):
        machine.step()
    machine.submit(request([4], "late", max_tokens=3))
    plain = getattr(machine.runner, where)

    def broken(*args):
        monkeypatch.setattr(machine.runner, where, plain)
        raise RuntimeError("on purpose")

    monkeypatch.setattr(machine.runner, where, broken)
    events = run(machine)
    endings = {e.id: e.ending.reason for e in events if e.ending}
    assert endings.keys() == {"early", "late"}
    assert "error" in endings.values()
    machine.submit(request([6, 7], "after", max_tokens=2))
    assert [e.ending.reason for e in run(machine) if e.ending] == ["length"]
    assert machine.stats().blocks_free == machine.stats().blocks


def test_endings_that_came_before_a_breakdown_are_kept(monkeypatch):
    """A step under way is collected first; what it ended is told even if the device cannot go on."""
    machine = engine(overlapping=True)
    machine.submit(request([1, 2, 3], "done", max_tokens=2))
    machine.submit(request([4], "left", max_tokens=9))
    events = machine.step() + machine.step()

    def broken(*args):
        raise RuntimeError("on purpose")

    monkeypatch.setattr(machine.runner, "launch", broken)
    monkeypatch.setattr(machine.runner, "recover", broken)
    with pytest.raises(RuntimeError, match="on purpose"):
        machine.step()
    told = {e.id for e in events + machine.unsent if e.ending}
    assert told == {"done"}
    assert machine.scheduler.requests == ["left"]
