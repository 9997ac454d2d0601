"""Quantize and export in two calls, configured as scripts around NeMo's and Model Optimizer's quantizers are.

A thin layer over `quantize`: two configs are read strictly, and a decoder of a known family is written as a checkpoint.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.checkpoint import CheckpointWriter, format_named, open_checkpoint
from fewbit.checkpoint.checkpoint import CARRIED
from fewbit.checkpoint.files import read_json
from fewbit.checkpoint.layout import Quantization
from fewbit.compress.fake import FakeQuant
from fewbit.compress.inputs import ForwardLoop
from fewbit.compress.known import Known, known
from fewbit.compress.module import quantize
from fewbit.compress.plan import format_to_fill
from fewbit.compress.recipe import Recipe, read_recipe
from fewbit.compress.techniques import awq, smoothquant
from fewbit.errors import CheckpointError, RecipeError, UnsupportedError, nearest_name
from fewbit.numerics.format import FORMATS, Format
from fewbit.numerics.qtensor import QTensor
from fewbit.spec.families import families
from fewbit.spec.hfconfig import HFConfig

_OF_THE_LOOP = (
    "calib_dataset", "calibration_dataset", "num_calib_size", "calibration_dataset_size", "calibration_batch_size",
    "calibration_seq_len", "decoder_type",
)  # fmt: skip
"""Settings that the caller's forward loop is made of; nothing is left to do about them here."""
_QUANTIZATION = ("algorithm", "awq_block_size", "sq_alpha", "enable_kv_cache", "kv_cache_qformat", *_OF_THE_LOOP)
_RANKS = ("inference_tensor_parallel", "inference_pipeline_parallel", "inference_tp", "inference_pp")
_EXPORT = ("path", "save_path", "decoder_type", "dtype", "format", "export_format", "model_dir", "force", *_RANKS)
_DTYPES = {
    **dict.fromkeys(("16", "fp16", "float16", "16-mixed"), torch.float16),
    **dict.fromkeys(("bf16", "bfloat16", "bf16-mixed"), torch.bfloat16),
    **dict.fromkeys(("32", "fp32", "float32"), torch.float32),
}


