"""The engine on a tiny random model: the cache's bytes, what is computed, faults, and equal answers."""

import functools

import pytest
import torch
from tiny_engine import SPEC, config, decoder, engine, request, run

from fewbit.engine.attend import token_bytes
from fewbit.engine.engine import generate
from fewbit.engine.eos import eos_token_ids
from fewbit.engine.runner import Runner, free_bytes
from fewbit.errors import CheckpointError, RequestError
from fewbit.model.attend import DenseAttend

KINDS = {"float32": 4, "bfloat16": 2, "int8": 1, "fp8": 1, "int4_row": 0.5}
PROMPTS = [[5, 9, 1, 40], list(range(1, 23)), [7], [11, 12] * 9, list(range(1, 20))]


def dense_greedy(model, prompt, count):
    """Greedy continuation without any cache: the whole sequence again for every token."""
    tokens = list(prompt)
    for _ in range(count):
        attend = DenseAttend(model.codecs, len(tokens))
        hidden = model.hidden(torch.tensor(tokens), torch.arange(len(tokens)), attend)
        tokens.append(int(model.logits(hidden[-1:]).argmax()))
    return tuple(tokens[len(prompt) :])


@pytest.mark.parametrize("kv", KINDS)
def test_the_cache_is_as_large_as_its_formats_say(kv):
    model = decoder(kv)
    runner = Runner(model, config(model))
    per_token = 2 * 2 * 8 * len(SPEC.layers) * KINDS[kv]
    assert token_bytes(SPEC, model.codecs) == per_token
    assert runner.kv_bytes == 64 * 4 * per_token
    assert engine(kv).stats().kv_bytes == runner.kv_bytes


@pytest.mark.parametrize("kv", KINDS)
def test_paged_answers_equal_dense_ones(kv):
    model = decoder(kv)
    machine = engine(kv, max_batch_tokens=8)
    requests = [request(p, max_tokens=12) for p in PROMPTS]
    for given, output in zip(requests, generate(machine, requests), strict=True):
        assert output.tokens == dense_greedy(model, given.prompt, 12)
        assert output.ending.reason == "length"
    assert machine.stats().blocks_free == 64


@pytest.mark.parametrize("kv", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {"max_batch": 1, "max_batch_tokens": 1},
        {"max_batch_tokens": 9},
        {"max_batch_tokens": 100, "block_size": 1, "num_blocks": 256},
        {"num_blocks": 13},
        {"num_blocks": 13, "policy": "guaranteed_no_evict"},
        {"prefix_cache": False, "block_size": 16, "num_blocks": 8},
    ],
)
def test_the_answer_does_not_depend_on_the_schedule(kv, options):
    for params in PARAMS:
        machine = engine(kv, **options)
        outputs = generate(machine, [request(p, max_tokens=20, **params) for p in PROMPTS * 2])
        assert [o.tokens for o in outputs] == alone(kv, tuple(params.items())) * 2
        if options.get("num_blocks") == 13 and "policy" not in options:
            assert machine.stats().preemptions_total > 0


PARAMS = [{}, {"temperature": 0.8, "top_p": 0.9, "seed": 9, "frequency_penalty": 0.3}]


@functools.cache
def alone(kv, params):
    """What each prompt gets in an engine of its own, its prompt in one piece."""
    outputs = [generate(engine(kv, max_batch_tokens=128), [request(p, max_tokens=20, **dict(params))]) for p in PROMPTS]
    return [output.tokens for (output,) in outputs]


def test_a_repeated_prompt_computes_only_its_last_block():
    machine = engine()
    first, again = request(range(1, 21), max_tokens=1), request(range(1, 21), max_tokens=1)
    (a,) = generate(machine, [first])
    computed = machine.runner.computed_tokens
    assert computed == 20
    (b,) = generate(machine, [again])
    assert machine.runner.computed_tokens - computed == 4
    assert a.tokens == b.tokens
    assert (a.ending.cached_tokens, b.ending.cached_tokens) == (0, 16)
    assert machine.stats().computed_tokens_total == 24


