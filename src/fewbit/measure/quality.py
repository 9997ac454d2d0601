"""How well a model predicts a text, alone and against another: perplexity, KL divergence, top-1 agreement.

Both models run layer by layer side by side, so memory is two layers and the states of some windows, not two models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from fewbit.checkpoint import Checkpoint
from fewbit.compress.stream import Stream
from fewbit.errors import RecipeError, UnsupportedError
from fewbit.measure.journal import Journal
from fewbit.model import KVCodec, Linear, Loader
from fewbit.model.decoder import finish_logits

TOKENS = {"cpu": 1 << 14, "cuda": 1 << 19}
"""Of windows that go through the layers together. With fewer a stopped run loses less, with more weights are read less
often. The same whether a run was stopped or not, since a GPU's sums depend on what is computed together."""
JOURNALLED = ("window",)
"""What names a line of the journal."""
RESAMPLES = 1000
"""Bootstrap resamples of the windows, from which errors and intervals of means come."""
SORTED_RESAMPLES = 200
"""Of quantiles, which look at every position each time."""


@dataclass(frozen=True)
class Estimate:
    """A figure, its standard error and its 95 % interval."""

    value: float
    error: float
    low: float
    high: float


@dataclass(frozen=True)
class Quality:
    """What `evaluate` found.

    Attributes:
        tokens: positions looked at: every one of every window that another window has not.
        windows: how many.
        perplexity: exp of the mean negative log-likelihood of each token but the first of a text.
        perplexity_base: the other model's.
        perplexity_ratio: model / base; both saw the same windows, so its interval is much narrower than theirs.
        kl_mean, kl_median, kl_p99, kl_max: KL(base || model) of the next-token distribution, in nats, over every
            position. The largest has no interval.
        top1_agreement: fraction of positions at which both would choose the same token.
        flips: fraction of tokens that exactly one of the two would have chosen.
        probability_rms: root mean square of the change in the probability of the token that follows.
    """

    tokens: int
    windows: int
    perplexity: Estimate
    perplexity_base: Estimate | None = None
    kl_mean: Estimate | None = None
    kl_median: Estimate | None = None
    kl_p99: Estimate | None = None
    top1_agreement: Estimate | None = None
    perplexity_ratio: Estimate | None = None
    flips: Estimate | None = None
    probability_rms: Estimate | None = None
    kl_max: float | None = None


def evaluate(
    model: Checkpoint,
    base: Checkpoint | None,
    windows: Sequence[Sequence[int]],
    device: torch.device,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
    overlap: int = 0,
    backend: str = "exact",
    journal: Journal | None = None,
) -> Quality:
    """Measure a model on windows of token ids, against `base` if given.

    Args:
        model: What is measured.
        base: What it is held against.
        windows: Of the text.
        device: Where to compute.
        progress: Told stage, layers done, layers in all.
        overlap: Tokens with which each window but the first repeats the one before: context only, not counted again.
        backend: Kernels of the model, not of the base: see `fewbit.model.load`.
        journal: Of windows that are done, named by `JOURNALLED`: a run that was stopped goes on, to the same figures.

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
        found: list[_Window] = []
        groups = list(_groups(windows, TOKENS[device.type]))
        for number, group in enumerate(groups):
            lines = [journal.find(index) if journal is not None else None for index in group]
            if None in lines:

                def told(stage: str, done: int, total: int, number: int = number) -> None:
                    progress(stage, number * total + done, len(groups) * total)

                computed = _computed(model, base, windows, group, overlap, device, told, backend)
                for index, line, window in zip(group, lines, computed, strict=True):
                    if line is not None:  # what was kept stays, whatever its last bits would be now
                        found.append(_Window.of(line))
                        continue
                    found.append(window)
                    if journal is not None:
                        journal.add({"window": index, **window.lists()})
            else:
                found += [_Window.of(line) for line in lines if line is not None]
        tokens = sum(map(len, windows)) - overlap * (len(windows) - 1)
        return _summarize(len(windows), tokens, found)


def _groups(windows: Sequence[Sequence[int]], tokens: int) -> Iterator[range]:
    """Numbers of windows of so many tokens together, or of one window."""
    start = held = 0
    for number, window in enumerate(windows):
        if held and held + len(window) > tokens:
            yield range(start, number)
            start, held = number, 0
        held += len(window)
    yield range(start, len(windows))


class Forward:
    """A model's states after the last layer, and its head."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        windows: Sequence[Sequence[int]],
        device: torch.device,
        progress: Callable[[str, int, int], None],
        name: str,
        backend: str = "exact",
    ) -> None:
        loader, spec = Loader(checkpoint, device, backend), checkpoint.spec
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


@dataclass
class _Window:
    """What a window's tokens cost each model and what else they say of it, and what every position says; float64."""

    losses: Tensor  # [predicted]
    base_losses: Tensor | None = None  # [predicted]; without a base neither this nor the others
    divergences: Tensor | None = None  # [positions]
    agreements: Tensor | None = None  # [positions]
    flips: Tensor | None = None  # [predicted]
    squares: Tensor | None = None  # [predicted]: of the change in probability

    def lists(self) -> dict[str, list[float]]:
        """As JSON has it, to the last bit."""
        return {name: values.tolist() for name, values in vars(self).items() if values is not None}

    @classmethod
    def of(cls, lists: Mapping[str, list[float]]) -> Self:
        """From `lists`."""
        known = (field.name for field in fields(cls) if field.name in lists)
        return cls(**{name: torch.tensor(lists[name], dtype=torch.float64) for name in known})


