"""Linear layers: the ordered list of kernels, and how one is chosen.

The order is a decision, so it stands here: best first, the reference last.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fewbit.errors import UnsupportedError, nearest_name
from fewbit.ops.linear.cpu import Cpu
from fewbit.ops.linear.dense import Dense
from fewbit.ops.linear.four import Fp4, Int4
from fewbit.ops.linear.problem import LinearKernel, LinearProblem, LinearWeights, round_input
from fewbit.ops.linear.reference import Reference
from fewbit.ops.linear.wide import Wide

KERNELS: tuple[LinearKernel, ...] = (Wide(), Int4(), Fp4(), Cpu(), Dense(), Reference())


@dataclass(frozen=True)
class Choice:
    """The kernel chosen, and why each better one of this kind of device declined."""

    kernel: LinearKernel
    declined: tuple[tuple[str, str], ...] = ()


def choose(problem: LinearProblem, backend: str = "auto") -> Choice:
    """The first kernel of the list that can do `problem`, or the one named by `backend`.

    ``exact``: the first one that multiplies floats and rounds no inputs which `problem` leaves as they are.

    Raises:
        UnsupportedError: `backend` names no kernel, or one that cannot do the problem.
    """
    if backend == "exact":
        problem = replace(problem, exact=True)
    elif backend != "auto":
        named = {kernel.name: kernel for kernel in KERNELS}
        if backend not in named:
            raise UnsupportedError(f"unknown backend '{backend}'; {nearest_name(backend, [*named, 'auto', 'exact'])}")
        if reason := named[backend].why_not(problem):
            raise UnsupportedError(f"backend '{backend}' cannot run {problem.quant}: {reason}; use --backend auto")
        return Choice(named[backend])
    declined: list[tuple[str, str]] = []
    for kernel in KERNELS:
        if kernel.device not in (None, problem.device.kind):  # nothing to say about kernels of another machine
            continue
        reason = kernel.why_not(problem)
        if reason is None:
            return Choice(kernel, tuple(declined))
        declined.append((kernel.name, reason))
    raise AssertionError("the reference does everything")


__all__ = ["KERNELS", "Choice", "LinearKernel", "LinearProblem", "LinearWeights", "choose", "round_input"]
