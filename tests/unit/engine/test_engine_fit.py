"""What a model takes is added up before anything is allocated, and a refusal says what would do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_engine import SPEC

from fewbit.engine.fit import Need, check_fit, kv_bytes_per_token, need
from fewbit.errors import UnsupportedError
from fewbit.numerics.format import FORMATS
from fewbit.numerics.quantspec import KVSpec, QuantSpec

CPU = torch.device("cpu")
GIB = 1 << 30


def test_the_sum():
    takes = need(SPEC, {}, {}, torch.bfloat16, CPU, 3, 300, step_tokens=64, backend="exact")
    numbers = sum(x.out_features * x.in_features for x in SPEC.linears())
    assert takes.weights == numbers * 4 + SPEC.vocab * SPEC.hidden * 2  # exact: float32; the embedding as stored
    assert takes.kv == 3 * 100 * 2 * 2 * 2 * 8 * 2  # k and v, layers, heads, head_dim, bytes
    assert takes.graphs == 0
    assert takes.total == takes.weights + takes.kv + takes.workspace
    assert need(SPEC, {}, {}, torch.bfloat16, CPU, 3, 300, 128).workspace > takes.workspace
    assert need(SPEC, {}, {}, torch.bfloat16, CPU, 1, 50).kv == takes.kv // 6


def test_a_cache_of_codes_is_counted_in_its_own_bits():
    int8 = KVSpec(FORMATS["int8"], FORMATS["int8"])
    assert kv_bytes_per_token(SPEC, {0: int8}, torch.bfloat16) == 2 * 2 * 8 * (1 + 2)
    int4 = KVSpec(FORMATS["int4_row"], FORMATS["int4_row"])
    assert kv_bytes_per_token(SPEC, {0: int4, 1: int4}, torch.bfloat16) == 2 * 2 * 8
    assert (
        need(SPEC, {"layers.0.attn.q": QuantSpec(FORMATS["int8_row"])}, {0: int8}, torch.bfloat16, CPU, 1, 1).kv == 96
    )


def test_a_refusal_gives_the_sum_and_what_would_fit():
    takes = Need(weights=10 * GIB, kv=4 * GIB, workspace=2 * GIB, graphs=GIB // 2)
    check_fit(takes, takes.total, "all of it", [])
    smaller = [(f"--way {i}", replace(takes, kv=size * GIB)) for i, size in enumerate((9, 3, 2, 1, 0))]
    with pytest.raises(UnsupportedError) as refused:
        check_fit(takes, 16 * GIB, "this model", smaller)
    assert str(refused.value) == (
        "this model does not fit: weights 10.0 + K/V 4.0 + workspace 2.0 + graphs 0.5 = 16.5 GiB, free 16.0 GiB; "
        "what would fit: --way 1; --way 2; --way 3"
    )
    with pytest.raises(UnsupportedError, match=r"what would fit: --way 4; a device with 16.5 GiB free$"):
        check_fit(takes, 13 * GIB, "this model", smaller)
