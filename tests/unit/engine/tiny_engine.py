"""A random Llama-like model of some thousand weights, and engines around it. No checkpoint, no files."""

from __future__ import annotations

import itertools
import os
import time

import msgspec
import torch

from fewbit.engine.attend import token_bytes
from fewbit.engine.batch import PENDING, Batch, Drawn
from fewbit.engine.config import EngineConfig, EngineOptions, resolve
from fewbit.engine.engine import Engine
from fewbit.engine.runner import Runner
from fewbit.engine.types import GenerateRequest, SamplingParams
from fewbit.model.attend import KVCodec
from fewbit.model.decoder import Decoder, DecoderLayer, Embedding, Normalize
from fewbit.numerics.format import FORMATS
from fewbit.numerics.quantspec import KVSpec
from fewbit.spec.decoder import MLP, Attention, DecoderSpec, Layer, Norm, Rope

VOCAB, EOS = 61, 3
SPEC = DecoderSpec(
    vocab=VOCAB,
    hidden=32,
    layers=tuple(
        Layer(Attention(4, 2, 8, Rope(10_000.0), window=window), MLP(48), Norm(1e-6), Norm(1e-6))
        for window in (None, 7)
    ),
    final_norm=Norm(1e-6),
    context=128,
)


def codec(kv: str, device: str = "cpu") -> KVCodec:
    if kv in ("float32", "bfloat16"):
        return KVCodec(getattr(torch, kv))
    scales = {"int8": [0.02, 0.03], "int4_row": [0.3, 0.4]}  # a scale a head
    scale = torch.tensor(scales.get(kv, 0.01), device=device)
    return KVCodec(torch.bfloat16, KVSpec(FORMATS[kv], FORMATS[kv]), scale, scale)


def decoder(kv: str = "float32", device: str = "cpu") -> Decoder:
    random = torch.Generator().manual_seed(0)
    weights = {
        name: (torch.randn(shape, generator=random) * shape[-1] ** -0.5 * 1.5).to(device)
        for name, shape in SPEC.tensors().items()
    }
    ones = torch.ones(SPEC.hidden, device=device)

    def linear(name: str):
        return lambda x: torch.nn.functional.linear(x, weights[f"{name}.weight"])

    layers = []
    for i, layer in enumerate(SPEC.layers):
        linears = {shape.name.rsplit(".", 1)[1]: linear(shape.name) for shape in SPEC.layer_linears(i)}
        layers.append(DecoderLayer(i, layer, linears, {"pre_attn": ones, "pre_mlp": ones}))
    codecs = [codec(kv, device)] * len(layers)
    embed, final = Embedding(weights["embed.weight"] * 4), Normalize(SPEC.final_norm, ones)
    return Decoder(SPEC, embed, layers, final, linear("lm_head"), codecs, torch.float32)


def config(model: Decoder | None = None, **options) -> EngineConfig:
    given = {"block_size": 4, "num_blocks": 64, "max_batch": 8, "max_batch_tokens": 16, "seed": 0} | options
    size = token_bytes(SPEC, (model or decoder()).codecs)
    return resolve(EngineOptions(**given), spec=SPEC, token_bytes=size, free_bytes=1 << 30, eos_token_ids=(EOS,))


class Overlapping(Runner):
    """A runner under which a step is planned while the one before it runs, as on a GPU: what a step chose is known to
    the next one, and to nobody else before `collect`.
    """

    overlaps = True

    def launch(self, batch: Batch) -> dict[str, Drawn]:
        known = getattr(self, "chosen", {})
        pieces = [
            msgspec.structs.replace(p, tokens=[known[p.id].token if t == PENDING else t for t in p.tokens])
            for p in batch.pieces
        ]
        self.chosen = super().collect(super().launch(Batch(pieces)))
        return self.chosen

    def collect(self, launched: dict[str, Drawn]) -> dict[str, Drawn]:
        return launched


def engine(kv: str = "float32", device: str = "cpu", overlapping: bool = False, **options) -> Engine:
    model = decoder(kv, device)
    made = Engine(model, config(model, device=device, **options))
    if overlapping:
        made.runner = Overlapping(model, made.config)
    return made


_serial = itertools.count()


def request(prompt, id: str | None = None, **params) -> GenerateRequest:
    given = {"max_tokens": 8, "temperature": 0.0, "ignore_eos": True} | params
    name = id or f"r{next(_serial)}"
    outer = {key: given.pop(key) for key in ("priority", "salt") if key in given}
    return GenerateRequest(id=name, prompt=tuple(prompt), params=SamplingParams(**given), **outer)


def run(machine: Engine, check: bool = True):
    """Step until there is nothing to do; all events."""
    events = []
    while machine.has_work:
        events += machine.step()
        if check:
            machine.scheduler.check()
    return events


def slowed(machine: Engine, hurry: str = "") -> Engine:
    """Some 20 ms a step; a second where a request has more than 50 tokens, so that it does not come to its end before
    it is left, unless there is a file named `hurry`.
    """
    launch = machine.runner.launch

    def slowly(batch: Batch) -> dict[str, Drawn]:
        long = any(p.first > 50 for p in batch.pieces)
        time.sleep(1.0 if long and not os.path.exists(hurry) else 0.02)
        return launch(batch)

    machine.runner.launch = slowly
    return machine


def build(model: str, options: EngineOptions, progress):
    """What the engine process of the tests opens: `model` says what should happen."""
    progress("inventing weights")
    if model == "missing":
        from fewbit.errors import CheckpointError

        raise CheckpointError("no such directory: missing")
    if model == "crash":
        raise ZeroDivisionError("on purpose")
    torch.set_num_threads(1)
    machine = engine(max_queued=options.max_queued)
    kind, _, hurry = model.partition(":")
    return slowed(machine, hurry) if kind == "slow" else machine


if __name__ == "__main__":
    import sys

    from fewbit.engine.process import main

    sys.exit(main(sys.argv[1:], build))
