"""Log probabilities of prompts: what is reported, in which events, and in which slices it is computed."""

from __future__ import annotations

import msgspec
import pytest
import torch
from tiny_engine import VOCAB, engine, request, run

from fewbit.engine import score
from fewbit.engine.engine import generate
from fewbit.engine.sampler import NOT_FINITE, report
from fewbit.engine.scheduler import MAX_ECHO

PROMPT = [5, 9, 1, 40, 5, 9, 2, 8, 11, 12, 30, 31]


def close(found, expected):
    assert [x.chosen for x in found] == pytest.approx([x.chosen for x in expected], abs=1e-5)


def test_each_prompt_token_but_the_first_and_the_likeliest_beside_it():
    (output,) = generate(engine(), [request(PROMPT, prompt_logprobs=3, max_tokens=1)])
    logits = dense(PROMPT)
    known = torch.tensor(PROMPT[1:])
    expected = logits[:-1].double().log_softmax(-1)
    assert len(output.prompt_logprobs) == len(PROMPT) - 1
    for found, token, row in zip(output.prompt_logprobs, known, expected, strict=True):
        assert found.chosen == pytest.approx(row[token].item(), abs=1e-5)
        assert [i for i, _ in found.top] == row.topk(3).indices.tolist()
        assert dict(found.top).get(int(token), found.chosen) == found.chosen, "the identical float"


def dense(prompt):
    from fewbit.model import DenseAttend

    model = engine().runner.decoder
    tokens = torch.tensor(prompt)
    return model.logits(model.hidden(tokens, torch.arange(len(prompt)), DenseAttend(model.codecs, len(prompt))))


@pytest.mark.parametrize("overlapping", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"max_batch_tokens": 3, "max_batch": 3}, {"num_blocks": 7}, {"block_size": 1, "num_blocks": 30}]
)
def test_however_it_is_scheduled(options, overlapping):
    wishes = [{"prompt_logprobs": k, "max_tokens": n} for k in (0, 4) for n in (0, 1, 6)]
    wishes += [{}, {"logprobs": 2, "prompt_logprobs": 1}]
    machine = engine(overlapping=overlapping, **options)
    for _ in range(2):  # the second time all prefixes are known
        outputs = generate(machine, [request(PROMPT, f"r{i}", **w) for i, w in enumerate(wishes)])
        for wish, output in zip(wishes, outputs, strict=True):
            (expected,) = generate(engine(max_batch_tokens=64), [request(PROMPT, **wish)])
            assert output.tokens == expected.tokens
            assert len(output.prompt_logprobs) == (len(PROMPT) - 1 if "prompt_logprobs" in wish else 0)
            close(output.prompt_logprobs, expected.prompt_logprobs)
            assert output.ending.reason == "length"
            assert output.ending.cached_tokens == 0 or "prompt_logprobs" not in wish
    assert (machine.stats().preemptions_total > 0) == ("num_blocks" in options)


def test_a_prompt_of_one_token_has_nothing_to_report():
    (event,) = run(start(request([7], prompt_logprobs=2, max_tokens=0)))
    assert event.prompt_logprobs == ()
    assert event.ending.output_tokens == 0


def start(*requests, **options):
    machine = engine(**options)
    for one in requests:
        machine.submit(one)
    return machine


def test_events_are_bounded(monkeypatch):
    monkeypatch.setattr("fewbit.engine.scheduler.MAX_ECHO", 4)
    assert MAX_ECHO * (20 * 14 + 10) < 1 << 20, "of bytes on the wire"
    events = run(start(request(PROMPT, prompt_logprobs=0, max_tokens=1), max_batch_tokens=64))
    assert [len(e.prompt_logprobs) for e in events] == [4, 4, 3, 0]


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_slices_change_nothing(monkeypatch, rows):
    (expected,) = generate(engine(), [request(PROMPT, prompt_logprobs=2)])
    monkeypatch.setattr(score, "SLICE_BYTES", rows * VOCAB * 4)
    machine = engine()
    seen = []
    head = machine.runner.decoder.logits
    machine.runner.decoder.logits = lambda hidden: (seen.append(len(hidden)), head(hidden))[1]
    (found,) = generate(machine, [request(PROMPT, prompt_logprobs=2)])
    close(found.prompt_logprobs, expected.prompt_logprobs)
    assert max(seen) == rows


def test_logits_that_are_no_numbers_end_that_request_only():
    machine = start(request(PROMPT, "bad", prompt_logprobs=1, max_tokens=0), request([3, 4], "good", max_tokens=1))
    head = machine.runner.decoder.logits
    machine.runner.decoder.logits = lambda hidden: head(hidden) * (float("nan") if len(hidden) > 1 else 1.0)
    endings = {e.id: e.ending for e in run(machine) if e.ending}
    assert (endings["bad"].reason, endings["bad"].detail) == ("error", NOT_FINITE)
    assert endings["good"].reason == "length"


def test_the_likeliest_come_in_order_and_equals_by_their_ids():
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 300, generator=random).mul(4).round().div(4)  # many equal ones
    logits[0, :5] = torch.tensor([0.0, -0.0, float("-inf"), 0.0, -0.0])
    logits[1] = 0.0
    tokens = torch.randint(300, (40,), generator=random)
    values, ids = report(logits, tokens, 20)
    expected = logits.sort(stable=True, descending=True, dim=-1).indices[:, :20]
    assert torch.equal(ids, expected)
    logprobs = logits.double().log_softmax(-1)
    assert torch.equal(values[:, 0], logprobs[range(40), tokens])
    assert torch.equal(values[:, 1:], logprobs.gather(-1, expected))
    assert report(logits, tokens, 0)[1].shape == (40, 0)


def test_a_preempted_request_reports_what_is_left(monkeypatch):
    machine = start(request(PROMPT * 2, "a", prompt_logprobs=0, max_tokens=2), max_batch_tokens=10)
    events = machine.step()
    assert sum(len(e.prompt_logprobs) for e in events) == 10
    machine.scheduler._preempt(machine.scheduler.running[-1])
    events += run(machine)
    (expected,) = generate(engine(max_batch_tokens=64), [request(PROMPT * 2, prompt_logprobs=0, max_tokens=2)])
    close([x for e in events for x in e.prompt_logprobs], expected.prompt_logprobs)
    assert msgspec.structs.replace(events[-1].ending, cached_tokens=0) == expected.ending


def test_of_the_end_of_a_prompt_the_beginning_may_be_known():
    machine = engine(block_size=4)
    (whole,) = generate(machine, [request(PROMPT, "a", prompt_logprobs=2, max_tokens=0)])
    (tail,) = generate(machine, [request(PROMPT, "b", prompt_logprobs=2, prompt_logprobs_from=9, max_tokens=0)])
    close(tail.prompt_logprobs, whole.prompt_logprobs[8:])
    assert whole.ending.cached_tokens == 0
    assert tail.ending.cached_tokens == 8
    (past,) = generate(machine, [request(PROMPT, "c", prompt_logprobs=2, prompt_logprobs_from=40, max_tokens=0)])
    assert past.prompt_logprobs == ()