def _computed(
    model: Checkpoint,
    base: Checkpoint | None,
    windows: Sequence[Sequence[int]],
    group: range,
    overlap: int,
    device: torch.device,
    progress: Callable[[str, int, int], None],
    backend: str,
) -> Iterator[_Window]:
    """What the windows of a group say. The states and heads go when it ends: before the next group's are made."""
    cut = [windows[index] for index in group]
    mine = Forward(model, cut, device, progress, "model", backend)
    other = Forward(base, cut, device, progress, "base") if base else None
    yield from _compare(windows, group, overlap, mine, other)


def _compare(
    windows: Sequence[Sequence[int]], group: range, overlap: int, model: Forward, base: Forward | None
) -> Iterator[_Window]:
    """What the windows of a group say, of which alone the models have states."""
    start = 0
    for number in group:
        window, known = windows[number], overlap if number else 0  # positions that the window before has counted
        ids = torch.tensor(window, device=model.states.device)
        log_p = model.log_probs(start, start + len(window))
        first = max(known, 1)  # token that is predicted first
        target = ids[first:, None]
        mine = log_p[first - 1 : -1].gather(1, target)[:, 0]
        found = _Window(-mine.cpu())
        if base:
            log_b = base.log_probs(start, start + len(window))
            other = log_b[first - 1 : -1].gather(1, target)[:, 0]
            found.base_losses = -other.cpu()
            found.divergences = (log_b.exp() * (log_b - log_p)).sum(-1)[known:].cpu()
            top, top_b = log_p.argmax(-1), log_b.argmax(-1)
            found.agreements = (top == top_b).double()[known:].cpu()
            right, right_b = top[first - 1 : -1] == ids[first:], top_b[first - 1 : -1] == ids[first:]
            found.flips = (right != right_b).double().cpu()
            found.squares = (mine.exp() - other.exp()).square().cpu()
        yield found
        start += len(window)


def _summarize(windows: int, tokens: int, found: Sequence[_Window]) -> Quality:
    def each(name: str) -> list[Tensor]:
        return [getattr(window, name) for window in found]

    losses = each("losses")
    if found[0].divergences is None:
        return Quality(tokens, windows, estimate_mean(losses, torch.exp))
    base_losses, divergences = each("base_losses"), each("divergences")
    return Quality(
        tokens,
        windows,
        estimate_mean(losses, torch.exp),
        estimate_mean(base_losses, torch.exp),
        estimate_mean(divergences),
        estimate(divergences, lambda x: x.median().item()),
        estimate(divergences, lambda x: x.quantile(0.99).item() if x.numel() < 1 << 24 else _p99(x)),
        estimate_mean(each("agreements")),
        estimate_mean([a - b for a, b in zip(losses, base_losses, strict=True)], torch.exp),
        estimate_mean(each("flips")),
        estimate_mean(each("squares"), torch.sqrt),
        torch.cat(divergences).max().item(),
    )


def _p99(x: Tensor) -> float:
    """The 99 % quantile without the size limit of `torch.quantile`."""
    return x.kthvalue(max(1, round(0.99 * x.numel()))).values.item()


def estimate(by_window: Sequence[Tensor], statistic: Callable[[Tensor], float]) -> Estimate:
    """A statistic of all positions, with its standard error and interval by a bootstrap over windows.

    Tokens of a window are not independent, windows nearly are. A single window is resampled token by token.
    """
    units = _units(by_window)
    if not units:
        return Estimate(*[float("nan")] * 4)
    draws = _draws(len(units), SORTED_RESAMPLES)
    values = torch.tensor([statistic(torch.cat([units[i] for i in draw])) for draw in draws.tolist()])
    return _estimated(statistic(torch.cat(units)), values.double())


def estimate_mean(by_window: Sequence[Tensor], of: Callable[[Tensor], Tensor] = lambda mean: mean) -> Estimate:
    """The same of `of(mean)`: a window then counts by its sum and its length alone."""
    units = _units(by_window)
    if not units:
        return Estimate(*[float("nan")] * 4)
    sums = torch.stack([u.sum() for u in units]).double()
    lengths = torch.tensor([u.numel() for u in units], dtype=torch.float64)
    draws = _draws(len(units), RESAMPLES)
    values = torch.stack([of(sums[draw].sum() / lengths[draw].sum()) for draw in draws])
    return _estimated(of(torch.cat(units).double().mean()).item(), values)


def _units(by_window: Sequence[Tensor]) -> list[Tensor]:
    """What is resampled."""
    filled = [window for window in by_window if window.numel()]
    return filled if len(filled) > 1 else [token for window in filled for token in window.split(1)]


def _draws(units: int, resamples: int) -> Tensor:
    """Indices of resampled units [resamples, units]: the same text gives the same error bars."""
    return torch.randint(units, (resamples, units), generator=torch.Generator().manual_seed(0))


def _estimated(value: float, resampled: Tensor) -> Estimate:
    low, high = resampled.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(value, resampled.std().item(), low, high)
