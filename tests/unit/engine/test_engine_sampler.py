"""The sampler against a plain float64 one that does each step of the sampler's text with loops and numpy."""

import math
import random

import numpy as np
import pytest
import torch

from fewbit.engine.batch import Draw
from fewbit.engine.sampler import NO_TOKEN, NOT_FINITE, choose, uniform
from fewbit.engine.types import SamplingParams

VOCAB = 50


def draw(tokens=(1, 2), prompt=1, seed=0, forbidden=(), mask=None, **params):
    return Draw(SamplingParams(**params), seed, list(tokens), prompt, tuple(forbidden), mask)


def bits(ids, vocab=VOCAB):
    """A mask that allows these ids."""
    return sum(1 << i for i in set(ids)).to_bytes(-(-vocab // 32) * 4, "little")


def reference(logits, d):
    """Token and the distribution it was drawn from."""
    p, x = d.params, [float(v) for v in logits]
    output = d.tokens[d.prompt_tokens :]
    for t in set(d.tokens):
        x[t] = x[t] / p.repetition_penalty if x[t] > 0 else x[t] * p.repetition_penalty
    for t in set(output):
        x[t] -= p.frequency_penalty * output.count(t) + p.presence_penalty
    for t, bias in p.logit_bias:
        x[t] += bias
    masked = {i for i in range(len(x)) if d.mask is not None and not int.from_bytes(d.mask, "little") >> i & 1}
    others = set() if p.allowed_token_ids is None else set(range(len(x))) - set(p.allowed_token_ids)
    for t in {*d.forbidden, *masked, *others}:
        x[t] = -math.inf
    for word in p.bad_words:
        head = list(word[:-1])
        if not head or list(d.tokens[-len(head) :]) == head:
            x[word[-1]] = -math.inf
    if p.temperature == 0:
        return max(range(len(x)), key=lambda i: (x[i], -i)), None
    x = np.array(x) / p.temperature
    prob = np.exp(x - x.max())
    prob /= prob.sum()
    prob[prob < p.min_p * prob.max()] = 0
    order = sorted(range(len(x)), key=lambda i: (-prob[i], i))
    if p.top_k > 0:
        prob[order[p.top_k :]] = 0
    prob /= prob.sum()
    if p.top_p < 1:
        total = 0.0
        for i in order:
            if total >= p.top_p:
                prob[i] = 0
            else:
                total += prob[i]
        prob /= prob.sum()
    cumulative, u = 0.0, uniform(d.seed, len(d.tokens))
    for i, v in enumerate(prob):
        cumulative += v
        if cumulative > u:
            return i, prob
    raise AssertionError


def random_params(rng):
    def pick(*values):
        return rng.choice(values)

    return {
        "temperature": pick(0.0, 0.3, 1.0, 2.5),
        "top_k": pick(0, 0, -1, 1, 5, 1000),
        "top_p": pick(1.0, 1.0, 0.3, 0.9),
        "min_p": pick(0.0, 0.0, 0.05, 0.5),
        "repetition_penalty": pick(1.0, 1.0, 1.3, 0.7),
        "presence_penalty": pick(0.0, 0.0, 1.1, -1.5),
        "frequency_penalty": pick(0.0, 0.0, 0.6, -0.4),
        "bad_words": pick((), (), ((3,), (1, 2, 4))),
        "logprobs": pick(None, None, 0, 4),
        "logit_bias": pick((), (), ((5, 100.0), (6, -3.5)), ((0, -100.0), (49, 2.0))),
        "allowed_token_ids": pick(None, None, None, (49, 3, 8, 11, 20, 21, 22)),
    }


@pytest.mark.parametrize("trial", range(40))
def test_a_mixed_batch_equals_the_plain_reference(trial):
    rng = random.Random(trial)
    logits = torch.from_numpy(np.random.default_rng(trial).normal(size=(8, 50)) * 3).float()
    draws = []
    for _ in range(8):
        tokens = [rng.randrange(50) for _ in range(rng.randint(1, 20))] + rng.choice([[], [1, 2]])
        prompt = rng.randint(1, len(tokens))
        forbidden = rng.choice([(), (0, 7)])
        mask = rng.choice([None, None, bits([0, 7, 8, 11, 20, 31, 32, 33, 49])])
        draws.append(draw(tokens, prompt, rng.getrandbits(64), forbidden, mask, **random_params(rng)))
    before = logits.clone()
    drawn = choose(logits, draws).read()
    assert torch.equal(logits, before)
    for row, (d, got) in enumerate(zip(draws, drawn, strict=True)):
        assert got.token == reference(logits[row], d)[0], d
        assert not got.fault
        alone = choose(logits[row : row + 1], [d]).read()[0]
        assert alone == got, "neighbours change nothing"
        if d.params.logprobs is None:
            assert got.logprobs is None
            continue
        raw = logits[row].double().log_softmax(-1)
        assert got.logprobs.chosen == raw[got.token].item()
        best = sorted(range(50), key=lambda i: (-raw[i], i))[: d.params.logprobs]
        assert [i for i, _ in got.logprobs.top] == best
        assert all(v == raw[i].item() for i, v in got.logprobs.top)


def test_draws_follow_the_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    d = [draw(seed=s, temperature=1.0, top_k=3) for s in range(8000)]
    tokens = torch.tensor([x.token for x in choose(logits.expand(8000, 4), d).read()])
    share = torch.bincount(tokens, minlength=4) / 8000
    expected = torch.cat([logits[0, :3].softmax(0), torch.zeros(1)])
    assert (share - expected).abs().max() < 0.02
    assert share[3] == 0


def test_uniform_depends_on_seed_and_position_only():
    values = [uniform(s, p) for s in (0, 1, 2**64 - 1) for p in range(1000)]
    assert len(set(values)) == 3000
    assert all(0 <= v < 1 for v in values)
    assert abs(np.mean(values) - 0.5) < 0.02
    assert uniform(7, 9) == uniform(7, 9)


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-3, 1e308])
def test_no_temperature_overflows(temperature):
    logits = torch.tensor([[1.0, 80.0, -80.0, 2.0]])
    (got,) = choose(logits, [draw(temperature=temperature, forbidden=[0])]).read()
    assert not got.fault
    assert got.token in (1, 2, 3)
    if temperature < 1:
        assert got.token == 1


