"""Who runs when, how requests end, and what is refused: a scheduler alone, its model a made-up sequence of tokens."""

import pytest
from tiny_engine import EOS, VOCAB, config, request

from fewbit.engine.batch import Drawn
from fewbit.engine.scheduler import Scheduler
from fewbit.engine.types import Ending, Event, OverloadedError
from fewbit.errors import RequestError


def step(scheduler, token=7):
    batch = scheduler.schedule()
    events = scheduler.commit(batch, {p.id: Drawn(token) for p in batch.pieces if p.draw})
    scheduler.check()
    return batch, events


def finish(scheduler, token=7):
    events = []
    while scheduler.requests:
        events += step(scheduler, token)[1]
    return events


def shape(batch):
    return [(p.id, p.first, len(p.tokens)) for p in batch.pieces]


def test_decodes_come_first_then_chunks_in_the_rest_of_the_budget():
    s = Scheduler(config(max_batch_tokens=8))
    s.submit(request([1, 2, 3], "a"))
    s.submit(request(range(1, 13), "b"))
    assert shape(step(s)[0]) == [("a", 0, 3), ("b", 0, 5)]
    assert shape(step(s)[0]) == [("a", 3, 1), ("b", 5, 7)]
    batch, events = step(s)
    assert shape(batch) == [("a", 4, 1), ("b", 12, 1)]
    assert [e.token for e in events] == [7, 7]


def test_a_chunk_that_stops_short_draws_nothing():
    s = Scheduler(config(max_batch_tokens=8))
    s.submit(request(range(1, 13), "a"))
    batch, events = step(s)
    assert batch.pieces[0].draw is None
    assert events == []
    assert step(s)[0].pieces[0].draw is not None


def test_a_newcomer_gets_its_first_token_while_another_decodes():
    s = Scheduler(config(max_batch_tokens=8))
    s.submit(request([1, 2], "old", max_tokens=20))
    for _ in range(3):
        step(s)
    s.submit(request(range(1, 30), "new"))
    order = [(e.id, e.ending is not None) for e in finish(s)]
    assert order.index(("new", False)) < order.index(("old", True))
    assert order.index(("new", False)) == 5, "29 tokens in chunks of 7 beside one decode"


def test_a_long_prompt_does_not_stall_who_is_being_answered():
    s = Scheduler(config(max_batch_tokens=8))
    s.submit(request([1, 2], "old", max_tokens=20))
    step(s)
    s.submit(request(range(1, 60), "new"))
    for _ in range(6):
        assert "old" in [e.id for e in step(s)[1]]


@pytest.mark.parametrize("policy", ["max_utilization", "guaranteed_no_evict"])
def test_a_small_pool_finishes_everybody(policy):
    s = Scheduler(config(num_blocks=8, policy=policy))
    for i in range(6):
        s.submit(request([1, 2, 3, i + 10], f"r{i}", max_tokens=20))
    events = finish(s)
    assert [e.ending.reason for e in events if e.ending] == ["length"] * 6
    assert sum(e.token is not None for e in events) == 6 * 20
    evicted = s.stats().preemptions_total
    assert (evicted > 0) == (policy == "max_utilization")
    assert s.stats().blocks_free == 8


def test_no_evict_admits_only_what_fits_to_its_end():
    s = Scheduler(config(num_blocks=8, policy="guaranteed_no_evict"))
    for i in range(3):
        s.submit(request([1, 2, 3], f"r{i}", max_tokens=14))  # 16 stored tokens: 4 blocks
    batch, _ = step(s)
    assert [p.id for p in batch.pieces] == ["r0", "r1"]
    assert s.stats().blocks_free == 0
    assert s.stats().waiting == 1


def test_the_youngest_is_put_back_and_comes_first_again():
    s = Scheduler(config(num_blocks=5, prefix_cache=False))
    s.submit(request([1] * 5, "old", max_tokens=9))
    s.submit(request([2] * 5, "young", max_tokens=9))
    s.submit(request([3] * 5, "waiting", max_tokens=2))
    assert len(s.schedule().pieces) == 2
    while not s.stats().preemptions_total:
        step(s)
    assert [r.id for r in s.running] == ["old"]
    assert [r.id for r in s.waiting] == ["young", "waiting"]
    assert [e.id for e in finish(s) if e.ending] == ["old", "young", "waiting"]


def test_the_lowest_priority_number_runs_first():
    s = Scheduler(config(num_blocks=5, max_batch=2, prefix_cache=False))
    for name, priority in (("low", 5), ("plain", 0), ("late", 0), ("urgent", -1)):
        s.submit(request([priority + 10] * 5, name, max_tokens=9, priority=priority))
    assert [r.id for r in s.waiting] == ["urgent", "plain", "late", "low"]
    assert [e.id for e in finish(s) if e.ending] == ["urgent", "plain", "late", "low"]


