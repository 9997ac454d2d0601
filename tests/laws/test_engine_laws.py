"""Laws of the engine over random lives of requests: nothing leaks, everything ends once, schedules change no answer."""

from __future__ import annotations

import functools
import sys
from collections import Counter
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "engine"))

from tiny_engine import EOS, config, engine, request

from fewbit.engine.batch import Drawn
from fewbit.engine.blocks import BlockPool, chain
from fewbit.engine.engine import generate
from fewbit.engine.scheduler import Scheduler
from fewbit.engine.types import TokenLogprobs

OPTIONS = st.fixed_dictionaries(
    {
        "block_size": st.sampled_from([1, 2, 4]),
        "num_blocks": st.integers(24, 40),
        "max_batch": st.integers(1, 6),
        "max_batch_tokens": st.integers(6, 20),
        "prefix_cache": st.booleans(),
        "policy": st.sampled_from(["max_utilization", "guaranteed_no_evict"]),
    }
)
# few different tokens, so that prefixes meet often
PROMPT = st.lists(st.integers(1, 2), min_size=1, max_size=12)
ACTION = st.one_of(
    st.tuples(st.just("submit"), PROMPT, st.integers(0, 12), st.integers(-1, 1), st.booleans()),
    st.tuples(st.just("abort"), st.integers(0, 20)),
    st.tuples(st.just("step"), st.sampled_from([1, 2, 5, EOS]), st.booleans()),
    st.tuples(st.just("fail")),
)


def echoed(piece) -> tuple[TokenLogprobs, ...]:
    """What a runner would say about a prompt; here each position says its own number."""
    if piece.echo is None:
        return ()
    first, count = piece.echo.first, len(piece.echo.tokens)
    assert piece.first <= first < first + count <= piece.end, "only what the step computes can be looked at"
    return tuple(TokenLogprobs(float(i)) for i in range(first, first + count))


@settings(max_examples=150, deadline=None)
@given(OPTIONS, st.lists(ACTION, max_size=60), st.booleans())
def test_no_block_leaks_and_every_request_ends_exactly_once(options, actions, overlapping):
    """`overlapping`: each step is planned before the one before it is committed."""
    scheduler = Scheduler(config(**options))
    submitted, events = [], []
    echoing: dict[str, int] = {}  # positions of a prompt that are to be reported
    under_way: list[tuple] = []

    def commit() -> None:
        while under_way:
            events.extend(scheduler.commit(*under_way.pop(0)))

    for action in [*actions, *[("step", 5, False)] * 1000]:
        match action:
            case ("submit", prompt, wanted, priority, echo):
                submitted.append(f"r{len(submitted)}")
                echoing[submitted[-1]] = len(prompt) - 1 if echo else 0
                given = {"max_tokens": wanted, "priority": priority, "prompt_logprobs": 0 if echo else None}
                scheduler.submit(request(prompt, submitted[-1], ignore_eos=False, **given))
            case ("abort", which) if which < len(submitted):
                events += scheduler.abort(submitted[which])
            case ("step", token, aborts):
                batch = scheduler.schedule()
                assert batch.tokens <= scheduler.config.max_batch_tokens
                assert len(batch.pieces) <= scheduler.config.max_batch
                if not under_way:
                    assert bool(batch.pieces) == bool(scheduler.requests), "whoever can go on does"
                drawn = {p.id: Drawn(token, prompt_logprobs=echoed(p)) for p in batch.pieces if p.draw or p.echo}
                if aborts and batch.pieces:
                    events += scheduler.abort(batch.pieces[0].id)  # while the step runs
                if overlapping:
                    scheduler.advance(batch)
                    commit()
                    under_way += [(batch, drawn)]
                else:
                    events += scheduler.commit(batch, drawn)
            case ("fail",):
                commit()
                batch = scheduler.schedule()
                events += scheduler.fail(batch, "on purpose")
        scheduler.check()
        if action == ("step", 5, False) and not scheduler.requests:
            commit()
            break
    assert Counter(e.id for e in events if e.ending) == dict.fromkeys(submitted, 1)
    ended = set()
    for event in events:
        assert event.id not in ended, "nothing comes after an ending"
        if event.ending:
            ended.add(event.id)
            outputs = sum(e.id == event.id and e.token is not None for e in events)
            assert event.ending.output_tokens == outputs
            its = [e for e in events if e.id == event.id]
            said = [x.chosen for e in its for x in e.prompt_logprobs]
            assert said == list(range(len(said))), "in order, none twice"
            if event.ending.reason in ("stop", "length"):
                assert len(said) == echoing[event.id], "none lost"
            first = next(i for i, e in enumerate(its) if e.token is not None or e.ending)
            assert not any(e.prompt_logprobs for e in its[first:]), "the prompt comes before the answer"
    assert scheduler.stats().blocks_free == options["num_blocks"]
    if options["policy"] == "guaranteed_no_evict":
        assert scheduler.stats().preemptions_total == 0


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 12), st.integers(1, 3), st.lists(st.tuples(st.integers(0, 5), PROMPT), max_size=40))
def test_the_pool_shares_only_true_prefixes(num_blocks, size, actions):
    pool = BlockPool(num_blocks, size)
    tables: dict[int, list[int]] = {}
    contents: dict[int, tuple[int, ...]] = {}  # block to all tokens up to its end, as its writer knew them
    for slot, tokens in actions:
        if slot in tables:
            pool.release(tables.pop(slot))
        digests = []
        for i in range(len(tokens) // size):
            digests.append(chain(digests[-1] if digests else b"", tokens[i * size : (i + 1) * size]))
        found = pool.match(digests, tokens)
        assert len(found) * size < len(tokens)
        for i, block in enumerate(found):
            assert contents[block] == tuple(tokens[: (i + 1) * size])
        table = list(found)
        pool.hold(table)
        if not pool.grow(table, len(tokens)):
            pool.release(table)
            continue
        tables[slot] = table
        for i in range(len(found), len(tokens) // size):
            contents[table[i]] = tuple(tokens[: (i + 1) * size])
            pool.publish(table[i], digests[i], tokens[i * size : (i + 1) * size])
        pool.check(tables.values())


@functools.cache
def alone(prompt: tuple[int, ...], wanted: int) -> tuple[int, ...]:
    (output,) = generate(engine(max_batch_tokens=64), [request(prompt, max_tokens=wanted)])
    return output.tokens


@settings(max_examples=30, deadline=None)
@given(
    OPTIONS,
    st.lists(st.tuples(PROMPT, st.integers(1, 10), st.integers(0, 3)), min_size=1, max_size=6),
    st.booleans(),
)
def test_greedy_answers_are_the_same_under_every_schedule(options, lives, overlapping):
    machine = engine(overlapping=overlapping, **options)
    answers: dict[str, list[int]] = {}
    events = []
    for index, (prompt, wanted, steps) in enumerate(lives):
        answers[f"r{index}"] = []
        machine.submit(request(prompt, f"r{index}", max_tokens=wanted))
        for _ in range(steps):
            events += machine.step()
    while machine.has_work:
        events += machine.step()
        machine.scheduler.check()
    for event in events:
        if event.token is not None:
            answers[event.id].append(event.token)
    for index, (prompt, wanted, _) in enumerate(lives):
        assert tuple(answers[f"r{index}"]) == alone(tuple(prompt), wanted)
