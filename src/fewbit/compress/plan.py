"""What a compression will do, settled before any weight is read, and what it did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from fewbit.checkpoint import Checkpoint, format_named
from fewbit.checkpoint.acceptance import dialect_for, engines, nearest
from fewbit.checkpoint.formats import FileFormat, trtllm
from fewbit.checkpoint.layout import Quantization
from fewbit.checkpoint.names import Names
from fewbit.checkpoint.places import Places
from fewbit.compress.recipe import Recipe, built_in, read_recipe
from fewbit.compress.verify import Verified
from fewbit.errors import RecipeError, UnsupportedError
from fewbit.numerics.quantspec import KVSpec, QuantSpec
from fewbit.spec.decoder import DecoderSpec


@dataclass(frozen=True)
class Plan:
    """What will be done, settled before any weight is read.

    Attributes:
        recipe: what was asked for.
        spec: the decoder as it will be written (a quantized head of a tied model is untied).
        quant: QuantSpec by linear.
        kv: KVSpec by layer.
        export: the file format.
        calibrated: whether data are needed.
    """

    recipe: Recipe
    spec: DecoderSpec
    quant: Mapping[str, QuantSpec]
    kv: Mapping[int, KVSpec]
    export: str
    calibrated: bool


@dataclass
class Report:
    """What was done.

    Attributes:
        seconds: time by stage; on a GPU loading and writing go on beside the others.
        weight_error: relative error of each quantized weight, ``|W - Q| / |W|`` in the Frobenius norm, by linear.
        output_error: relative error of each layer's output on held-out text, by layer, errors of earlier ones included.
        kl: mean KL divergence of the next-token distribution on that text, in nats.
        peak_bytes: largest resident memory of the process.
        grown_bytes: how much of that is growth since the start.
        device_bytes: largest memory taken from the GPU; 0 on a CPU.
        calibration: which data were used, in words.
        resumed_after: layers that an earlier run had finished.
        experts: tokens that each expert saw, by canonical name; empty without a mixture or statistics.
        scarce: experts that saw too few for statistics of their own (see `fewbit.compress.calibrate.FLOOR`).
        verified: what the finished files were found to hold.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    weight_error: dict[str, float] = field(default_factory=dict)
    output_error: dict[int, float] = field(default_factory=dict)
    kl: float = 0.0
    peak_bytes: int = 0
    grown_bytes: int = 0
    device_bytes: int = 0
    calibration: str = "none needed"
    resumed_after: int = 0
    experts: dict[str, int] = field(default_factory=dict)
    scarce: list[str] = field(default_factory=list)
    verified: Verified | None = None


def prepared(checkpoint: Checkpoint, recipe: Recipe) -> Checkpoint:
    """The model as techniques that change all of it at once want it: nothing is read yet."""
    for technique in recipe.techniques:
        if hasattr(technique, "model"):
            checkpoint = technique.model(checkpoint)
    return checkpoint


def format_to_fill(name: str) -> FileFormat:
    """The file format of a name, for a compression that fills its files layer by layer.

    Raises:
        UnsupportedError: there is none, or it cannot be filled so.
    """
    if name == trtllm.NAME:
        raise UnsupportedError("a TensorRT-LLM checkpoint is made of a compressed model: use fewbit export --to trtllm")
    return format_named(name)


def plan(checkpoint: Checkpoint, recipe: Recipe, export: str = "compressed-tensors") -> Plan:
    """Settle what a recipe means for a model, and that the file format can say it.

    Raises:
        RecipeError, UnsupportedError: a rule, a layer or the file format does not fit.
    """
    if checkpoint.quant or checkpoint.kv:
        raise UnsupportedError(
            f"{checkpoint.path} is already quantized ({checkpoint.format}); start from the original weights"
        )
    if recipe.auto is not None:
        raise RecipeError(f"recipe {recipe.name} decides by measuring; call fewbit.compress.decide and plan its recipe")
    checkpoint = prepared(checkpoint, recipe)
    quant = recipe.resolve(checkpoint.spec)
    kv = dict.fromkeys(range(len(checkpoint.spec.layers)), recipe.kv) if recipe.kv else {}
    spec = replace(checkpoint.spec, tied=checkpoint.spec.tied and "lm_head" not in quant)
    if reason := format_to_fill(export).why_not(spec, Quantization(quant, kv)):
        raise UnsupportedError(reason)
    Places(Names(checkpoint.family, spec), spec, quant).check()
    if any(hasattr(t, "correct") for t in recipe.techniques) and not any(
        linear.bias and linear.name in quant for linear in spec.linears()
    ):
        raise RecipeError("bias_correction: no linear that will be quantized has a bias; leave it out")
    if recipe.calibration.method != "max" and not (kv or any(q.input_scale == "static" for q in quant.values())):
        raise RecipeError(f"method {recipe.calibration.method}: no scale here is calibrated whose range it could cut")
    layered = [t for t in recipe.techniques if hasattr(t, "layer")]
    if len(layered) > 1:
        raise RecipeError("a recipe can hold one technique that rounds weights, not several")
    needy = any(t.needs != "none" for t in recipe.techniques)
    calibrated = bool(kv) or needy or any(q.calibrated for q in quant.values())
    return Plan(recipe, spec, quant, kv, export, calibrated)


def dialect(checkpoint: Checkpoint, recipe: Recipe, engine: str) -> str:
    """The file format in which an engine loads what a recipe makes of a model, known before anything is measured.

    Raises:
        UnsupportedError: in none; the message names the nearest recipe that it does load.
    """
    spec = checkpoint.spec
    if recipe.auto is not None:  # any mixture of its candidates
        kinds = [read_recipe(name).rules[0].quant for name in recipe.auto.candidates if name != "none"]
        linears = [linear.name for linear in spec.linears() if linear.name != "lm_head"]
        quant = {name: kinds[number % len(kinds)] for number, name in enumerate(linears)}
    else:
        quant = recipe.resolve(spec)
    kv = dict.fromkeys(range(len(spec.layers)), recipe.kv) if recipe.kv else {}
    try:
        return dialect_for(engine, spec, Quantization(quant, kv))
    except UnsupportedError as error:
        if engine not in engines():
            raise
        known = {name: read_recipe(name) for name in built_in()}
        simple = {name: r.rules[0].quant for name, r in known.items() if r.rules and not r.splitting}
        found = nearest(engine, spec, Quantization(quant, {}), simple)
        hint = f"; the nearest recipe that it does load is '{found}'" if found and found != recipe.name else ""
        raise UnsupportedError(f"{error}{hint}") from None