def test_a_better_priority_takes_the_blocks_of_who_came_before():
    s = Scheduler(config(num_blocks=5, prefix_cache=False))
    s.submit(request([1] * 5, "low", max_tokens=9, priority=1))
    step(s)
    s.submit(request([2] * 5, "urgent", max_tokens=9))
    while not s.stats().preemptions_total:
        step(s)
    assert [r.id for r in s.running] == ["urgent"]
    assert [e.id for e in finish(s) if e.ending] == ["urgent", "low"]


def test_equal_prompts_under_different_salts_share_nothing():
    s = Scheduler(config())
    cached = {}
    for name, salt in (("a", ""), ("b", "one"), ("c", "two"), ("d", "one"), ("e", "")):
        s.submit(request(range(1, 13), name, max_tokens=2, salt=salt))
        (event,) = [e for e in finish(s) if e.ending]
        cached[name] = event.ending.cached_tokens
    assert cached == {"a": 0, "b": 0, "c": 0, "d": 8, "e": 8}


@pytest.mark.parametrize("length", [1, 8, 9, 30])
def test_without_output_a_prompt_is_only_stored(length):
    s = Scheduler(config(max_batch_tokens=8))
    s.submit(request(range(1, length + 1), "a", max_tokens=0))
    (event,) = finish(s)
    assert event == Event("a", ending=Ending("length", prompt_tokens=length))
    assert s.stats().computed_tokens_total == length
    assert s.stats().blocks_cached == length // 4, "what it stored is known to those who follow"


def test_a_repeated_prompt_computes_only_its_last_block():
    s = Scheduler(config())
    s.submit(request(range(1, 13), "a", max_tokens=2))
    finish(s)
    s.submit(request(range(1, 13), "b", max_tokens=2))
    batch, _ = step(s)
    assert shape(batch) == [("b", 8, 4)]
    (event,) = [e for e in finish(s) if e.ending]
    assert event.ending.cached_tokens == 8
    assert s.stats().prefix_hits_total == 8
    assert s.stats().prefix_queries_total == 24


def test_endings():
    s = Scheduler(config())
    s.submit(request([1], "length", max_tokens=1))
    s.submit(request([1], "eos", ignore_eos=False))
    s.submit(request([1], "stop", stop_token_ids=(5,)))
    s.submit(request([1], "ignore"))
    batch = s.schedule()
    tokens = {"length": 9, "eos": EOS, "stop": 5, "ignore": EOS}
    events = {e.id: e for e in s.commit(batch, {i: Drawn(t) for i, t in tokens.items()})}
    assert events["length"].token == 9
    assert events["length"].ending.reason == "length"
    for name, token in (("eos", EOS), ("stop", 5)):
        assert events[name].token is None
        assert events[name].ending.reason == "stop"
        assert events[name].ending.stop_token == token
        assert events[name].ending.output_tokens == 0
        assert events[name].ending.prompt_tokens == 1
    assert events["ignore"].token == EOS
    assert events["ignore"].ending is None
    assert s.stats().endings_total == {"length": 1, "stop": 2}


def test_below_min_tokens_nothing_may_end_a_request():
    s = Scheduler(config())
    s.submit(request([1], "a", ignore_eos=False, stop_token_ids=(5,), min_tokens=2))
    forbidden = [step(s)[0].pieces[0].draw.forbidden for _ in range(3)]
    assert forbidden == [(EOS, 5), (EOS, 5), ()]


def test_a_fault_of_one_row_ends_that_request_only():
    s = Scheduler(config())
    s.submit(request([1], "bad"))
    s.submit(request([2], "good", max_tokens=1))
    events = {e.id: e for e in s.commit(s.schedule(), {"bad": Drawn(fault="NaN"), "good": Drawn(4)})}
    assert events["bad"].ending.reason == "error"
    assert events["bad"].ending.detail == "NaN"
    assert events["good"].ending.reason == "length"
    s.check()


def test_abort_frees_everything_and_happens_once():
    s = Scheduler(config())
    for name in ("running", "waiting"):
        s.submit(request(range(1, 10), name))
        if name == "running":
            step(s)
    batch = s.schedule()
    for name in ("running", "waiting"):
        (event,) = s.abort(name)
        assert event.ending.reason == "abort"
        assert s.abort(name) == []
    assert s.abort("never there") == []
    assert s.commit(batch, {p.id: Drawn(1) for p in batch.pieces}) == [], "it ended while the step ran"
    assert s.stats().blocks_free == 64
    s.check()


