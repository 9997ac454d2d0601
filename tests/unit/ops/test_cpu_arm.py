"""The CPU kernels on ARM, under an emulator: the very bits of this machine, for every kind of weight."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fewbit.numerics.format import FORMATS
from fewbit.numerics.quantspec import QuantSpec
from fewbit.numerics.reference import choose_scale, quantize
from fewbit.ops.cpu import build
from fewbit.ops.cpu.layer import LINEARS, Halves
from fewbit.ops.linear import LinearWeights
from fewbit.ops.linear.cpu import Cpu, Prepared

BUILT = build.library()
COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
MISSING = [name for name in (COMPILER, EMULATOR) if not shutil.which(name)]
WHERE = "apt-get install gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(isinstance(BUILT, str), reason=f"CPU KERNELS ARE NOT TESTED: {BUILT}"),
    pytest.mark.skipif(bool(MISSING), reason=f"KERNELS FOR ARM ARE NOT TESTED: no {' and no '.join(MISSING)}; {WHERE}"),
]
INT8 = FORMATS["int8_row"]
SPECS = [
    QuantSpec(),  # BF16
    QuantSpec(INT8),
    QuantSpec(INT8, INT8),
    QuantSpec(FORMATS["int8"], FORMATS["int8"], "static"),
    *(QuantSpec(FORMATS[name]) for name in ("int8_g128", "int4_g32", "int4_g128", "int4_g64_asym", "nvfp4", "mxfp4")),
    QuantSpec(FORMATS["int4_g128"], prescale=True),
]
SHAPES = ((1, 16, 256), (7, 130, 384), (13, 41, 1024))  # rows, n, k


def array(t: Tensor | None) -> bytes:
    """A tensor as arm.c takes it."""
    raw = b"" if t is None else t.contiguous().view(torch.uint8).numpy().tobytes()
    return struct.pack("<q", len(raw)) + raw


def linear(w: Prepared) -> bytes:
    return bytes(w.linear) + b"".join(map(array, w.tensors))


def prepared(quant: QuantSpec, n: int, k: int, random: torch.Generator) -> Prepared:
    weight, bias = (torch.randn(*shape, generator=random) * k**-0.5 for shape in ((n, k), (n,)))
    scale = choose_scale(torch.randn(64, k, generator=random), quant.input)[0].reshape(()) if quant.calibrated else None
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


def run(program: Path, cases: list[bytes], sizes: list[int]) -> list[Tensor]:
    """What the program makes of cases; `sizes`: numbers of each result."""
    given = struct.pack("<q", len(cases)) + b"".join(cases)
    said = subprocess.run([EMULATOR, str(program)], input=given, capture_output=True, check=True).stdout
    assert len(said) == 4 * sum(sizes)
    return list(torch.frombuffer(bytearray(said), dtype=torch.float32).split(sizes))


def test_linears(program):
    random = torch.Generator().manual_seed(0)
    cases, wanted = [], []
    for quant in SPECS:
        for rows, n, k in SHAPES:
            w, x = prepared(quant, n, k, random), torch.randn(rows, k, generator=random)
            x[:, 0] *= 20  # an outlier
            cases.append(struct.pack("<q", ord("l")) + linear(w) + struct.pack("<q", rows) + array(x))
            wanted.append(Cpu().run(x, w))
    found = run(program, cases, [y.numel() for y in wanted])
    for number, (y, ours) in enumerate(zip(found, wanted, strict=True)):
        assert torch.equal(y.view_as(ours), ours), (SPECS[number // len(SHAPES)], SHAPES[number % len(SHAPES)])


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
    case = struct.pack("<q", ord("h")) + b"".join(parts + rest)
    for y, ours in zip(run(program, [case], [y.numel() for y in wanted]), wanted, strict=True):
        assert torch.equal(y.view_as(ours), ours)
