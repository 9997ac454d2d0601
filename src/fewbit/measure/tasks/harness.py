"""Tasks of lm-evaluation-harness, run by the harness itself with our answerer as its model. Needs `fewbit[lm-eval]`.

Prompts, metrics and filters are the harness's. Texts become tokens as its own models make them: without an opening
token, which stands only where a context is empty. Nothing is fetched unless HF_HUB_OFFLINE=0 says so.
"""

from __future__ import annotations

import asyncio
import functools
import math
import os
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

from fewbit.errors import FewbitError, RecipeError, UnsupportedError
from fewbit.measure.paired import interval, paired
from fewbit.measure.tasks.answer import several
from fewbit.measure.tasks.prompts import Continuation
from fewbit.measure.tasks.run import Progress
from fewbit.measure.tasks.source import Asked

MAX_GEN_TOKENS = 256
"""Of a generated text where a task says nothing: the harness's own."""


def check_harness(names: Sequence[str], include: Path | None = None) -> Any:
    """The harness's list of tasks, which holds these names. The arguments and errors are those of `run_harness`."""
    _model_class()  # it says what is not installed
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if include is None else str(include))
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        where = "" if include is None else f" or {include}"
        raise RecipeError(f"--tasks lm-eval:{unknown[0]}: no such task in lm-eval {lm_eval.__version__}{where}")
    return manager


async def run_harness(
    names: Sequence[str],
    asked: Asked,
    *,
    include: Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    at_once: int = 64,
    progress: Progress = lambda name, done, total: None,
) -> dict[str, Any]:
    """What the harness found: ``results`` by task as it writes them, ``scores`` of every sample, ``cut`` prompts.

    Args:
        names: Of its tasks.
        asked: Whom.
        include: A folder with descriptions of more tasks.
        limit: Samples of each task, the first ones.
        seed: Of the solved examples.
        at_once: Requests under way at a time.
        progress: Told of requests that are done.

    Raises:
        UnsupportedError: The harness is not installed.
        RecipeError: It does not know a task, or cannot run it.
        FewbitError: The model could not go on.
    """
    model = _model_class()(asked, asyncio.get_running_loop(), at_once, progress)
    return await asyncio.to_thread(_evaluate, model, list(names), include, limit, seed)


def _evaluate(model: Any, names: list[str], include: Path | None, limit: int | None, seed: int) -> dict[str, Any]:
    manager = check_harness(names, include)
    import lm_eval

    try:
        found = lm_eval.simple_evaluate(
            model=model, tasks=names, limit=limit, task_manager=manager, bootstrap_iters=0, log_samples=True,
            random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed,
        )  # fmt: skip
    except FewbitError:
        raise
    except Exception as error:
        if model.fault is not None:
            raise model.fault from error
        reason = " ".join(str(error).split())[:400]
        raise RecipeError(f"lm-eval could not run {', '.join(names)}: {type(error).__name__}: {reason}") from error
    assert found is not None
    return {
        "version": lm_eval.__version__,
        "results": {task: _plain(metrics) for task, metrics in found["results"].items()},
        "shots": dict(found.get("n-shot", {})),
        "scores": {
            task: scores_of(samples, found["results"].get(task, {})) for task, samples in found["samples"].items()
        },
        "cut": model.cut,
    }


def harness_report(found: Mapping[str, Any], base: Mapping[str, Any] | None = None, seed: int = 0) -> dict[str, Any]:
    """The results for the JSON object of `fewbit eval`: by task its metrics, and each metric against the base's.

    Args:
        found: From `run_harness`.
        base: The other model's.
        seed: Of the resampling behind the intervals.
    """
    tasks: dict[str, Any] = {}
    for task, metrics in found["results"].items():
        made: dict[str, Any] = {"metrics": metrics, "shots": found["shots"].get(task), "intervals": {}}
        for name, scores in found["scores"].get(task, {}).items():
            made["intervals"][name] = list(interval(list(scores.values()), seed))
            other = {} if base is None else base["scores"].get(task, {}).get(name, {})
            both = sorted(scores.keys() & other.keys())
            if both and len(both) == len(scores):
                pair = paired([other[i] for i in both], [scores[i] for i in both], seed)
                made.setdefault("paired", {})[name] = pair.figures()
        if base is not None:
            made["base"] = {"metrics": base["results"].get(task, {})}
        tasks[task] = made
    return {"version": found["version"], "cut_prompts": found["cut"], "tasks": tasks}


def shown(metrics: Mapping[str, float]) -> dict[str, float]:
    """A task's metrics without what lm-eval puts among them: their errors, and how many questions there were."""
    return {name: value for name, value in metrics.items() if "stderr" not in name and name != "sample_len"}