@pytest.mark.parametrize(
    ("prompt", "params", "param", "words"),
    [
        ([], {}, "prompt", "the prompt is empty"),
        ([1, VOCAB], {}, "prompt", f"prompt[1] is token id {VOCAB}, outside the vocabulary of {VOCAB}"),
        ([-1], {}, "prompt", "prompt[0] is token id -1"),
        ([1] * 128, {}, "prompt", "128 tokens and the model length is 128"),
        ([1] * 100, {"max_tokens": 29}, "max_tokens", "100 + max_tokens 29 = 129 tokens exceed"),
        ([1], {"max_tokens": -1}, "max_tokens", "at least 0, got -1"),
        ([1] * 129, {"max_tokens": 0}, "prompt", "shorten it to at most 128"),
        ([1], {"min_tokens": 9}, "min_tokens", "at most max_tokens (8), got 9"),
        ([1], {"temperature": float("nan")}, "temperature", "got nan"),
        ([1], {"temperature": -1.0}, "temperature", "at least 0"),
        ([1], {"top_p": 0.0}, "top_p", "in (0, 1], got 0.0"),
        ([1], {"top_k": -2}, "top_k", "got -2"),
        ([1], {"min_p": 1.5}, "min_p", "in [0, 1]"),
        ([1], {"repetition_penalty": 0.0}, "repetition_penalty", "0.001, 1000"),
        ([1], {"presence_penalty": 2.5}, "presence_penalty", "in [-2, 2]"),
        ([1], {"frequency_penalty": -2.5}, "frequency_penalty", "in [-2, 2]"),
        ([1], {"logprobs": 21}, "logprobs", "in [0, 20]"),
        ([1], {"seed": 2**64}, "seed", "2**64"),
        ([1], {"stop_token_ids": (VOCAB,)}, "stop_token_ids", "outside the vocabulary"),
        ([1], {"bad_words": ((),)}, "bad_words", "an empty sequence"),
        ([1], {"bad_words": ((1,),) * 129}, "bad_words", "at most 128 words, got 129"),
        ([1], {"prompt_logprobs": 21}, "prompt_logprobs", "in [0, 20]"),
        ([1], {"logit_bias": ((VOCAB, 1.0),)}, "logit_bias", "outside the vocabulary"),
        ([1], {"logit_bias": ((1, 101.0),)}, "logit_bias", "in [-100, 100], got 101.0 for token id 1"),
        ([1], {"logit_bias": ((1, float("nan")),)}, "logit_bias", "got nan for token id 1"),
        ([1], {"logit_bias": ((1, 1.0), (1, 2.0))}, "logit_bias", "token id 1 more than once"),
        ([1], {"logit_bias": ((1, 1.0),) * 1025}, "logit_bias", "at most 1024 entries, got 1025"),
        ([1], {"allowed_token_ids": ()}, "allowed_token_ids", "1 to 4096 ids, got 0"),
        ([1], {"allowed_token_ids": (-1,)}, "allowed_token_ids", "token id -1"),
        ([1], {"priority": 2**31}, "priority", "got 2147483648"),
        ([1], {"salt": "x" * 257}, "salt", "at most 256 characters long, got 257"),
    ],
)
def test_what_cannot_be_honoured_is_refused_in_one_line(prompt, params, param, words):
    s = Scheduler(config())
    with pytest.raises(RequestError) as caught:
        s.submit(request(prompt, **params))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.param == param
    assert not s.requests


def test_a_request_that_never_fits_is_refused_with_the_arithmetic():
    s = Scheduler(config(num_blocks=4))
    assert s.config.max_model_len == 17, "the pool holds 16 tokens, and the last one is never stored"
    s.submit(request([1] * 10, "fits", max_tokens=7))
    finish(s)
    with pytest.raises(RequestError, match=r"10 \+ max_tokens 8 = 18 tokens exceed the model length of 17"):
        s.submit(request([1] * 10, max_tokens=8))


def test_an_id_in_use_and_a_full_queue_are_refused():
    s = Scheduler(config(max_queued=2))
    s.submit(request([1], "a"))
    with pytest.raises(RequestError, match="'a' is still running"):
        s.submit(request([1], "a"))
    s.submit(request([1], "b"))
    with pytest.raises(OverloadedError, match="2 requests are waiting"):
        s.submit(request([1], "c"))
    finish(s)
    s.submit(request([1], "a"))


def test_prompts_that_wait_are_limited_in_tokens():
    s = Scheduler(config(max_queued_tokens=20))
    s.submit(request([1] * 30, "alone"))  # longer than all that may wait, and nobody waits
    with pytest.raises(OverloadedError, match="30 tokens are waiting already, and a prompt of 2 would make them more"):
        s.submit(request([1] * 2))
    step(s)
    s.submit(request([1] * 12, "a"))
    s.submit(request([1] * 8, "b"))
    assert (s.stats().waiting, s.stats().waiting_tokens, s.stats().waiting_preempted) == (2, 20, 0)
    with pytest.raises(OverloadedError, match="max_queued_tokens"):
        s.submit(request([1]))
    finish(s)
    s.submit(request([1]))


def test_seeds_are_kept_or_drawn_reproducibly():
    seeds = []
    for _ in range(2):
        s = Scheduler(config(seed=5))
        s.submit(request([1], "given", seed=77))
        s.submit(request([1], "drawn"))
        seeds.append([p.draw.seed for p in s.schedule().pieces])
    assert seeds[0] == seeds[1]
    assert seeds[0][0] == 77
