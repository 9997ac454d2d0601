"""Perplexity by asking: of a model in the engine, or behind a URL, that gives log probabilities and nothing more."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewbit.errors import RecipeError
from fewbit.measure.quality import Quality, estimate_mean
from fewbit.measure.tasks.answer import several
from fewbit.measure.tasks.prompts import Continuation
from fewbit.measure.tasks.run import Progress
from fewbit.measure.tasks.source import Asked


async def losses(
    asked: Asked,
    windows: Sequence[Sequence[int]],
    overlap: int = 0,
    *,
    at_once: int = 64,
    progress: Progress = lambda name, done, total: None,
) -> list[Tensor]:
    """Negative log-likelihood, in nats, of the tokens of each window that are its own, float64.

    Args:
        asked: Whom.
        windows: Of tokens.
        overlap: See `fewbit.measure.quality.evaluate`.
        at_once: Windows under way at a time.
        progress: Told stage, windows done, windows in all.

    Raises:
        RecipeError: There is nothing to predict, or a window does not fit.
    """
    if all(len(window) < 2 for window in windows):
        raise RecipeError("no window holds two tokens, so there is nothing to predict; give more text")
    if (longest := max(map(len, windows))) > asked.length:
        raise RecipeError(f"a window of {longest} tokens: asked this way the model takes {asked.length}; see --length")

    async def of(number: int, window: Sequence[int]) -> Tensor:
        at = max(overlap if number else 0, 1)
        if len(window) <= at:
            return torch.empty(0, dtype=torch.float64)
        likelihood = await asked.answerer.likelihood(Continuation(tuple(window[:at]), tuple(window[at:]), 0))
        return -torch.tensor(likelihood.each, dtype=torch.float64)

    work = [of(number, window) for number, window in enumerate(windows)]
    return await several(work, at_once, lambda done: progress("perplexity", done, len(windows)))


def predicted(
    windows: Sequence[Sequence[int]], overlap: int, model: list[Tensor], base: list[Tensor] | None
) -> Quality:
    """What the losses of a model, and of its base, say; divergences need whole distributions, which nobody sent."""
    tokens = sum(map(len, windows)) - overlap * (len(windows) - 1)
    mine = estimate_mean(model, torch.exp)
    if base is None:
        return Quality(tokens, len(windows), mine)
    ratio = estimate_mean([a - b for a, b in zip(model, base, strict=True)], torch.exp)
    return Quality(tokens, len(windows), mine, estimate_mean(base, torch.exp), perplexity_ratio=ratio)
