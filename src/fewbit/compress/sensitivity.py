"""What quantizing a group of linears costs the model: measured one by one, or estimated in one backward pass.

The model is held in float on the device. A group are the linears that read one input: who joins q, k and v wants them
alike. Experts are not told apart: a group holds those of all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.checkpoint import Checkpoint
from fewbit.compress.fold import shared_outers
from fewbit.compress.stats import Recorder, Stats
from fewbit.compress.stream import Stream
from fewbit.compress.techniques.auto import Option, Score
from fewbit.model import DecoderLayer, DenseAttend, KVCodec, Linear, Loader
from fewbit.model.decoder import LinearOp, finish_logits
from fewbit.model.rope import Rotary
from fewbit.numerics.quantspec import QuantSpec
from fewbit.numerics.reference import input_scale
from fewbit.ops.linear import LinearWeights
from fewbit.ops.rounding import quantize
from fewbit.spec.decoder import LinearShape, by_input, by_role, leaf_of

_PIECE = 256  # tokens whose logits are held at a time
_SEED = 0

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Unit:
    """Linears that read one input (of experts all), and what each candidate would cost them."""

    names: tuple[str, ...]
    options: tuple[Option, ...]


def sensitivities(
    checkpoint: Checkpoint,
    candidates: Mapping[str, Mapping[str, QuantSpec]],
    windows: Sequence[Sequence[int]],
    device: torch.device,
    score: Score = "kl",
    progress: Progress = lambda stage, done, total: None,
) -> list[Unit]:
    """The cost of every candidate for every group of linears but the head.

    Args:
        checkpoint: a model in float.
        candidates: by name: QuantSpec by linear; a linear that it does not name stays as it was.
        windows: token ids to measure on.
        device: where to.
        score: ``kl``: the KL divergence of the next-token distribution with this one group quantized, in nats a token;
            ``gradient``: its second-order estimate ``E[(g · Δy)²] / 2`` over tokens, g the gradient of the log
            probability of a token drawn from the model's own distribution at the output y of a linear: the Fisher
            information in place of the Hessian.
        progress: called with a stage's name, how much is done, and of how much.
    """
    return _Model(checkpoint, candidates, windows, device, progress).units(score)


class _Model:
    def __init__(
        self, checkpoint: Checkpoint, candidates: Mapping[str, Mapping[str, QuantSpec]],
        windows: Sequence[Sequence[int]], device: torch.device, progress: Progress,
    ) -> None:  # fmt: skip
        self.spec, self.candidates, self.windows, self.progress = checkpoint.spec, candidates, windows, progress
        self.loader, self.device = Loader(checkpoint, device), device
        self.codecs = [KVCodec(checkpoint.dtype)] * len(self.spec.layers)
        dense = Loader(checkpoint, device, "dense")  # through which gradients find their way
        self.layers = [dense.layer(index) for index in range(len(self.spec.layers))]
        self.final_norm, self.head = dense.final_norm(), dense.head()

    def units(self, score: Score) -> list[Unit]:
        with torch.inference_mode():
            walk, stats = self._stream(), []
            for layer in self.layers:
                stats.append(self._stats(layer, walk))
                walk.through(layer, self.codecs)
            exact = walk.states()
        gradients = self._gradients() if score == "gradient" else []
        tokens = sum(map(len, self.windows))
        found: list[Unit] = []
        with torch.inference_mode():
            walk = self._stream()
            for index, layer in enumerate(self.layers):
                for shapes in by_role(self.spec.layer_linears(index)):
                    self.progress("measure", index, len(self.layers))
                    options = []
                    for name, (linears, bits) in self._choices(shapes, stats[index]).items():
                        loss = 0.0
                        if linears and score == "kl":
                            loss = self._divergence(index, layer, linears, walk, exact)
                        elif linears:
                            names = {n: f"layers.{index}.{n}" for n in linears}
                            loss = sum(_estimate(gradients, names[n], op, tokens) for n, op in linears.items())
                        options.append(Option(name, bits, loss))
                    found.append(Unit(tuple(shape.name for shape in shapes), tuple(options)))
                walk.through(layer, self.codecs)
        return found

    def _stream(self) -> Stream:
        return Stream(self.windows, self.loader.embed(), self.loader.dtype)

    def _stats(self, layer: DecoderLayer, stream: Stream) -> dict[str, Stats]:
        """The largest magnitudes of the inputs of a layer's linears, by their last names."""
        plain, found = dict(layer.linears), {}
        for shape in self.spec.layer_linears(layer.index):
            leaf = leaf_of(shape.name)
            found[leaf] = Stats.empty(shape.in_features, self.device)
            layer.linears[leaf] = Recorder(plain[leaf], found[leaf])
        stream.watch(layer, self.codecs)
        layer.linears = plain
        return found

    def _choices(
        self, shapes: Sequence[LinearShape], stats: Mapping[str, Stats]
    ) -> dict[str, tuple[dict[str, LinearOp], int]]:
        """By candidate: the quantized linears by last name (none where all stay as they were), and bits in all."""
        weights = {shape.name: self.loader.weights(shape) for shape in shapes}
        floats = {n: w.weight.float() for n, w in weights.items() if isinstance(w.weight, Tensor)}
        found = {}
        for name, decided in self.candidates.items():
            quants = {shape.name: decided[shape.name] for shape in shapes if shape.name in decided}
            outers: dict[str, Tensor] = {}
            for group in by_input(shapes):
                outers |= shared_outers({shape.name: floats[shape.name] for shape in group}, quants)
            linears: dict[str, LinearOp] = {}
            bits = 0
            for shape in shapes:
                quant, weight = quants.get(shape.name), floats[shape.name]
                if quant is None or quant.weight is None:
                    bits += weight.numel() * self.loader.checkpoint.dtype.itemsize * 8
                    continue
                q = quantize(weight, quant.weight, outer=outers.get(shape.name))
                bits += q.bits
                leaf = leaf_of(shape.name)
                scale = input_scale(stats[leaf].amax.max(), quant.input) if quant.calibrated and quant.input else None
                served = LinearWeights(quant, q, weights[shape.name].bias, scale)
                linears[leaf] = Linear(self.loader.choose_for(quant, shape).kernel, served, self.loader.dtype)
            found[name] = linears, bits
        return found

    def _divergence(
        self, index: int, layer: DecoderLayer, linears: Mapping[str, LinearOp], stream: Stream, exact: Tensor
    ) -> float:
        """Mean KL divergence in nats with some linears of a layer replaced."""
        changed = stream.copy()
        changed.through(DecoderLayer(index, layer.layer, {**layer.linears, **linears}, layer.norms), self.codecs)
        for later in self.layers[index + 1 :]:
            changed.through(later, self.codecs)
        total = 0.0
        for mine, theirs in zip(changed.states().split(_PIECE), exact.split(_PIECE), strict=True):
            log_p, log_q = self._log_probs(theirs), self._log_probs(mine)
            total += (log_p.exp() * (log_p - log_q)).sum().item()
        return max(total / len(exact), 0.0)

    def _log_probs(self, states: Tensor) -> Tensor:
        return finish_logits(self.head(self.final_norm(states)), self.spec).log_softmax(-1)

    def _gradients(self) -> list[dict[str, tuple[Tensor, Tensor, Tensor]]]:
        """By window: of each linear its input x, output y and the gradient at y, by layer and last name."""
        found = []
        generator = torch.Generator(self.device).manual_seed(_SEED)
        embed = self.loader.embed()
        for number, window in enumerate(self.windows):
            self.progress("gradients", number, len(self.windows))
            seen: dict[str, tuple[Tensor, Tensor]] = {}
            ids = torch.tensor(window, device=self.device)
            positions = torch.arange(len(window), device=self.device)
            states = embed(ids, positions, self.loader.dtype).detach().clone().requires_grad_()
            rotary = Rotary(positions, states.dtype)
            for layer in self.layers:
                watched = {n: _watched(op, f"layers.{layer.index}.{n}", seen) for n, op in layer.linears.items()}
                seeing = DecoderLayer(layer.index, layer.layer, watched, layer.norms)
                states = seeing(states, rotary, DenseAttend(self.codecs, len(window)))
            log_p = self._log_probs(states)
            drawn = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
            gradients = torch.autograd.grad(log_p.gather(1, drawn).sum(), [y for _, y in seen.values()])
            pairs = zip(seen.items(), gradients, strict=True)
            found.append({name: (x.detach(), y.detach(), g) for (name, (x, y)), g in pairs})
        return found


def _watched(op: LinearOp, name: str, seen: dict[str, tuple[Tensor, Tensor]]) -> LinearOp:
    def run(x: Tensor) -> Tensor:
        y = op(x)
        seen[name] = x, y
        return y

    return run


def _estimate(
    gradients: Sequence[Mapping[str, tuple[Tensor, Tensor, Tensor]]], name: str, linear: LinearOp, tokens: int
) -> float:
    """``E[(g · Δy)²] / 2`` over all `tokens`, for one linear; `name` as in `_Model._gradients`."""
    total = 0.0
    for window in gradients:
        if name not in window:  # an expert to which no token went
            continue
        x, y, g = window[name]
        total += ((linear(x) - y).float() * g.float()).sum(-1).double().square().sum().item()
    return total / 2 / tokens
