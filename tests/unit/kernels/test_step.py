"""The fused forward and the decode step, kernel by kernel as on a GPU, against the definition of the same model."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from fewbit.checkpoint import open_checkpoint
from fewbit.compress import compress, plan
from fewbit.compress.recipe import parse_recipe
from fewbit.engine.gpu import make_pages
from fewbit.model.attend import DenseAttend
from fewbit.model.load import Loader
from fewbit.model.step import DecodeStep
from fewbit.numerics.quantspec import QuantSpec
from fewbit.ops.linear import Choice
from fewbit.ops.linear.four import Fp4, Int4
from fewbit.ops.linear.wide import Wide
from helpers import make_model
from interpreter import DEVICE, GPU

PAGE = 16 if GPU else 2  # the matrix units of a GPU want 16
KINDS = {
    "as it was": "",
    "weights in INT8": "rules: [{match: 'layers.*', weight: int8_row}]",
    "INT8, a scale a token": "rules: [{match: 'layers.*', weight: int8_row, input: int8_row}]",
    "INT8, calibrated scales": "rules: [{match: 'layers.*', weight: int8_row, input: int8, input_scale: static}]",
    "INT4, groups of 64": "rules: [{match: 'layers.*', weight: int4_g64}]",
    "INT4, calibrated scales of FP8": "rules: [{match: 'layers.*', weight: int4_g64, input: fp8, input_scale: static}]",
    "NVFP4, rounded inputs and branches": (
        "rules: [{match: 'layers.*', weight: nvfp4, input: nvfp4, input_scale: outer}]\n"
        "techniques: [{svdquant: {rank: 12}}]"
    ),
    "MXFP4, rounded inputs": "rules: [{match: 'layers.*', weight: mxfp4, input: mxfp4}]",
    "INT8, a scale a token, and branches": (
        "rules: [{match: 'layers.*', weight: int8_row, input: int8_row}]\ntechniques: [{svdquant: {rank: 8}}]"
    ),
    "INT8 and an INT8 cache": "rules: [{match: 'layers.*', weight: int8_row}]\nkv: {format: int8}",
}
QUICK = {("qwen3", "INT8, a scale a token"), ("llama", "INT4, groups of 64")}
QUICK |= {("llama", "NVFP4, rounded inputs and branches")}


class OnAnything(Loader):
    """A loader that takes the kernels of a GPU wherever it is."""

    def choose(self, shape):
        fmt = self.checkpoint.quant.get(shape.name, QuantSpec()).weight
        return Choice({"int4": Int4(), "e2m1": Fp4()}.get(fmt.element.name if fmt else "", Wide()))


def model(tmp_path: Path, family: str, recipe: str) -> Path:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "num_attention_heads": 4}
    dtype = torch.bfloat16 if GPU else torch.float32
    made = make_model(tmp_path / "plain", family, dtype, num_key_value_heads=2, num_hidden_layers=2, **sizes)
    if not recipe:
        return made
    checkpoint = open_checkpoint(made)
    compress(
        checkpoint,
        plan(checkpoint, parse_recipe("own", f"{recipe}\ncalib: {{samples: 4, length: 64}}")),
        tmp_path / "small",
    )
    return tmp_path / "small"


CELLS = [
    pytest.param(f, k, id=f"{f} {k}", marks=[] if (f, k) in QUICK else [pytest.mark.slow])
    for f in ("llama", "qwen3")
    for k in KINDS
]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("family", "kind"), CELLS)
def test_prompts_and_steps_are_those_of_the_definition(tmp_path, family, kind, monkeypatch):
    monkeypatch.setattr("fewbit.ops.attention.decode.PROGRAMS", 264 if GPU else 8)  # one after the other on a CPU
    checkpoint = open_checkpoint(model(tmp_path, family, KINDS[kind]))
    device = torch.device(DEVICE)
    fused, plain = OnAnything(checkpoint, device).fused(), Loader(checkpoint, device, "reference").decoder()
    random = torch.Generator().manual_seed(0)
    lengths = [19, 3, 17] if GPU else [4, 1, 3]
    said = [torch.randint(3, checkpoint.spec.vocab, (n,), generator=random).to(device) for n in lengths]

    def definition(ids, decoder=plain):
        hidden = decoder.hidden(ids, torch.arange(len(ids), device=device), DenseAttend(decoder.codecs, len(ids)))
        return decoder.logits(hidden)

    expected = [definition(ids).double() for ids in said]
    # noise turns into whole steps of a code where inputs or the cache are rounded
    rounded = "a scale" in kind or "calibrated" in kind or "cache" in kind or "rounded" in kind
    # of 4-bit steps more than a quarter: the definition itself moves as far if its embedding is rounded to bfloat16
    limit = 0.5 if "rounded" in kind and GPU else 0.1 if rounded else 4e-2 if GPU else 1e-4
    for ids, wanted in zip(said, expected, strict=True):
        assert off(definition(ids, fused), wanted) < limit
    pages = make_pages(fused, 6, PAGE)
    step = DecodeStep(fused, pages, len(said), 2 * PAGE)
    for rows in ([0, 1, 2], [0]):  # products of several tokens, and of one
        if len(rows) == 1 and kind.startswith("INT4") and not GPU:
            continue  # reads pairs of bfloat16 as one word
        for t in range(max(lengths[r] for r in rows) if len(rows) > 1 or GPU else 2):
            alive = [t < lengths[r] for r in rows]
            tokens = [int(said[r][t]) if on else 0 for r, on in zip(rows, alive, strict=True)]
            table = [block for r in rows for block in (2 * r, 2 * r + 1)]
            given = [*tokens, *[-1] * len(rows), *[t + 1 if on else 0 for on in alive], *table]
            step.inputs[: len(given)] = torch.tensor(given, dtype=torch.int32, device=device)
            step.run(len(rows))
            for i, (r, on) in enumerate(zip(rows, alive, strict=True)):
                if on:
                    error = off(step.logits[i], expected[r][t])
                    assert error < limit, (kind, rows, t, error)
                    assert int(step.chosen[i]) == int(step.logits[i].argmax())
                    assert float(step.best[i]) == float(step.logits[i].max())
    # the token of a row may be what the step before chose
    step.inputs[: 3 + 2] = torch.tensor([0, 0, 1, 0, 1], dtype=torch.int32, device=device)
    first = int(step.chosen[0])
    step.run(1)
    assert off(step.logits[0], definition(torch.tensor([first], device=device))[0].double()) < limit


def off(found, wanted):
    assert found.isfinite().all()
    return float((found.double() - wanted).norm() / wanted.norm())
