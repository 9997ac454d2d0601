"""How much of a GPU's memory bandwidth (MBU) and arithmetic (MFU) a server's figures amount to.

MBU = what a decode step must read / TPOT / peak bandwidth: the weights as stored, scales included, and K and V of the
sequences that were decoding. MFU = floating-point operations of all prompts and answers / duration / peak, for linears
with 8-bit inputs that of 8-bit products. The client sees neither batch nor steps, so the batch is the mean number of
answers that were streaming while any was.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import Any

from fewbit.checkpoint import Checkpoint
from fewbit.measure.dummy import decode_bytes, eight_bit_share, prefill_flops
from fewbit.measure.load.report import Result
from fewbit.measure.peaks import Peak


@dataclass(frozen=True)
class Utilization:
    """What was read and computed.

    Attributes:
        batch: mean number of answers that were streaming, while any was.
        context: mean tokens of a sequence in the middle of its answer.
        bytes_per_step: weights and K and V that a step of that batch reads.
        bytes_per_s: over the median TPOT.
        flops_per_s: of all prompts and answers, over the duration.
        mbu, mfu: shares of the peaks; None: no peak was given.
    """

    batch: float
    context: float
    bytes_per_step: float
    bytes_per_s: float
    flops_per_s: float
    mbu: float | None
    mfu: float | None


def utilization(result: Result, checkpoint: Checkpoint, peak: Peak | None) -> dict[str, Any] | None:
    """The utilization in a run; None: no answer has two tokens, or nobody counted the prompts' tokens.

    Args:
        result: the run.
        checkpoint: the model that was served; only its headers are looked at.
        peak: of the GPU it was served on.
    """
    counted = [(r, f, f.prompt_tokens) for r, f in result.good if f.tpot and f.prompt_tokens]
    if not counted:
        return None
    streaming = [(r.arrivals[0], r.arrivals[-1]) for r, _, _ in counted]
    batch = sum(end - start for start, end in streaming) / _covered(streaming)
    context = statistics.fmean(prompt + f.tokens / 2 for _, f, prompt in counted)
    read = sum(decode_bytes(checkpoint, batch, context))
    bytes_per_s = read / statistics.median(f.tpot for _, f, _ in counted if f.tpot)
    computed = sum(sum(prefill_flops(checkpoint, prompt + f.tokens, f.tokens)) for _, f, prompt in counted)
    flops_per_s = computed / result.duration
    mbu = bytes_per_s / peak.bytes_per_s if peak else None
    mfu = flops_per_s / peak.mixed(eight_bit_share(checkpoint)) if peak else None
    return asdict(Utilization(batch, context, read, bytes_per_s, flops_per_s, mbu, mfu))


def _covered(intervals: list[tuple[float, float]]) -> float:
    """Seconds in at least one of the intervals."""
    total, until = 0.0, -float("inf")
    for start, end in sorted(intervals):
        total += max(end - max(start, until), 0.0)
        until = max(until, end)
    return total