class Quantizer:
    """Quantizes a module by one config and exports it by another.

    Args:
        quantization_config: ``algorithm`` (a built-in recipe's name; None: nothing is quantized), ``awq_block_size``
            (width of INT4 groups, where the algorithm has awq), ``sq_alpha`` (where it has smoothquant). What describes
            calibration data is for whoever makes the forward loop, and accepted. ``enable_kv_cache`` is refused.
        export_config: ``path`` (or ``save_path``), ``format`` (``compressed-tensors``, or ``hf`` for Model Optimizer's
            layout), ``dtype`` of what is not quantized, ``model_dir`` (whose config.json and tokenizer are taken
            along), ``force`` (replace what is there), ``decoder_type`` and the numbers of ranks, which are checked: the
            folder is the same for any number.

    Raises:
        RecipeError, UnsupportedError: an unknown setting, or one that cannot be honoured.
    """

    def __init__(self, quantization_config: Any = None, export_config: Any = None) -> None:
        self.quantization = _settings(quantization_config, "quantization_config", _QUANTIZATION)
        self.export_config = _settings(export_config, "export_config", _EXPORT)
        self.recipe = _recipe(self.quantization)
        self.dtype = _dtype(self.export_config.get("dtype"))
        self.format = (
            self.export_config.get("format") or self.export_config.get("export_format") or "compressed-tensors"
        )
        format_to_fill(self.format)
        for name in _RANKS:
            number = self.export_config.get(name, 1)
            if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                raise RecipeError(f"export_config: {name} is {number!r}, expected a whole number of at least 1")

    def quantize(self, model: nn.Module, forward_loop: ForwardLoop | None = None) -> nn.Module:
        """Quantize a module in place by the config's algorithm, as `fewbit.quantize` does."""
        return model if self.recipe is None else quantize(model, self.recipe, forward_loop)

    @torch.no_grad()
    def export(self, model: nn.Module, model_dir: str | Path | None = None) -> Path:
        """Write a decoder of transformers as a checkpoint folder, open it again and compare every tensor.

        Args:
            model: of a family that fewbit knows; its config.json is that of `model_dir`, or the model's own.
            model_dir: as in the config.

        Returns:
            The folder.

        Raises:
            UnsupportedError: the model is of no known family, or the format cannot say what was done to it.
            CheckpointError: the target is in the way, `model_dir` is of another model, or what was written differs.
        """
        given = self.export_config.get("path") or self.export_config.get("save_path")
        if not given:
            raise RecipeError("export_config: needs 'path', the folder to write to")
        if (found := known(model)) is None:
            raise UnsupportedError(
                f"{type(model).__name__} is no transformers model of a family with a checkpoint format "
                f"({', '.join(families())}); keep it with fewbit.save_state and fewbit.restore_state"
            )
        self._check_decoder_type(found)
        fakes = {linear.name: model.get_submodule(found.names.module(linear.name)) for linear in found.spec.linears()}
        quantized = {name: layer for name, layer in fakes.items() if isinstance(layer, FakeQuant)}
        quant = Quantization({name: layer.quant for name, layer in quantized.items()}, {})
        spec = replace(found.spec, tied=found.spec.tied and "lm_head" not in quantized)
        fmt = format_named(self.format)
        if reason := fmt.why_not(spec, quant):
            raise UnsupportedError(reason)
        tensors: dict[str, Tensor | QTensor] = {}
        for name in spec.tensors():
            layer = quantized.get(name.removesuffix(".weight"))
            if layer is None:
                dense = found.tensor(name).detach()
                tensors[name] = dense if self.dtype is None else dense.to(self.dtype)
        folder = Path(model_dir or self.export_config.get("model_dir") or "")
        config, files = _beside(found, folder if str(folder) != "." else None)
        dtypes = {name: tensor.dtype for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
        for key in {"dtype", *({"torch_dtype"} & config.keys())}:
            config[key] = str(dtypes["embed.weight"]).removeprefix("torch.")
        meta = {"recipe": self.recipe.name if self.recipe else "none", "torch": torch.__version__}
        writer = CheckpointWriter(
            Path(given), fmt, found.family, spec, quant, dtypes, config, files, meta,
            force=bool(self.export_config.get("force", False)),
        )  # fmt: skip
        with writer:
            for name, tensor in tensors.items():
                writer.add(name, tensor)
            for name, layer in quantized.items():
                for leaf, part in _parts(layer).items():
                    writer.add(f"{name}.{leaf}", part)
            _verify(writer.finish(), tensors, quantized)
            writer.commit()
        return Path(given)

    def _check_decoder_type(self, found: Known) -> None:
        names = {name for name, family in families().items() if family is found.family}
        names |= {name.rstrip("0123456789") for name in names} | {"llama"}  # all families so far are laid out like it
        if (given := self.export_config.get("decoder_type")) is not None and given not in names:
            raise UnsupportedError(
                f"export_config: decoder_type is {given!r}; this model is {' or '.join(sorted(names))}"
            )


def _parts(layer: FakeQuant) -> dict[str, Tensor | QTensor]:
    """What a quantized linear is in a checkpoint, without its bias."""
    parts = {"weight": layer.quantized(), "input_scale": layer.input_scale, "prescale": layer.prescale}
    return {leaf: part.to("cpu") for leaf, part in parts.items() if part is not None}


def _verify(folder: Path, tensors: Mapping[str, Tensor | QTensor], quantized: Mapping[str, FakeQuant]) -> None:
    """Raise unless the folder, opened, holds what was meant, bit for bit."""
    opened = open_checkpoint(folder).tensors
    for name in opened:
        owner, _, leaf = name.rpartition(".")
        read = opened[name]
        if name in tensors:
            meant = tensors[name]
        else:  # Model Optimizer's layout has prescales of ones where there is nothing to say
            meant = _parts(quantized[owner]).get(leaf, torch.ones(()).expand(read.shape))
        if isinstance(read, QTensor):
            same = isinstance(meant, QTensor) and read.equal(meant)
        else:
            same = isinstance(meant, Tensor) and torch.equal(read, meant.cpu().to(read.dtype))
        if not same:
            raise CheckpointError(f"'{name}' as written is not what the module holds; nothing was kept")


def _beside(found: Known, model_dir: Path | None) -> tuple[dict[str, Any], dict[str, Path]]:
    """config.json, and the files to take along."""
    own = {key: value for key, value in found.config.items() if key != "_name_or_path"}
    if model_dir is None:
        return own, {}
    config = read_json(model_dir / "config.json")
    if found.family.read(HFConfig(config)) != found.spec:
        raise CheckpointError(f"{model_dir}/config.json describes another model than the one to export")
    return config, {name: model_dir / name for name in CARRIED if (model_dir / name).is_file()}


def _settings(given: Any, what: str, known: tuple[str, ...]) -> dict[str, Any]:
    """A config as a dict: a mapping or a dataclass, its keys checked."""
    if dataclasses.is_dataclass(given) and not isinstance(given, type):
        given = dataclasses.asdict(given)
    if not isinstance(given, Mapping | None):
        raise RecipeError(f"{what} is {given!r}, expected keys ({', '.join(known)})")
    for key in given or {}:
        if key not in known:
            raise RecipeError(f"{what}: unknown key {key!r}; {nearest_name(str(key), known)}")
    return dict(given or {})


def _recipe(config: Mapping[str, Any]) -> Recipe | None:
    """The recipe that a quantization_config means."""
    if config.get("enable_kv_cache") or config.get("kv_cache_qformat") not in (None, "none"):
        raise UnsupportedError(
            "quantization_config: K and V are not seen from outside of a module; leave enable_kv_cache out, or "
            "compress the model's folder: fewbit compress DIR --kv fp8"
        )
    if config.get("algorithm") is None:
        return None
    recipe = read_recipe(str(config["algorithm"]))
    techniques = list(recipe.techniques)
    if (alpha := config.get("sq_alpha")) is not None:
        techniques = [replace(t, alpha=alpha) if isinstance(t, smoothquant.Settings) else t for t in techniques]
    rules = list(recipe.rules)
    if (size := config.get("awq_block_size")) is not None and any(isinstance(t, awq.Settings) for t in techniques):
        rules = [replace(r, quant=replace(r.quant, weight=_grouped(r.quant.weight, size))) for r in rules]
    return replace(recipe, techniques=tuple(techniques), rules=tuple(rules))


def _grouped(fmt: Format | None, size: Any) -> Format | None:
    """An INT4 format with groups of another width; others have one width only."""
    if fmt is None or not fmt.element.integer:
        return fmt
    same = [f for f in FORMATS.values() if f.element == fmt.element and f.zero == fmt.zero and f.grouped]
    wanted = next((f for f in same if f.block[1] == size), None)
    if wanted is None:
        sizes = ", ".join(str(f.block[1]) for f in same)
        raise RecipeError(f"quantization_config: awq_block_size is {size!r}; known: {sizes}")
    return wanted


def _dtype(given: Any) -> torch.dtype | None:
    if given is None:
        return None
    name = str(given).removeprefix("torch.")
    if name not in _DTYPES:
        raise RecipeError(f"export_config: dtype is {given!r}; {nearest_name(name, _DTYPES)}")
    return _DTYPES[name]