def test_a_failing_step_ends_its_requests_and_nobody_else(monkeypatch, caplog):
    machine = engine()
    expected = generate(engine(), [request([1, 2, 3], max_tokens=5)])[0].tokens
    machine.submit(request([4, 5], "doomed"))
    machine.step()
    monkeypatch.setattr(machine.runner, "launch", lambda batch: (_ for _ in ()).throw(MemoryError("no memory\nat all")))
    (event,) = machine.step()
    assert event.ending.reason == "error"
    assert event.ending.detail == "a step of the engine failed: no memory"
    monkeypatch.undo()
    machine.scheduler.check()
    assert machine.stats().blocks_free == 64
    assert machine.stats().endings_total == {"error": 1}
    assert generate(machine, [request([1, 2, 3], max_tokens=5)])[0].tokens == expected


def test_broken_logits_end_only_their_request(monkeypatch):
    machine = engine()
    plain = machine.runner.decoder.logits

    def logits(hidden):
        out = plain(hidden)
        out[0, 5] = float("nan")
        return out

    monkeypatch.setattr(machine.runner.decoder, "logits", logits)
    machine.submit(request([1, 2], "bad", max_tokens=1))
    machine.submit(request([1, 2], "good", max_tokens=1))
    endings = {e.id: e.ending for e in run(machine)}
    assert endings["bad"].reason == "error"
    assert "not finite" in endings["bad"].detail
    assert endings["good"].reason == "length"


def test_generate_refuses_a_bad_request_and_leaves_nothing_behind():
    machine = engine()
    with pytest.raises(RequestError, match="the prompt is empty"):
        generate(machine, [request([1, 2]), request([])])
    assert not machine.has_work
    with pytest.raises(RequestError, match="same id"):
        generate(machine, [request([1], "a"), request([1], "a")])


def test_generate_takes_more_requests_than_the_queue():
    machine = engine(max_queued=2, max_batch=1)
    assert len(generate(machine, [request([i], max_tokens=2) for i in range(1, 9)])) == 8


def test_min_tokens_stop_tokens_and_bad_words_on_a_model():
    machine = engine()
    (free,) = generate(machine, [request([5, 9, 1], max_tokens=6)])
    stop = free.tokens[2]
    assert stop not in free.tokens[:2]
    (stopped,) = generate(machine, [request([5, 9, 1], max_tokens=6, stop_token_ids=(stop,))])
    assert stopped.tokens == free.tokens[:2]
    assert stopped.ending.stop_token == stop
    (longer,) = generate(machine, [request([5, 9, 1], max_tokens=6, min_tokens=4, stop_token_ids=(stop,))])
    assert len(longer.tokens) >= 4
    assert stop not in longer.tokens
    (avoids,) = generate(machine, [request([5, 9, 1], max_tokens=6, bad_words=(free.tokens[:3],))])
    assert avoids.tokens[:2] == free.tokens[:2]
    assert avoids.tokens[2] != stop


def test_free_memory_is_a_number_of_bytes():
    assert free_bytes(torch.device("cpu")) > 1 << 20


def test_eos_ids_of_the_generation_config_go_before_those_of_the_config(tmp_path):
    file = tmp_path / "generation_config.json"
    assert eos_token_ids({"eos_token_id": 2}, None) == (2,)
    assert eos_token_ids({}, None) == ()
    file.write_text('{"eos_token_id": [7, 8, 7]}')
    assert eos_token_ids({"eos_token_id": 2}, file) == (7, 8)
    file.write_text("{}")
    assert eos_token_ids({"eos_token_id": 2}, file) == (2,)
    for wrong in ('{"eos_token_id": "x"}', "[]", "{"):
        file.write_text(wrong)
        with pytest.raises(CheckpointError, match=r"generation_config\.json"):
            eos_token_ids({}, file)


def test_biases_and_allowed_ids_choose_and_leave_the_reported_logprobs_alone():
    wishes = [
        {},
        {"logit_bias": ((40, 100.0),)},
        {"allowed_token_ids": (7, 8), "temperature": 5.0, "seed": 1},
        {"allowed_token_ids": (7, 8), "logit_bias": ((8, -100.0), (40, 100.0))},
    ]
    outputs = generate(engine(), [request([1, 2, 3], logprobs=3, max_tokens=1, **w) for w in wishes])
    plain, biased, allowed, both = outputs
    assert biased.tokens == (40,)
    assert allowed.tokens[0] in (7, 8)
    assert both.tokens == (7,)
    assert biased.logprobs[0].top == allowed.logprobs[0].top == plain.logprobs[0].top
    assert biased.logprobs[0].chosen < plain.logprobs[0].chosen
