"""One peer's part of the quality benchmark: quantize, evaluate itself, export. Runs in the peers' environment.

Started by `quality.py` as ``.venv-peers/bin/python quality_peer.py JOB.json``; imports nothing of fewbit. The job names
a tool, a model directory, files of token ids, and what to make; for each way the tool's standard export is left in
``OUT/WAY`` and what happened in ``OUT/WAY.json``. A way that fails does not stop the others.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BATCH = 8  # calibration windows of Model Optimizer's forward loop at once
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VERSIONS = ("nvidia-modelopt", "llmcompressor", "compressed-tensors", "transformers", "torch")

Ids = list[list[int]]
Make = Callable[[Any, Ids], Any]


# --- Model Optimizer --------------------------------------------------------------------------------------------------


def _modelopt(config: str, algorithm: dict[str, Any] | None = None) -> Make:
    """`mtq.quantize` with one of its configs; `algorithm` in place of the config's own."""

    def make(model: Any, ids: Ids) -> Any:
        import modelopt.torch.quantization as mtq

        chosen = copy.deepcopy(getattr(mtq, config))
        if algorithm is not None:
            chosen["algorithm"] = algorithm

        def forward_loop(m: torch.nn.Module) -> None:
            for start in range(0, len(ids), BATCH):
                m(torch.tensor(ids[start : start + BATCH], device=DEVICE))

        return mtq.quantize(model, chosen, forward_loop)

    return make


def _export_modelopt(model: torch.nn.Module, target: Path) -> None:
    from modelopt.torch.export import export_hf_checkpoint

    export_hf_checkpoint(model, export_dir=str(target))


MODELOPT: dict[str, Make] = {
    "FP8": _modelopt("FP8_DEFAULT_CFG"),
    "SQ": _modelopt("INT8_SMOOTHQUANT_CFG"),
    "SQ, alpha 0.8": _modelopt("INT8_SMOOTHQUANT_CFG", {"method": "smoothquant", "alpha": 0.8}),
    "max": _modelopt("INT4_BLOCKWISE_WEIGHT_ONLY_CFG"),
    "mse": _modelopt("INT4_BLOCKWISE_WEIGHT_ONLY_CFG", {"method": "mse"}),
    "AWQ lite": _modelopt("INT4_AWQ_CFG"),
    "AWQ full": _modelopt("INT4_AWQ_CFG", {"method": "awq_full"}),
    "GPTQ": _modelopt("INT4_BLOCKWISE_WEIGHT_ONLY_CFG", {"method": "gptq"}),
    "GPTQ, layerwise": _modelopt("INT4_BLOCKWISE_WEIGHT_ONLY_CFG", {"method": "gptq", "layerwise": {"enable": True}}),
    "NVFP4": _modelopt("NVFP4_DEFAULT_CFG"),
    "NVFP4 AWQ lite": _modelopt("NVFP4_AWQ_LITE_CFG"),
    "NVFP4 AWQ full": _modelopt("NVFP4_AWQ_FULL_CFG"),
    "NVFP4 SVDQuant": _modelopt("NVFP4_SVDQUANT_DEFAULT_CFG"),
    "MXFP4": _modelopt("MXFP4_DEFAULT_CFG"),
}


# --- llm-compressor ---------------------------------------------------------------------------------------------------

Recipe = Callable[[], list[Any]]


def _llmcompressor(recipe: Recipe) -> Make:
    """`oneshot` with a recipe, on the windows as they are, in their order."""

    def make(model: Any, ids: Ids) -> Any:
        from datasets import Dataset
        from llmcompressor import oneshot

        if not torch.accelerator.is_available():
            # its AWQ pins the memory of what it caches, which torch refuses without a GPU; what counts as pinned is not
            # pinned again, and no number depends on it
            torch.Tensor.is_pinned = lambda self, *_, **__: True  # type: ignore[method-assign]
        data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(window) for window in ids]})
        return oneshot(
            model=model,
            dataset=data,
            recipe=recipe(),
            num_calibration_samples=len(ids),
            max_seq_length=max(map(len, ids)),
            shuffle_calibration_samples=False,
        )

    return make


def _rounding(scheme: str, **more: Any) -> Recipe:
    def recipe() -> list[Any]:
        from llmcompressor.modifiers.quantization import QuantizationModifier

        return [QuantizationModifier(targets="Linear", scheme=scheme, ignore=["lm_head"], **more)]

    return recipe


def _gptq(scheme: str, **more: Any) -> Recipe:
    def recipe() -> list[Any]:
        from llmcompressor.modifiers.gptq import GPTQModifier

        return [GPTQModifier(targets="Linear", scheme=scheme, ignore=["lm_head"], **more)]

    return recipe


def _awq(then: Recipe, **more: Any) -> Recipe:
    def recipe() -> list[Any]:
        from llmcompressor.modifiers.transform.awq import AWQModifier

        return [AWQModifier(**more), *then()]

    return recipe


def _smooth(then: Recipe, strength: float = 0.8) -> Recipe:
    def recipe() -> list[Any]:
        from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

        return [SmoothQuantModifier(smoothing_strength=strength), *then()]

    return recipe


def _int8_static(kind: str) -> Recipe:
    """INT8 with a scale a row and one calibrated scale for inputs, for which there is no preset."""

    def recipe() -> list[Any]:
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
        from llmcompressor.modifiers.gptq import GPTQModifier
        from llmcompressor.modifiers.quantization import QuantizationModifier

        eight: dict[str, Any] = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False}
        scheme = QuantizationScheme(
            targets=["Linear"],
            weights=QuantizationArgs(strategy="channel", **eight),
            input_activations=QuantizationArgs(strategy="tensor", observer="static_minmax", **eight),
        )
        modifier = {"gptq": GPTQModifier, "round": QuantizationModifier}[kind]
        return [modifier(config_groups={"group_0": scheme}, ignore=["lm_head"])]

    return recipe