def _plain(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics that JSON can say; errors that were not computed are words or no numbers."""
    kept = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
    return {name: value for name, value in kept.items() if math.isfinite(value)}


def scores_of(samples: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any]) -> dict[str, dict[int, float]]:
    """Every metric that is the mean of a number of each sample: by its full name, ``acc,none``, then by the sample's.

    Args:
        samples: As the harness logs them: once for each filter.
        metrics: Of the task, as the harness aggregates them. Those whose value is no mean, as perplexities are not,
            have no scores here: an interval of the mean would be another figure's.
    """
    found: dict[str, dict[int, float]] = {}
    documents: dict[str, set[int]] = {}
    for sample in samples:
        of, number = sample.get("filter", "none"), int(sample["doc_id"])
        documents.setdefault(of, set()).add(number)
        for name in sample.get("metrics", ()):
            value = sample.get(name)
            if isinstance(value, (bool, int, float)):
                found.setdefault(f"{name},{of}", {})[number] = float(value)
    return {
        name: scores
        for name, scores in found.items()
        if len(scores) == len(documents[name.partition(",")[2]])
        and isinstance(value := metrics.get(name), (int, float))
        and math.isclose(math.fsum(scores.values()) / len(scores), value, rel_tol=1e-6, abs_tol=1e-9)
    }


@functools.cache
def _model_class() -> Any:
    """The class of our model in the harness's registry, as `fewbit`."""
    for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE", "TQDM_DISABLE"):  # how far it is, `progress` is told
        os.environ.setdefault(name, "1")
    try:
        from lm_eval.api.model import TemplateLM
        from lm_eval.api.registry import register_model
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    except ImportError as error:
        raise UnsupportedError(
            f"tasks of lm-eval need the package ({error}): pip install 'fewbit[lm-eval]', or leave out --tasks lm-eval:"
        ) from error

    @register_model("fewbit")
    class Model(TemplateLM):  # type: ignore[misc]
        """The harness calls this on a thread of its own; the answerer lives on an event loop."""

        def __init__(self, asked: Asked, loop: asyncio.AbstractEventLoop, at_once: int, progress: Progress) -> None:
            super().__init__()
            self._asked, self._loop, self._at_once, self._tell = asked, loop, at_once, progress
            self.cut = 0  # prompts that were cut at their beginning to fit, as the harness's models do
            self.fault: FewbitError | None = None

        @property
        def eot_token_id(self) -> int:
            eos = self._asked.tokenizer.eos_id
            if eos is None:
                raise self._failed(
                    UnsupportedError("the model's tokenizer names no end of a text, which lm-eval needs")
                )
            return eos

        @property
        def prefix_token_id(self) -> int:
            bos = self._asked.tokenizer.bos_id
            return self.eot_token_id if bos is None else bos

        @property
        def max_length(self) -> int:
            return self._asked.length

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **more: Any) -> list[int]:
            return self._asked.tokenizer.encode(string, add_special_tokens=bool(add_special_tokens))

        def _loglikelihood_tokens(self, requests: Any, **more: Any) -> list[tuple[float, bool]]:
            asked = [self._continuation(context, continuation) for _, context, continuation in requests]
            found = self._all("lm-eval, likelihoods", [self._asked.answerer.likelihood(one) for one in asked])
            return [(one.total, one.greedy) for one in found]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            of, asked = [], []
            for number, request in enumerate(requests):
                ids = self.tok_encode(request.args[0])
                windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length - 1, 1)
                for context, continuation in map(make_disjoint_window, windows):
                    of.append(number)
                    asked.append(Continuation(tuple(context), tuple(continuation), 0))
            totals = [0.0] * len(requests)
            found = self._all("lm-eval, texts", [self._asked.answerer.likelihood(one) for one in asked])
            for number, one in zip(of, found, strict=True):
                totals[number] += one.total
            return totals

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            return self._all("lm-eval, answers", [self._generated(*request.args) for request in requests])

        def _generated(self, context: str, settings: Mapping[str, Any]) -> Coroutine[Any, Any, str]:
            if settings.get("temperature") or settings.get("do_sample"):
                raise self._failed(
                    UnsupportedError(
                        "this task of lm-eval draws its answers at random; fewbit eval takes the likeliest"
                    )
                )
            until = settings.get("until") or []
            stop = [until] if isinstance(until, str) else list(until)
            most = int(settings.get("max_gen_toks") or settings.get("max_new_tokens") or MAX_GEN_TOKENS)
            if most >= self.max_length:
                raise self._failed(
                    RecipeError(f"lm-eval wants {most} tokens of an answer; the model takes {self.max_length}")
                )
            ids = self._fitted(self.tok_encode(context) or [self.prefix_token_id], self.max_length - most)
            return self._asked.answerer.text(ids, most, [text for text in stop if text])

        def _continuation(self, context: Sequence[int], continuation: Sequence[int]) -> Continuation:
            room = self.max_length - len(continuation)
            if room < 1 or not continuation:
                raise self._failed(
                    RecipeError(f"lm-eval scores {len(continuation)} tokens at once; the model takes {self.max_length}")
                )
            return Continuation(tuple(self._fitted(context, room)), tuple(continuation), 0)

        def _fitted(self, ids: Sequence[int], room: int) -> Sequence[int]:
            if len(ids) <= room:
                return ids
            self.cut += 1
            return ids[-room:]

        def _failed(self, fault: FewbitError) -> FewbitError:
            self.fault = self.fault or fault
            return fault

        def _all(self, stage: str, work: list[Coroutine[Any, Any, Any]]) -> list[Any]:
            """The results of coroutines, some at a time, on the answerer's event loop."""
            try:
                running = several(work, self._at_once, lambda done: self._tell(stage, done, len(work)))
                return asyncio.run_coroutine_threadsafe(running, self._loop).result()
            except FewbitError as fault:
                raise self._failed(fault) from None

    return Model
