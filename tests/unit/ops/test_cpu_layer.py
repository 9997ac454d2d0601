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
from fewbit.model.decoder import normalize
from fewbit.model.load import Loader
from fewbit.model.rope import Rotary
from fewbit.ops.attention.cpu import PagedLayer
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
        q, k, v = layer.halves.before(x, *(t[: len(x)] for t in rotary(*layer.turned)))
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


def steps(decoder, cache: KVCache):
    """The state after each step: prompts longer than what goes through a layer together, in scattered pages; then a
    token of each; then one of one.
    """
    page, lengths = cache.block_size, [150, 3, 1]
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1)).tolist()
    blocks = [[order.pop() for _ in range(-(-(n + 2) // page))] for n in lengths]
    at = [0] * 3
    for sizes in (lengths, [1, 1, 1], [1, 0, 0]):
        pieces = [Piece(str(i), [7 + i] * n, at[i], blocks[i]) for i, n in enumerate(sizes) if n]
        slots = [p.blocks[t // page] * page + t % page for p in pieces for t in range(p.first, p.end)]
        tables = torch.tensor([block for p in pieces for block in p.blocks])
        attend = PagedAttend(cache, Batch(pieces), torch.tensor(slots), tables)
        positions = torch.tensor([t for p in pieces for t in range(p.first, p.end)])
        yield decoder.hidden(torch.tensor([t for p in pieces for t in p.tokens]), positions, attend)
        at = [a + n for a, n in zip(at, sizes, strict=True)]


@pytest.mark.parametrize(
    ("name", "kv", "torchs"), [("int4", None, None), ("as_it_was", "fp8", 1), ("each_its_own", "int8", 2)]
)
def test_layers_in_one_call_are_those_in_many(name, kv, torchs, tmp_path, monkeypatch):
    """Layers that differ in windows and formats; one of them torch's (`torchs`), so that there are two calls."""
    window = {"num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 70, "max_window_layers": 2}
    source = open_checkpoint(make_model(tmp_path / "plain", "qwen2", torch.bfloat16, **window))
    recipe = (RECIPES[name] or "rules: []") + (
        f"\nkv: {{format: {kv}}}\ncalib: {{samples: 2, length: 32}}" if kv else ""
    )
    compress(source, plan(source, parse_recipe("own", recipe)), tmp_path / "out")
    real = Loader.cpu_why_not
    monkeypatch.setattr(Loader, "cpu_why_not", lambda self, i: "asked" if i == torchs else real(self, i))
    decoder = Loader(open_checkpoint(tmp_path / "out"), CPU, "auto").decoder()
    stacks = [layers for layers in decoder.layers if isinstance(layers, CpuLayers)]
    assert [len(layers.layers) for layers in stacks] == ([4] if torchs is None else [torchs, 3 - torchs])

    def run() -> list[torch.Tensor]:
        return list(steps(decoder, KVCache(decoder.spec, decoder.codecs, 60, 4, CPU, decoder.exact)))

    with monkeypatch.context() as patch:
        patch.setattr(PagedAttend, "in_pages", lambda *_: None)
        wanted = run()
    if torchs is None:  # else torch's layer asks for its own
        monkeypatch.setattr(PagedLayer, "__call__", None)
    for threads in (1, 2, 3):
        with on_threads(threads):
            assert all(map(torch.equal, run(), wanted))
    for variant in BUILT.usable:
        for layers in stacks:
            monkeypatch.setattr(layers._stack, "_call", BUILT.call("layers", variant))
        assert all(map(torch.equal, run(), wanted)), variant


def test_without_pages_for_one_of_them_layers_go_one_by_one(tmp_path, monkeypatch):
    made = Loader(open_checkpoint(make_model(tmp_path, "llama", torch.bfloat16, num_hidden_layers=2)), CPU, "auto")
    decoder = made.decoder()
    wanted, cache = (KVCache(decoder.spec, decoder.codecs, 60, 4, CPU, decoder.exact) for _ in range(2))
    cache.paged[1] = None  # as for K and V of four bits
    theirs_of_all = list(steps(decoder, wanted))
    monkeypatch.setattr(decoder.layers[0]._stack, "_call", None)  # nobody asks it now
    for ours, theirs in zip(steps(decoder, cache), theirs_of_all, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


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


def test_the_norm_before_the_head_is_torchs(tmp_path):
    made = loader(tmp_path, "llama", None)
    norm, spec = made.final_norm(), made.checkpoint.spec
    assert isinstance(norm, in_c.Normalize)
    x = 3 * torch.randn(9, spec.hidden, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(norm(x), normalize(x, spec.final_norm, made.vector("final_norm.weight")))
    assert torch.equal(norm(x.T.contiguous().T), norm(x))
    assert torch.equal(norm(x[4:5])[0], norm(x)[4])
    for variant in BUILT.usable:
        assert torch.equal(in_c.Normalize(made.vector("final_norm.weight"), spec.final_norm.eps, variant)(x), norm(x))
    assert not isinstance(Loader(made.checkpoint, CPU, "exact").final_norm(), in_c.Normalize)


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
