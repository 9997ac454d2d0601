"""A decoder layer in C: the numbers of the layer in torch around the same linears, and the same bits everywhere."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from fewbit.checkpoint import open_checkpoint
from fewbit.compress import compress, plan
from fewbit.compress.recipe import parse_recipe
from fewbit.engine.attend import KVCache, PagedAttend
from fewbit.engine.batch import Batch, Piece
from fewbit.model.cpu import CpuLayer, CpuLayers
from fewbit.model.load import Loader
from fewbit.model.rope import Rotary
from fewbit.ops.cpu import layer as in_c
from fewbit.ops.cpu.build import library
from helpers import make_model

BUILT = library()
pytestmark = pytest.mark.skipif(isinstance(BUILT, str), reason=f"CPU KERNELS ARE NOT TESTED: {BUILT}")
CPU = torch.device("cpu")
RECIPES = {
    "as_it_was": None,
    "int4": 'rules: [{match: "layers.*", weight: int4_g32}]',
    "nvfp4": 'rules: [{match: "layers.*", weight: nvfp4}]',
    "static": 'rules: [{match: "layers.*", weight: int8_row, input: int8, input_scale: static}]\n'
    "calib: {samples: 2, length: 32}",
    "fp8": 'rules: [{match: "layers.*", weight: fp8_row, input: fp8_row}]',
    "fp8_static": 'rules: [{match: "layers.*", weight: fp8, input: fp8, input_scale: static}]\n'
    "calib: {samples: 2, length: 32}",
    "nvfp4_inputs": 'rules: [{match: "layers.*", weight: nvfp4, input: nvfp4, input_scale: outer}]\n'
    "calib: {samples: 2, length: 32}",
    "mxfp4_inputs": 'rules: [{match: "layers.*", weight: mxfp4, input: mxfp4}]',
    "each_its_own": 'rules: [{match: "*.gate", weight: int8_row}, {match: "*.k", weight: int8_row, input: int8_row}, '
    '{match: "layers.*", weight: int4_g64_asym}]',
}
ODD = {"hidden_size": 72, "intermediate_size": 100, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 18}


@contextmanager
def on_threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def loader(folder: Path, family: str, recipe: str | None, **shape: int) -> Loader:
    source = open_checkpoint(make_model(folder / "plain", family, torch.bfloat16, num_hidden_layers=1, **shape))
    if recipe is not None:
        compress(source, plan(source, parse_recipe("own", recipe)), folder / "out")
        source = open_checkpoint(folder / "out")
    return Loader(source, CPU, "auto")


def through(layer, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """q, k, v and the output; attention in between sees whatever can be told from q alone."""
    seen = []

    def attend(index, q, k, v, a, sinks=None):
        seen.extend((q, k, v))
        return q * 0.5 - 0.1

    with torch.inference_mode():
        y = layer(x, Rotary(torch.arange(100, 100 + len(x)), torch.float32), attend)
    return *seen, y


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_is_the_layer_in_torch(family, name, tmp_path):
    made = loader(tmp_path, family, RECIPES[name])
    assert made.cpu_why_not(0) is None
    x = 3 * torch.randn(37, made.checkpoint.spec.hidden, generator=torch.Generator().manual_seed(1))
    layer, reference = made.cpu_layer(0), made.layer(0)
    assert isinstance(layer, CpuLayer)
    # a norm that differs in its last bit may turn a rounded input the other way
    most = 1e-6 if name == "as_it_was" else 4e-2 if "fp" in name else 4e-3
    for ours, theirs in zip(through(layer, x), through(reference, x), strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).norm() < most * theirs.norm()


def test_sizes_that_are_no_multiples_of_anything(tmp_path):
    made = loader(tmp_path, "qwen3", None, **ODD)
    x = torch.randn(5, 72, generator=torch.Generator().manual_seed(1))
    for ours, theirs in zip(through(made.cpu_layer(0), x), through(made.layer(0), x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("name", ["as_it_was", "int4", "fp8", "nvfp4_inputs"])
def test_a_row_is_the_same_alone_among_others_on_two_threads_and_on_every_instruction_set(name, tmp_path, monkeypatch):
    made = loader(tmp_path, "qwen3", RECIPES[name])
    x = torch.randn(139, made.checkpoint.spec.hidden, generator=torch.Generator().manual_seed(2))
    rotary, layer = Rotary(torch.zeros(139, dtype=torch.int64), torch.float32), made.cpu_layer(0)

    def run(layer, x: torch.Tensor) -> torch.Tensor:
        q, k, v = layer.halves.before(x, *(t[: len(x)] for t in layer.angles(rotary)))
        return torch.cat([q.flatten(1), k.flatten(1), v.flatten(1), layer.halves.after(x, q)], 1)

    together = run(layer, x)
    assert torch.equal(torch.cat([run(layer, row[None]) for row in x]), together)
    assert torch.equal(torch.cat([run(layer, rows) for rows in x.split(11)]), together)
    with on_threads(2 if torch.get_num_threads() == 1 else 1):
        assert torch.equal(run(layer, x), together)
    real = in_c.Halves.__init__
    for variant in BUILT.usable:
        monkeypatch.setattr(in_c.Halves, "__init__", lambda *a, variant=variant, **k: real(*a, **k, variant=variant))
        assert torch.equal(run(made.cpu_layer(0), x), together), variant


@pytest.mark.parametrize("kv", [None, "fp8", "int8"])
def test_layers_in_one_call_are_those_in_many(kv, tmp_path, monkeypatch):
    """A prompt of more rows than go through a layer together, beside others in scattered pages; then one token each."""
    source = open_checkpoint(make_model(tmp_path / "plain", "qwen3", torch.bfloat16, num_hidden_layers=3))
    recipe = RECIPES["int4"] + (f"\nkv: {{format: {kv}}}\ncalib: {{samples: 2, length: 32}}" if kv else "")
    compress(source, plan(source, parse_recipe("own", recipe)), tmp_path / "out")
    made = Loader(open_checkpoint(tmp_path / "out"), CPU, "auto")
    decoder, page, lengths = made.decoder(), 4, (150, 3, 1)
    (layers,) = decoder.layers
    assert isinstance(layers, CpuLayers)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1)).tolist()
    blocks = [[order.pop() for _ in range(n // page + 1)] for n in lengths]

    def run(in_one: bool) -> torch.Tensor:
        cache, outputs = KVCache(decoder.spec, decoder.codecs, 60, page, CPU, decoder.exact), []
        for starts, ends in (((0, 0, 0), lengths), (lengths, [n + 1 for n in lengths])):
            pieces = [Piece(str(i), [7] * (ends[i] - starts[i]), starts[i], blocks[i]) for i in range(3)]
            slots = [p.blocks[t // page] * page + t % page for p in pieces for t in range(p.first, p.end)]
            positions = torch.tensor([t for p in pieces for t in range(p.first, p.end)])
            tables = torch.tensor([block for p in pieces for block in p.blocks])
            attend = PagedAttend(cache, Batch(pieces), torch.tensor(slots), tables)
            assert attend.in_pages(range(3))
            x = torch.randn(len(slots), decoder.spec.hidden, generator=torch.Generator().manual_seed(len(slots)))
            before, rotary = x.clone(), Rotary(positions, torch.float32)
            monkeypatch.setattr(PagedAttend, "in_pages", real if in_one else lambda *_: None)
            outputs.append(layers(x, rotary, attend))
            monkeypatch.setattr(PagedAttend, "in_pages", real)
            assert torch.equal(x, before)
        return torch.cat(outputs)

    real = PagedAttend.in_pages
    wanted = run(False)
    for threads in (1, 2, 3):
        with on_threads(threads):
            assert torch.equal(run(True), wanted)
    for variant in BUILT.usable:
        monkeypatch.setattr(layers._stack, "_call", BUILT.call("layers", variant))
        assert torch.equal(run(True), wanted), variant


def test_activations_are_right_from_end_to_end_and_no_number_stays_none(tmp_path):
    made = loader(tmp_path, "llama", None)
    layer, reference = made.cpu_layer(0), made.layer(0)
    gate = layer.halves._held[0]["gate"]
    gate.tensors[0].mul_(1e4)  # silu from one end of float32 to the other
    reference.linears["gate"]._prepared.tensors[0].mul_(1e4)
    x = torch.randn(16, made.checkpoint.spec.hidden)
    ours, theirs = through(layer, x)[-1], through(reference, x)[-1]
    assert ours.isfinite().all()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())
    x[3, 0] = float("nan")
    ours = through(layer, x)[-1]
    assert ours[3].isnan().all()
    assert ours[:3].isfinite().all()
    assert ours[4:].isfinite().all()


def test_torchs_defaults_do_not_matter(tmp_path):
    made = loader(tmp_path, "qwen2", RECIPES["int4"])
    x = torch.randn(5, made.checkpoint.spec.hidden, generator=torch.Generator().manual_seed(1))
    wanted = through(made.cpu_layer(0), x)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = through(made.cpu_layer(0), x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, found, wanted))


def test_what_attention_saw_may_lie_in_any_order(tmp_path):
    halves = loader(tmp_path, "llama", None).cpu_layer(0).halves
    x = torch.randn(7, halves._rows[0], generator=torch.Generator().manual_seed(1))
    seen = torch.randn(halves._rows[0], 7, generator=torch.Generator().manual_seed(2)).T
    assert torch.equal(halves.after(x, seen), halves.after(x, seen.contiguous()))


def test_what_c_does_not_know_stays_in_torch(tmp_path):
    made = loader(tmp_path, "gemma2", None)
    assert made.cpu_why_not(0) == "the kernels know layers of two norms, one before attention and one before the MLP"
    assert type(made.decoder().layers[0]).__name__ == "DecoderLayer"
    exact = loader(tmp_path / "more", "llama", None)
    exact.backend = "exact"
    assert exact.cpu_why_not(0) == "layers.0.attn.q runs on 'dense'"