LLMCOMPRESSOR: dict[str, Make] = {
    "FP8": _llmcompressor(_rounding("FP8")),
    "SQ": _llmcompressor(_smooth(_int8_static("round"))),
    "SQ, GPTQ": _llmcompressor(_smooth(_int8_static("gptq"))),
    "SQ, GPTQ, per token": _llmcompressor(_smooth(_gptq("W8A8"))),
    "minmax": _llmcompressor(_rounding("W4A16")),
    "mse": _llmcompressor(_rounding("W4A16", weight_observer="memoryless_mse")),
    "AWQ": _llmcompressor(_awq(_rounding("W4A16"))),
    "AWQ, both, mse": _llmcompressor(
        _awq(_rounding("W4A16", weight_observer="memoryless_mse"), duo_scaling="both"),
    ),
    "GPTQ": _llmcompressor(_gptq("W4A16")),
    "GPTQ, mse": _llmcompressor(_gptq("W4A16", weight_observer="memoryless_mse")),
    "NVFP4": _llmcompressor(_rounding("NVFP4")),
    "NVFP4 AWQ": _llmcompressor(_awq(_rounding("NVFP4"))),
    "MXFP4": _llmcompressor(_rounding("MXFP4")),
}


def _export_llmcompressor(model: Any, target: Path) -> None:
    model.save_pretrained(str(target), save_compressed=True)


TOOLS: dict[str, tuple[dict[str, Make], Callable[[torch.nn.Module, Path], None]]] = {
    "modelopt": (MODELOPT, _export_modelopt),
    "llm-compressor": (LLMCOMPRESSOR, _export_llmcompressor),
}


# --- the tool's own evaluation ----------------------------------------------------------------------------------------


@torch.inference_mode()
def _log_probs(model: torch.nn.Module, ids: Ids) -> Iterator[Tensor]:
    """Of each window, float64 [length, vocab]."""
    for window in ids:
        yield model(torch.tensor([window], device=DEVICE)).logits[0].double().log_softmax(-1)


def evaluate(model: torch.nn.Module, base: torch.nn.Module, ids: Ids) -> dict[str, list[float]]:
    """KL(base || model), mean losses and agreement of each window, by the tool's own fake quantization."""
    found: dict[str, list[float]] = {"kl": [], "loss": [], "loss_base": [], "agreement": []}
    for window, log_b, log_p in zip(ids, _log_probs(base, ids), _log_probs(model, ids), strict=True):
        after = torch.tensor(window[1:], device=DEVICE)[:, None]
        found["kl"].append((log_b.exp() * (log_b - log_p)).sum(-1).mean().item())
        found["loss"].append(-log_p[:-1].gather(1, after).mean().item())
        found["loss_base"].append(-log_b[:-1].gather(1, after).mean().item())
        found["agreement"].append((log_b.argmax(-1) == log_p.argmax(-1)).double().mean().item())
    return found


# --- the job ----------------------------------------------------------------------------------------------------------


def _ids(path: str) -> Ids:
    return [json.loads(line)["ids"] for line in Path(path).read_text("utf8").splitlines()]


def _versions() -> dict[str, str]:
    """Of the packages that are there: an environment may hold one tool alone."""
    found = {}
    for name in VERSIONS:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _load(job: dict[str, Any], dtype: str | torch.dtype = "auto") -> Any:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype)  # it comes in eval mode
    return model.to(DEVICE)


def _why(error: BaseException) -> dict[str, Any]:
    where = traceback.extract_tb(error.__traceback__)[-1]
    return {"reason": f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"}


def _run(job: dict[str, Any], way: str, base: torch.nn.Module) -> dict[str, Any]:
    """One way, from the float model to the export."""
    makers, export = TOOLS[job["tool"]]
    target, start = Path(job["out"]) / way, time.perf_counter()
    try:
        model = makers[way](_load(job), _ids(job["calibration"]))
    except Exception as error:
        return {"status": "failed", **_why(error), "gpu": DEVICE == "cuda"}
    found: dict[str, Any] = {"status": "done", "seconds": time.perf_counter() - start, "own": None}
    try:
        if way in job["own"]:
            found["own"] = evaluate(model, base, _ids(job["held_out"]))
    except Exception as error:  # a format whose fake quantization needs a GPU can often be exported without one
        found["own_why_not"] = _why(error)["reason"]
    try:
        export(model, target)
    except Exception as error:
        found |= {"export_why_not": _why(error)["reason"]}
    if found["own"] is None and "export_why_not" in found:
        found |= {"status": "failed", "reason": found.get("own_why_not", found["export_why_not"])}
    return found | {"gpu": DEVICE == "cuda"}


def main(path: str) -> None:
    """Do the job that a file describes."""
    job = json.loads(Path(path).read_text("utf8"))
    warnings.simplefilter("ignore")
    logging.getLogger().setLevel(logging.ERROR)
    out = Path(job["out"])
    (out / "versions.json").write_text(json.dumps(_versions()))
    base = _load(job, torch.float32)
    for way in job["ways"]:
        found = _run(job, way, base)
        (out / f"{way}.json").write_text(json.dumps(found))
        print(f"{way}: {found['status']} {found.get('reason', '')}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
