"""Laws of the layouts: what is packed comes back code for code, and lies as it was planned before a weight was read."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.checkpoint.formats import format_named
from fewbit.checkpoint.layout import Quantization
from fewbit.numerics.format import ALL, FORMATS, Format, integer_format
from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.quantspec import QuantSpec
from fewbit.numerics.reference import quantize
from fewbit.spec.decoder import DecoderSpec
from fewbit.spec.families import families
from fewbit.spec.hfconfig import HFConfig

INPUTS = (
    (None, "dynamic"),
    (FORMATS["fp8"], "static"),
    (FORMATS["int8"], "static"),
    (FORMATS["nvfp4"], "outer"),
    *((FORMATS[name], "dynamic") for name in ("fp8_row", "int8_row", "mxfp4", "mxfp8", "fp8_g128")),
)
LLAMA = families()["llama"]
SPEC: DecoderSpec = LLAMA.read(HFConfig(LLAMA.TINY))
WIDTHS = [
    integer_format(bits, block, asym=asym)
    for bits in range(2, 9)
    for block in ((1, 32), (1, 64), (1, ALL), (ALL, ALL))
    for asym in (False, True)
]


@st.composite
def quantized(draw: st.DrawFn) -> QTensor:
    """A random weight in any format, its float scales in any dtype, with an even number of rows."""
    fmt: Format = draw(st.sampled_from([*FORMATS.values(), *WIDTHS]))
    if isinstance(fmt.scale, torch.dtype):
        fmt = replace(fmt, scale=draw(st.sampled_from([torch.float32, torch.bfloat16])))
    cols = 32 if fmt.block[1] == ALL else fmt.block[1]
    shape = 2 * draw(st.integers(1, 70)), cols * draw(st.integers(1, 5))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    return quantize(torch.randn(shape, generator=random) * 2.0 ** draw(st.integers(-8, 8)), fmt)


@settings(deadline=None)
@given(quantized(), st.sampled_from(INPUTS), st.sampled_from(["hf", "compressed-tensors"]))
def test_what_is_packed_comes_back_and_lies_as_planned(q, inputs, name):
    fmt, quant = format_named(name), QuantSpec(q.format, *inputs)

    if fmt.why_not(SPEC, Quantization({"layers.0.attn.q": quant}, {})):
        return
    packing, shape = fmt.packing(quant), tuple(q.shape)
    parts, planned = packing.pack(q), packing.stored(q.format, shape)
    assert {n: (t.dtype, tuple(t.shape)) for n, t in parts.items()} == {
        n: (s.dtype, s.shape) for n, s in planned.items()
    }
    assert packing.unpack(parts, q.format, shape).equal(q)
