"""The CPU kernels on ARM, under an emulator: the very bits of this machine, for every kind of weight."""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fewbit.model.attend import KVCodec
from fewbit.numerics.format import FORMATS
from fewbit.numerics.quantspec import KVSpec, QuantSpec
from fewbit.numerics.reference import input_scale, quantize
from fewbit.ops.attention.cpu import PagedLayer, Spans
from fewbit.ops.cpu import build
from fewbit.ops.cpu.layer import LINEARS, Halves
from fewbit.ops.linear import LinearWeights
from fewbit.ops.linear.cpu import Cpu, Prepared
from fewbit.spec.decoder import Attention

BUILT = build.library()
COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
MISSING = [name for name in (COMPILER, EMULATOR) if not shutil.which(name)]
WHERE = "apt-get install gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(isinstance(BUILT, str), reason=f"CPU KERNELS ARE NOT TESTED: {BUILT}"),
    pytest.mark.skipif(bool(MISSING), reason=f"KERNELS FOR ARM ARE NOT TESTED: no {' and no '.join(MISSING)}; {WHERE}"),
]
INT8, FP8 = FORMATS["int8_row"], FORMATS["fp8"]
SPECS = [
    QuantSpec(),  # BF16
    QuantSpec(INT8),
    QuantSpec(INT8, INT8),
    QuantSpec(FORMATS["int8"], FORMATS["int8"], "static"),
    *(QuantSpec(FORMATS[name]) for name in ("int8_g128", "int4_g32", "int4_g128", "int4_g64_asym", "nvfp4", "mxfp4")),
    QuantSpec(FORMATS["int4_g128"], prescale=True),
    *(QuantSpec(FP8, FP8, "static"), QuantSpec(FORMATS["fp8_row"], FORMATS["fp8_row"])),
    *(QuantSpec(FORMATS["nvfp4"], FORMATS["nvfp4"], "outer"), QuantSpec(FORMATS["mxfp4"], FORMATS["mxfp4"])),
]
EIGHT, GQA = FORMATS["int8"], Attention(8, 2, 64, None)
SCALES = torch.tensor(0.02), torch.tensor(0.03)
ATTENTION = (
    (KVCodec(torch.float32), replace(GQA, window=50)),
    (KVCodec(torch.float16), replace(GQA, softcap=3.0)),
    (KVCodec(torch.bfloat16), Attention(6, 2, 13, None)),
    (KVCodec(torch.bfloat16, KVSpec(EIGHT, EIGHT), *SCALES), GQA),
    (KVCodec(torch.bfloat16, KVSpec(FP8, FP8), *SCALES), replace(GQA, sinks=True)),
)
SHAPES = ((1, 16, 256), (7, 130, 384), (13, 41, 1024))  # rows, n, k


def array(t: Tensor | None) -> bytes:
    """A tensor as arm.c takes it."""
    raw = b"" if t is None else t.contiguous().view(torch.uint8).numpy().tobytes()
    return struct.pack("<q", len(raw)) + raw


def linear(w: Prepared) -> bytes:
    return bytes(w.linear) + b"".join(map(array, w.tensors))


def prepared(quant: QuantSpec, n: int, k: int, random: torch.Generator) -> Prepared:
    weight, bias = (torch.randn(*shape, generator=random) * k**-0.5 for shape in ((n, k), (n,)))
    scale = input_scale(torch.randn(64, k, generator=random).abs().amax(), quant.input) if quant.calibrated else None
    prescale = torch.rand(k, generator=random) + 0.5 if quant.prescale else None
    w = weight.bfloat16() if quant.weight is None else quantize(weight, quant.weight)
    return Cpu().prepare(LinearWeights(quant, w, bias, scale, prescale), torch.float32)


@pytest.fixture(scope="module", params=build.VARIANTS["aarch64"])
def program(request, tmp_path_factory) -> Path:
    """arm.c compiled for one of ARM's instruction sets, as `build` compiles the library."""
    made = tmp_path_factory.mktemp("arm") / request.param
    source = Path(__file__).with_name("arm.c")
    options = (f"-DVARIANT={request.param}", "-I", str(build.SOURCE.parent))
    command = (COMPILER, *build.FLAGS, *build.VARIANTS["aarch64"][request.param], *options, str(source))
    subprocess.run([*command, "-o", str(made), "-static", "-lm"], check=True)
    return made


def case(what: str, *parts: bytes) -> bytes:
    return struct.pack("<q", ord(what)) + b"".join(parts)


