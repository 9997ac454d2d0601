"""How well a model predicts a text, alone and against another: perplexity, KL divergence, top-1 agreement.

Both models run layer by layer side by side, so memory is two layers and the states of the text, not two models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.checkpoint import Checkpoint
from fewbit.compress.stream import Stream
from fewbit.errors import RecipeError, UnsupportedError
from fewbit.model import KVCodec, Linear, Loader
from fewbit.model.decoder import finish_logits

RESAMPLES = 200
"""Bootstrap resamples of the windows, from which the error bars come."""


@dataclass(frozen=True)
class Estimate:
    """A figure and its standard error."""

    value: float
    error: float


@dataclass(frozen=True)
class Quality:
    """What `evaluate` found.

    Attributes:
        tokens: positions looked at: every one of every window.
        windows: how many.
        perplexity: exp of the mean negative log-likelihood of each token but the first of a window.
        perplexity_base: the other model's.
        kl_mean, kl_median, kl_p99: KL(base || model) of the next-token distribution, in nats, over every position.
        top1_agreement: fraction of positions at which both would choose the same token.
    """

    tokens: int
    windows: int
    perplexity: Estimate
    perplexity_base: Estimate | None = None
    kl_mean: Estimate | None = None
    kl_median: Estimate | None = None
    kl_p99: Estimate | None = None
    top1_agreement: Estimate | None = None


def evaluate(
    model: Checkpoint,
    base: Checkpoint | None,
    windows: Sequence[Sequence[int]],
    device: torch.device,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Quality:
    """Measure a model on windows of token ids, against `base` if given.

    Raises:
        RecipeError: there is nothing to predict.
        UnsupportedError: the two have different vocabularies, or a window does not fit them.
    """
    if all(len(w) < 2 for w in windows):
        raise RecipeError("no window holds two tokens, so there is nothing to predict; give more text")
    for which in (model, base):
        if which and any(max(w) >= which.spec.vocab for w in windows):
            raise UnsupportedError(f"the data hold a token beyond the vocabulary of {which.path} ({which.spec.vocab})")
        if which and max(map(len, windows)) > which.spec.context:
            longest = max(map(len, windows))
            raise UnsupportedError(
                f"a window of {longest} tokens exceeds the context of {which.path} ({which.spec.context}); see --length"
            )
    if base and base.spec.vocab != model.spec.vocab:
        raise UnsupportedError(f"vocabularies differ: {model.spec.vocab} and {base.spec.vocab}; no KL divergence")
    with torch.inference_mode():
        run = _Forward(model, windows, device, progress, "model")
        other = _Forward(base, windows, device, progress, "base") if base else None
        return _summarize(windows, *_compare(windows, run, other))


class _Forward:
    """A model's states after the last layer, and its head."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        windows: Sequence[Sequence[int]],
        device: torch.device,
        progress: Callable[[str, int, int], None],
        name: str,
    ) -> None:
        loader, spec = Loader(checkpoint, device), checkpoint.spec
        stream = Stream(windows, loader.embed(), loader.dtype)
        codecs: list[KVCodec] = []
        for index in range(len(spec.layers)):
            progress(name, index, len(spec.layers))
            codecs.append(loader.codec(index))
            stream.through(loader.layer(index), codecs)
        progress(name, len(spec.layers), len(spec.layers))
        self.head: Linear = loader.head()
        self.norm, self.spec = loader.final_norm(), spec
        self.states = stream.states()

    def log_probs(self, start: int, stop: int) -> Tensor:
        """Natural-log probabilities of some positions, float64 [positions, vocab]."""
        return finish_logits(self.head(self.norm(self.states[start:stop])), self.spec).double().log_softmax(-1)


def _compare(
    windows: Sequence[Sequence[int]], model: _Forward, base: _Forward | None
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """By window: losses of the model and of the base [length - 1], KL and agreement [length] (empty without a base)."""
    losses, base_losses, divergences, agreements = [], [], [], []
    start = 0
    for window in windows:
        ids = torch.tensor(window, device=model.states.device)
        log_p = model.log_probs(start, start + len(window))
        losses.append(-log_p[:-1].gather(1, ids[1:, None])[:, 0].cpu())
        if base:
            log_b = base.log_probs(start, start + len(window))
            base_losses.append(-log_b[:-1].gather(1, ids[1:, None])[:, 0].cpu())
            divergences.append((log_b.exp() * (log_b - log_p)).sum(-1).cpu())
            agreements.append((log_b.argmax(-1) == log_p.argmax(-1)).double().cpu())
        start += len(window)
    return losses, base_losses, divergences, agreements


def _summarize(
    windows: Sequence[Sequence[int]],
    losses: list[Tensor],
    base_losses: list[Tensor],
    divergences: list[Tensor],
    agreements: list[Tensor],
) -> Quality:
    def perplexity(x: Tensor) -> float:
        return x.mean().exp().item()

    tokens, count = sum(map(len, windows)), len(windows)
    mine = estimate(losses, perplexity)
    if not divergences:
        return Quality(tokens, count, mine)
    return Quality(
        tokens,
        count,
        mine,
        estimate(base_losses, perplexity),
        estimate(divergences, lambda x: x.mean().item()),
        estimate(divergences, lambda x: x.median().item()),
        estimate(divergences, lambda x: x.quantile(0.99).item() if x.numel() < 1 << 24 else _p99(x)),
        estimate(agreements, lambda x: x.mean().item()),
    )


def _p99(x: Tensor) -> float:
    """The 99 % quantile without the size limit of `torch.quantile`."""
    return x.kthvalue(max(1, round(0.99 * x.numel()))).values.item()


def estimate(by_window: Sequence[Tensor], statistic: Callable[[Tensor], float]) -> Estimate:
    """A statistic of all positions, and its standard error by a bootstrap over windows.

    Tokens of a window are not independent, windows nearly are. A single window is resampled token by token.
    """
    generator = torch.Generator().manual_seed(0)  # the same text gives the same error bars
    whole = torch.cat(list(by_window))
    if whole.numel() == 0:
        return Estimate(float("nan"), float("nan"))
    units = list(by_window) if len(by_window) > 1 else list(whole.split(1))
    draws = torch.randint(len(units), (RESAMPLES, len(units)), generator=generator)
    values = torch.tensor([statistic(torch.cat([units[i] for i in draw])) for draw in draws.tolist()])
    return Estimate(statistic(whole), values.std().item())