def test_greedy_takes_the_lowest_id_of_equals():
    assert choose(torch.tensor([[1.0, 5.0, 5.0]]), [draw(temperature=0.0)]).read()[0].token == 1


def test_top_k_keeps_exactly_k_of_equals():
    d = [draw(seed=s, temperature=1.0, top_k=2) for s in range(200)]
    assert {x.token for x in choose(torch.ones(200, 5), d).read()} == {0, 1}


def test_top_p_keeps_the_token_that_reaches_it():
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log().expand(300, 3)
    for top_p, kept in ((1e-9, {0}), (0.45, {0}), (0.55, {0, 1}), (0.85, {0, 1, 2})):
        d = [draw(seed=s, temperature=1.0, top_p=top_p) for s in range(300)]
        assert {x.token for x in choose(logits, d).read()} == kept


def test_a_mask_shorter_than_a_word_of_32_or_longer_than_the_vocabulary():
    for vocab in (1, 31, 32, 33, 64, 65):
        logits = torch.arange(vocab * 2.0).view(2, vocab)
        only = vocab // 2
        mask = bits([only, vocab, vocab + 1], vocab + 2)[: -(-vocab // 32) * 4]
        first, second = choose(logits, [draw(temperature=0.0, mask=mask), draw(temperature=0.0)]).read()
        assert (first.token, second.token) == (only, vocab - 1)


def test_a_mask_that_allows_nothing_is_a_fault():
    assert choose(torch.zeros(1, 50), [draw(mask=bytes(8))]).read()[0].fault == NO_TOKEN


def test_no_token_left_and_broken_logits_are_faults_of_their_row_only():
    logits = torch.zeros(4, 3)
    logits[1, 2], logits[2, 1] = float("nan"), float("inf")
    draws = [draw(temperature=t, bad_words=w) for t, w in ((1.0, ((0,), (1,), (2,))), (1.0, ()), (0.0, ()), (0.0, ()))]
    faults = [x.fault for x in choose(logits, draws).read()]
    assert faults == [NO_TOKEN, NOT_FINITE, NOT_FINITE, ""]


def test_a_bad_word_begun_in_the_prompt_is_not_completed():
    logits = torch.tensor([[0.0, 9.0, 1.0]])
    d = draw([5, 2, 0], 3, temperature=0.0, bad_words=((2, 0, 1),))
    assert choose(torch.tensor([[0.0, 9.0, 1.0]]), [d]).read()[0].token == 2
    d = draw([5, 0], 2, temperature=0.0, bad_words=((2, 0, 1),))
    assert choose(logits, [d]).read()[0].token == 1
    d = draw([0], 1, temperature=0.0, bad_words=((2, 0, 1),))
    assert choose(logits, [d]).read()[0].token == 1, "shorter than the word"