def held(program: Path, cases: list[bytes], wanted: list[Tensor], names: Sequence[object]) -> None:
    """The program makes of the cases the very bytes that are `wanted`; `names`: what each of these is."""
    given = struct.pack("<q", len(cases)) + b"".join(cases)
    said = subprocess.run([EMULATOR, str(program)], input=given, capture_output=True, check=True).stdout
    sizes = [t.nbytes for t in wanted]
    assert len(said) == sum(sizes)
    results = torch.frombuffer(bytearray(said), dtype=torch.uint8).split(sizes)
    for found, ours, name in zip(results, wanted, names, strict=True):
        assert torch.equal(found, ours.contiguous().view(torch.uint8).flatten()), name


def test_linears(program):
    random = torch.Generator().manual_seed(0)
    cases, wanted, names = [], [], []
    for quant in SPECS:
        for rows, n, k in SHAPES:
            w, x = prepared(quant, n, k, random), torch.randn(rows, k, generator=random)
            x[:, 0] *= 20  # an outlier
            cases.append(case("l", linear(w), struct.pack("<q", rows), array(x)))
            wanted.append(Cpu().run(x, w))
            names.append((quant, rows, n, k))
    held(program, cases, wanted, names)


@pytest.mark.parametrize("name", ["int4_g128", "nvfp4", None])
def test_layers(name, program):
    """Norms, rotation and SiLU too."""
    random, d, width, dim, rows = torch.Generator().manual_seed(1), 256, 640, 64, 5
    quant = QuantSpec(FORMATS[name] if name else None)
    heads = {"q": 4, "k": 2, "v": 2}
    shapes = {n: (h * dim, d) for n, h in heads.items()} | {"o": (d, 4 * dim), "down": (d, width)}
    shapes |= dict.fromkeys(("gate", "up"), (width, d))
    linears = {n: prepared(quant, *shapes[n], random) for n in LINEARS}
    norms = {n: torch.rand(s, generator=random) + 0.5 for n, s in (("pre_attn", d), ("pre_mlp", d), ("q_norm", dim))}
    norms["k_norm"] = norms["q_norm"] + 0.25
    halves = Halves(linears, norms, (1e-5, 1e-6, 1e-5), dim)
    x, angles = torch.randn(rows, d, generator=random), torch.rand(rows, 1, dim, generator=random)
    seen = torch.randn(rows, 4, dim, generator=random)
    wanted = [*halves.before(x, angles.cos(), angles.sin()), halves.after(x, seen)]
    given = [norms.get(n) for n in ("pre_attn", "pre_mlp", "q_norm", "k_norm")]
    parts = [bytes(halves._layer), *(linear(linears[n]) for n in LINEARS), *map(array, given)]
    rest = [struct.pack("<q", rows), *map(array, (x, angles.cos(), angles.sin(), seen))]
    held(program, [case("h", *parts, *rest)], wanted, ("q", "k", "v", "y"))


def test_attention(program):
    """What is stored of K and V, too."""
    random, lengths, page = torch.Generator().manual_seed(2), (1, 33, 90), 16
    pages = [-(-n // page) for n in lengths]
    tables = torch.arange(sum(pages)).flip(0)
    rows, slots, row, at = [], [], 0, 0
    for n, count in zip(lengths, pages, strict=True):
        rows.append((row, n, 0, at))
        slots += [int(tables[at + t // page]) * page + t % page for t in range(n)]
        row, at = row + n, at + count
    slots = torch.tensor(slots)
    spans = Spans(rows, slots, tables)
    cases, wanted, names = [], [], []
    for codec, a in ATTENTION:
        k, v = (torch.zeros(sum(pages) * page, a.kv_heads, a.head_dim, dtype=codec.stored_dtype) for _ in range(2))
        layer = PagedLayer(a, codec, k, v, page)
        scales = [codec.spec and s.float().expand(a.kv_heads) for s in (codec.k_scale, codec.v_scale)]
        sinks = torch.randn(a.heads, generator=random) if a.sinks else None
        q, *new = (2 * torch.randn(row, n, a.head_dim, generator=random) for n in (a.heads, a.kv_heads, a.kv_heads))
        where = [torch.tensor(rows), slots, tables]
        cases.append(case("a", bytes(layer._struct), *map(array, (k, v, *scales, *where, sinks, q, *new))))
        out = layer(q, *new, spans, sinks)
        wanted += [k, v, out]
        names += [(what, codec, a) for what in ("K", "V", "out")]
    held(program, cases, wanted, names)
