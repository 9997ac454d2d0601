"""Options become one value with no "auto" in it, or one clear line."""

import pytest
from tiny_engine import SPEC

from fewbit.engine.config import EngineOptions, resolve
from fewbit.errors import RecipeError


def resolved(free=1 << 20, **options):
    return resolve(EngineOptions(**options), spec=SPEC, token_bytes=64, free_bytes=free)


def test_defaults_on_a_cpu():
    c = resolved()
    assert c.max_model_len == SPEC.context
    assert c.num_blocks * 16 * 64 <= 1 << 19, "no more than half of what is free"
    assert resolved(free=1 << 40).capacity == c.max_batch * SPEC.context, "no more than can ever be used"


def test_the_cache_by_blocks_bytes_or_fraction():
    assert resolved(num_blocks=10).num_blocks == 10
    assert resolved(kv_bytes=10 * 1024 + 5).num_blocks == 10
    assert resolved(kv_fraction=0.25).num_blocks == 256


def test_a_small_cache_shortens_an_open_model_length_and_refuses_a_given_one():
    assert resolved(num_blocks=4).max_model_len == 65
    with pytest.raises(RecipeError, match=r"4 blocks of 16 = 64 tokens .*not one sequence of 66.*at least 5120 bytes"):
        resolved(num_blocks=4, max_model_len=66)
    with pytest.raises(RecipeError, match="holds 0 blocks"):
        resolved(kv_bytes=1023)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_blocks": 4, "kv_bytes": 4096}, "given 2 times"),
        ({"num_blocks": 10**6}, "1000000 x 16 tokens x 64 bytes = 1024000000 bytes, but only 1048576"),
        ({"kv_bytes": 1 << 21}, "exceeds the 1048576 bytes free"),
        ({"kv_fraction": 1.5}, "in (0, 1]"),
        ({"max_batch": 0}, "at least 1, got 0"),
        ({"max_queued_tokens": 0}, "max_queued_tokens must be at least 1, got 0"),
        ({"max_batch": 64, "max_batch_tokens": 32}, "max_batch_tokens 32 is less than max_batch 64"),
        ({"max_model_len": 129}, "the 128 positions"),
        ({"max_model_len": 1}, "at least 2"),
        ({"policy": "lifo"}, "policy must be one of max_utilization, guaranteed_no_evict"),
    ],
)
def test_settings_that_cannot_be_carried_out(options, words):
    with pytest.raises(RecipeError) as caught:
        resolved(**options)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_batch": "x"}, "max_batch must be an integer or None, got 'x'"),
        ({"max_batch": True}, "max_batch must be an integer or None, got True"),
        ({"num_blocks": 1.5}, "num_blocks must be an integer or None, got 1.5"),
        ({"prefix_cache": "no"}, "prefix_cache must be True or False, got 'no'"),
        ({"kv_fraction": "0.5"}, "kv_fraction must be a number or None, got '0.5'"),
        ({"device": None}, "device must be a string, got None"),
    ],
)
def test_a_wrong_type_is_named(options, words):
    with pytest.raises(RecipeError) as caught:
        EngineOptions(**options)
    assert str(caught.value) == words


def test_a_whole_number_is_a_number_and_one_policy_has_two_names():
    assert resolved(kv_fraction=1).num_blocks > 0
    assert resolved(policy="guaranteed_completion") == resolved(policy="guaranteed_no_evict")
