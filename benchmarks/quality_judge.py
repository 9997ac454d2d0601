"""The evaluator of the quality benchmark, and the float models it judges against, with outliers if wanted."""

from __future__ import annotations

import json
import math
import shutil
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

import fewbit
from fewbit.checkpoint.names import Names
from fewbit.model import Decoder, DenseAttend, load

Ids = list[list[int]]


@dataclass(frozen=True)
class Scores:
    """One quantized model against the float one, a figure for each held-out window.

    Attributes:
        kl: mean KL(float || quantized) over positions, in nats.
        loss, loss_base: mean negative log-likelihoods of the quantized and of the float model.
        agreement: share of positions at which both choose the same token.
    """

    kl: list[float]
    loss: list[float]
    loss_base: list[float]
    agreement: list[float]

    def figures(self) -> tuple[float, float, float]:
        """KL, perplexity ratio, agreement."""
        kl, loss, base, agreement = (statistics.fmean(x) for x in asdict(self).values())
        return kl, math.exp(loss - base), agreement


class Judge:
    """The evaluator: fewbit's forward in float32 on the CPU."""

    def __init__(self, model: Path, held_out: Ids) -> None:
        self.held_out = held_out
        self.base, self.states = self._run(model)

    def _run(self, path: Path) -> tuple[Decoder, torch.Tensor]:
        decoder = load(fewbit.open_checkpoint(path))
        assert isinstance(decoder, Decoder)
        states = []
        for window in self.held_out:
            attend = DenseAttend(decoder.codecs, len(window))
            states.append(decoder.hidden(torch.tensor(window), torch.arange(len(window)), attend))
        return decoder, torch.stack(states)

    @torch.inference_mode()
    def __call__(self, path: Path) -> Scores:
        """Compare a model with the float one.

        Raises:
            FewbitError: fewbit cannot read it.
        """
        model, states = self._run(path)
        found = Scores([], [], [], [])
        for window, mine, theirs in zip(self.held_out, states, self.states, strict=True):
            after = torch.tensor(window[1:])[:, None]
            log_p, log_b = (m.logits(s).double().log_softmax(-1) for m, s in ((model, mine), (self.base, theirs)))
            found.kl.append((log_b.exp() * (log_b - log_p)).sum(-1).mean().item())
            found.loss.append(-log_p[:-1].gather(1, after).mean().item())
            found.loss_base.append(-log_b[:-1].gather(1, after).mean().item())
            found.agreement.append((log_b.argmax(-1) == log_p.argmax(-1)).double().mean().item())
        return found

    @torch.inference_mode()
    def distance(self, path: Path) -> float:
        """The largest difference of a logit from the float model's."""
        model, states = self._run(path)
        pairs = zip(states, self.states, strict=True)
        return max((model.logits(a) - self.base.logits(b)).abs().max().item() for a, b in pairs)


def in_float32(model: Path, target: Path, outliers: int | None = None) -> Path:
    """The same model stored in float32; with a seed for `outliers`, the same function with outlier channels.

    About 2 % of the channels of every norm before attention and MLP are multiplied by factors from 20 to 100, and the
    columns of what reads them divided by the same.
    """
    checkpoint, width = fewbit.open_checkpoint(model), fewbit.open_checkpoint(model).spec.hidden
    tensors = {n: checkpoint.tensors.dense(n).float().clone() for n in checkpoint.tensors}
    generator = torch.Generator().manual_seed(outliers or 0)
    for i in range(len(checkpoint.spec.layers) if outliers is not None else 0):
        for norm, readers in (("pre_attn", ("attn.q", "attn.k", "attn.v")), ("pre_mlp", ("mlp.gate", "mlp.up"))):
            factor = torch.ones(width)
            chosen = torch.randperm(width, generator=generator)[: max(1, round(0.02 * width))]
            factor[chosen] = 20 + 80 * torch.rand(len(chosen), generator=generator)
            tensors[f"layers.{i}.{norm}.weight"] *= factor
            for reader in readers:
                tensors[f"layers.{i}.{reader}.weight"] /= factor
    target.mkdir(parents=True)
    names = Names(checkpoint.family, checkpoint.spec)
    save_file({names.tensor(n): t for n, t in tensors.items()}, target / "model.safetensors", {"format": "pt"})
    config = {k: v for k, v in checkpoint.config.items() if k != "torch_dtype"} | {"dtype": "float32"}
    (target / "config.json").write_text(json.dumps(config, indent=2), "utf8")
    for name, file in checkpoint.files.items():
        shutil.copy(file, target / name)
    return target
