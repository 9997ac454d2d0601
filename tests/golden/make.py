"""Makes what the real libraries write of tiny models. Runs in the peers' environment (`make peers`), imports no fewbit.

    .venv-peers/bin/python tests/golden/make.py OUT [--zip] [NAME ...]   one directory a golden, or one zip file
    .venv-peers/bin/python tests/golden/make.py --logits DIR ...         logits that transformers gives of directories

`tests/parity/test_golden.py` reads the zip files, and in `make test-all` has them made again and compares.

Beside each model lies ``logits.safetensors``: ids [windows, length], and the logits [windows, length, vocab] that the
library itself computes of them: Model Optimizer by its fake quantization before the export (its CUDA kernel for blocks
of small floats replaced by the same in plain torch, `_blocks`), compressed-tensors by transformers from the very files.
In float32, but where the library cannot.
"""

from __future__ import annotations

import copy
import json
import logging
import shutil
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

VERSIONS = ("nvidia-modelopt", "llmcompressor", "compressed-tensors", "transformers", "torch")
SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "llama-short": lambda: transformers.LlamaConfig(**SIZES | {"num_hidden_layers": 1}),
    "llama-wide": lambda: transformers.LlamaConfig(**SIZES | {"hidden_size": 256, "num_hidden_layers": 1}),
    "mixtral": lambda: transformers.MixtralConfig(
        **SIZES | {"num_hidden_layers": 1}, num_local_experts=2, num_experts_per_tok=1
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **SIZES | {"num_hidden_layers": 1},
        moe_intermediate_size=128,
        num_experts=2,
        num_experts_per_tok=1,
        norm_topk_prob=True,
    ),
}


def model_of(family: str) -> Any:
    """A model in bfloat16 whose weights are few different numbers, so that a file of them packs well."""
    random = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=torch.bfloat16).eval()

    def pick(shape: torch.Size | tuple[int, ...], *of: float) -> torch.Tensor:
        return torch.tensor(of)[torch.randint(len(of), tuple(shape), generator=random)]

    for name, parameter in sorted(model.named_parameters()):
        shape = parameter.shape
        if len(shape) == 1:
            value = pick(shape, 0.75, 1.0, 1.5)
        elif name.endswith(("embed_tokens.weight", "lm_head.weight", ".gate.weight")):
            value = pick(shape, -1.0, -0.5, 0.5, 1.0)
        else:
            rows, blocks = (*shape[:-1], 1), (*shape[:-1], shape[-1] // 16)
            value = pick(shape, -1.7, -0.45, 0.6, 1.0) * pick(rows, 1, 1.5)  # whose 4-bit codes are no near ties
            value *= pick(blocks, 0.55, 1.0).repeat_interleave(16, -1) * shape[-1] ** -0.5
        parameter.data.copy_(value)
    model.config.architectures = [type(model).__name__]
    return model


def windows(count: int, length: int = 16, seed: int = 1) -> torch.Tensor:
    """Token ids, none of them special."""
    return torch.randint(3, SIZES["vocab_size"], (count, length), generator=torch.Generator().manual_seed(seed))


HELD_OUT = windows(2, 12, seed=2)


# --- Model Optimizer --------------------------------------------------------------------------------------------------

Settings = dict[str, Any]
OFF: Settings = {"quantizer_name": "*", "enable": False}
Make = Callable[[Path], None]


def _config(name: str) -> Settings:
    import modelopt.torch.quantization as mtq

    return copy.deepcopy(getattr(mtq, name))


def modelopt(
    name: str, family: str = "llama", kv: str = "", logits: bool = True, also: tuple[Settings, ...] = ()
) -> Make:
    """`mtq.quantize` by one of its configs and `export_hf_checkpoint`; `kv`: one of K and V; `also`: more rules."""

    def make(target: Path) -> None:
        import modelopt.torch.quantization as mtq
        from modelopt.torch.export import export_hf_checkpoint
        from modelopt.torch.quantization import tensor_quant

        tensor_quant.dynamic_block_quantize_op = _blocks
        model, config = model_of(family), _config(name) if name else {"quant_cfg": [OFF, *_config(kv)["quant_cfg"]]}
        if name and kv:
            config["quant_cfg"] = [*config["quant_cfg"], *_config(kv)["quant_cfg"]]
        config["quant_cfg"] = [*config["quant_cfg"], *also]
        config.setdefault("algorithm", "max")
        model = mtq.quantize(model, config, lambda m: m(windows(4)))
        found = _logits(copy.deepcopy(model).float()) if logits else None
        with torch.inference_mode():
            export_hf_checkpoint(model, export_dir=str(target))
        _save_logits(target, found)

    return make


def _blocks(
    x: torch.Tensor,
    block: int,
    amax: torch.Tensor | None,
    bits: int,
    exponent: int,
    scale_bits: int,
    scale_exponent: int,
) -> torch.Tensor:
    """What Model Optimizer's CUDA kernels make of blocks of E2M1 or E4M3, in plain torch: on a CPU it has none."""
    blocks = x.float().unflatten(-1, (-1, block))
    top, largest = (6.0 if bits == 4 else 448.0), blocks.abs().amax(-1, keepdim=True)
    if scale_exponent == 8:  # a power of two at which nothing saturates
        scale = torch.exp2((largest / top).log2().ceil()).nan_to_num(1.0, 1.0, 1.0)
    else:
        assert amax is not None
        outer = amax.float().amax() / (top * 448)
        scale = (largest / (top * outer)).clamp(2.0**-9, 448).to(torch.float8_e4m3fn).float() * outer
    ratio = (blocks / scale).clamp(-top, top)
    if bits == 4:
        step = torch.where(ratio.abs() < 2, 0.5, torch.where(ratio.abs() < 4, 1.0, 2.0))
        rounded = (ratio / step).round() * step
    else:
        rounded = ratio.to(torch.float8_e4m3fn).float()
    return (rounded * scale).flatten(-2).to(x.dtype)


def _rule(pattern: str, like: str, which: str = "weight_quantizer") -> Settings:
    """The rule that a config has for all weights or inputs, for linears of a pattern."""
    found = [r for r in _config(like)["quant_cfg"] if r["quantizer_name"] == f"*{which}"]
    return {**copy.deepcopy(found[-1]), "quantizer_name": f"{pattern}{which}"}


def _mixed() -> tuple[Settings, ...]:
    """FP8 MLPs in a model whose attention is NVFP4."""
    return tuple(_rule("*mlp*", "FP8_DEFAULT_CFG", which) for which in ("weight_quantizer", "input_quantizer"))


MODELOPT: dict[str, Callable[[], Make]] = {
    "modelopt-fp8": lambda: modelopt("FP8_DEFAULT_CFG"),
    "modelopt-fp8-kv": lambda: modelopt("FP8_DEFAULT_CFG", kv="FP8_KV_CFG"),
    "modelopt-fp8-nvfp4-kv": lambda: modelopt("FP8_DEFAULT_CFG", kv="NVFP4_KV_CFG", logits=False),
    "modelopt-kv": lambda: modelopt("", kv="FP8_KV_CFG"),
    "modelopt-fp8-row": lambda: modelopt("FP8_PER_CHANNEL_PER_TOKEN_CFG"),
    "modelopt-fp8-block": lambda: modelopt("FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG", "llama-wide"),
    "modelopt-int8-sq": lambda: modelopt("INT8_SMOOTHQUANT_CFG", "llama-short"),
    "modelopt-int8": lambda: modelopt("INT8_DEFAULT_CFG"),
    "modelopt-int8-wo": lambda: modelopt("INT8_WEIGHT_ONLY_CFG"),
    "modelopt-int4": lambda: modelopt("INT4_BLOCKWISE_WEIGHT_ONLY_CFG"),
    "modelopt-int4-awq": lambda: modelopt("INT4_AWQ_CFG", logits=False),  # the export averages scales once more
    "modelopt-w4a8-awq": lambda: modelopt("W4A8_AWQ_BETA_CFG", logits=False),
    "modelopt-nvfp4": lambda: modelopt("NVFP4_DEFAULT_CFG"),
    "modelopt-nvfp4-awq": lambda: modelopt("NVFP4_AWQ_LITE_CFG", logits=False),  # as for INT4
    "modelopt-nvfp4-wo": lambda: modelopt("W4A16_NVFP4_CFG"),
    "modelopt-w4a8-nvfp4-fp8": lambda: modelopt("W4A8_NVFP4_FP8_CFG", logits=False),  # it exports other block scales
    "modelopt-mxfp4": lambda: modelopt("MXFP4_DEFAULT_CFG"),
    "modelopt-mxfp8": lambda: modelopt("MXFP8_DEFAULT_CFG"),
    "modelopt-mixed": lambda: modelopt("NVFP4_DEFAULT_CFG", also=_mixed()),
    "modelopt-mixtral-fp8": lambda: modelopt("FP8_DEFAULT_CFG", "mixtral"),
    "modelopt-qwen3-moe-nvfp4": lambda: modelopt("NVFP4_DEFAULT_CFG", "qwen3_moe"),
    "modelopt-qwen3-moe-fp8": lambda: modelopt("FP8_DEFAULT_CFG", "qwen3_moe"),
}


# --- llm-compressor ---------------------------------------------------------------------------------------------------


def llmcompressor(
    recipe: Callable[[], Any], family: str = "llama", run: torch.dtype = torch.float32, **saving: Any
) -> Make:
    """`oneshot` and `save_pretrained`; `run`: what the library can run it in."""

    def make(target: Path) -> None:
        from datasets import Dataset
        from llmcompressor import oneshot

        ids = windows(4).tolist()
        source = target.with_name("source")  # it looks at the files that a model came from
        model_of(family).save_pretrained(source)
        model = oneshot(
            model=transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16),
            dataset=Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(window) for window in ids]}),
            recipe=recipe(),
            processor=_tokenizer(),  # it insists on one; nothing is tokenized
            num_calibration_samples=len(ids),
            max_seq_length=max(map(len, ids)),
            shuffle_calibration_samples=False,
        )
        model.save_pretrained(str(target), save_compressed=True, **saving)
        _save_logits(target, _logits(transformers.AutoModelForCausalLM.from_pretrained(target, dtype=run)))

    return make


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models

    words = {f"w{i}": i for i in range(SIZES["vocab_size"])}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")))


def _scheme(name: str, **more: Any) -> Callable[[], Any]:
    def recipe() -> Any:
        from llmcompressor.modifiers.quantization import QuantizationModifier

        ignore = ["lm_head", "re:.*mlp.gate$", "re:.*block_sparse_moe.gate$"]
        return [QuantizationModifier(targets="Linear", scheme=name, ignore=ignore, **more)]

    return recipe


def _groups(
    *groups: tuple[list[str], Settings, Settings | None], ignore: tuple[str, ...] = ("lm_head",), kv: Any = None
) -> Callable[[], Any]:
    def recipe() -> Any:
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
        from llmcompressor.modifiers.quantization import QuantizationModifier

        schemes = {
            f"group_{i}": QuantizationScheme(
                targets=targets,
                weights=QuantizationArgs(**weights),
                input_activations=None if inputs is None else QuantizationArgs(**inputs),
            )
            for i, (targets, weights, inputs) in enumerate(groups)
        }
        return [QuantizationModifier(config_groups=schemes, ignore=list(ignore), kv_cache_scheme=kv)]

    return recipe


def _gptq(actorder: str, group: int) -> Callable[[], Any]:
    def recipe() -> Any:
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
        from llmcompressor.modifiers.gptq import GPTQModifier

        args = QuantizationArgs(num_bits=4, strategy="group", group_size=group, actorder=actorder)
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        return [GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])]

    return recipe


KV8 = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel"}
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
TOKEN = {"strategy": "token", "dynamic": True}


def _int(bits: int, strategy: str = "group", group: int | None = 64, symmetric: bool = True) -> Settings:
    return {"num_bits": bits, "type": "int", "strategy": strategy, "symmetric": symmetric} | (
        {"group_size": group} if strategy == "group" else {}
    )


MIXED = (
    (["re:.*self_attn.(q|k|v)_proj$"], FP8, {**FP8, **TOKEN}),
    (["model.layers.0.mlp.down_proj", "re:.*1.mlp.down_proj"], _int(4), None),
    (["Linear"], INT8, {**INT8, **TOKEN}),
)
LLMCOMPRESSOR: dict[str, Callable[[], Make]] = {
    "ct-fp8": lambda: llmcompressor(_scheme("FP8")),
    "ct-fp8-kv": lambda: llmcompressor(_scheme("FP8", kv_cache_scheme=KV8)),
    "ct-fp8-dynamic": lambda: llmcompressor(_scheme("FP8_DYNAMIC")),
    "ct-fp8-block": lambda: llmcompressor(_scheme("FP8_BLOCK"), "llama-wide"),
    "ct-int8": lambda: llmcompressor(_scheme("W8A8")),
    "ct-int8-static": lambda: llmcompressor(
        _groups((["Linear"], INT8, {"num_bits": 8, "type": "int", "strategy": "tensor"}))
    ),
    "ct-w4a16": lambda: llmcompressor(_scheme("W4A16")),
    "ct-w4a16-asym": lambda: llmcompressor(_scheme("W4A16_ASYM")),
    "ct-w8a16": lambda: llmcompressor(_scheme("W8A16")),
    "ct-w3a16-g64": lambda: llmcompressor(_groups((["Linear"], _int(3), None))),
    "ct-w5a16-channel-asym": lambda: llmcompressor(_groups((["Linear"], _int(5, "channel", symmetric=False), None))),
    "ct-w4a16-tensor-asym": lambda: llmcompressor(_groups((["Linear"], _int(4, "tensor", symmetric=False), None))),
    "ct-w4a16-gptq-static": lambda: llmcompressor(_gptq("static", 32)),
    "ct-w4afp8": lambda: llmcompressor(_scheme("W4AFP8")),
    "ct-w4afp8-packed": lambda: llmcompressor(_scheme("W4AFP8"), quantization_format="pack-quantized"),
    "ct-nvfp4": lambda: llmcompressor(_scheme("NVFP4"), run=torch.bfloat16),
    "ct-nvfp4a16": lambda: llmcompressor(_scheme("NVFP4A16"), run=torch.bfloat16),
    "ct-mxfp4": lambda: llmcompressor(_scheme("MXFP4"), run=torch.bfloat16),
    "ct-mxfp4a16": lambda: llmcompressor(_scheme("MXFP4A16"), run=torch.bfloat16),
    "ct-mxfp8": lambda: llmcompressor(_scheme("MXFP8"), run=torch.bfloat16),
    "ct-mixed": lambda: llmcompressor(_groups(*MIXED, ignore=("lm_head", "re:.*0.self_attn.o_proj"))),
    "ct-qwen3-moe-w4a16": lambda: llmcompressor(_scheme("W4A16"), "qwen3_moe"),
}
GOLDENS = MODELOPT | LLMCOMPRESSOR


# --- files ------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def _logits(model: Any) -> torch.Tensor:
    return model(HELD_OUT).logits.float().contiguous()


def _save_logits(target: Path, logits: torch.Tensor | None) -> None:
    if logits is not None:
        save_file({"ids": HELD_OUT, "logits": logits}, target / "logits.safetensors")


def pack(folder: Path, target: Path) -> None:
    """A directory as a zip file, as small as can be, with the versions of what made it."""
    versions = {name: version(name) for name in VERSIONS}
    with zipfile.ZipFile(target, "w", zipfile.ZIP_LZMA) as file:
        file.writestr(zipfile.ZipInfo("versions.json"), json.dumps(versions, indent=1), zipfile.ZIP_LZMA)
        for path in sorted(folder.iterdir()):
            file.writestr(zipfile.ZipInfo(path.name), path.read_bytes(), zipfile.ZIP_LZMA)  # without the time of day


def add_logits(*folders: str) -> None:
    """Leave beside each model what transformers makes of it."""
    for folder in folders:
        config = json.loads((Path(folder) / "config.json").read_text("utf8"))
        weights = [group["weights"] for group in config["quantization_config"]["config_groups"].values()]
        # 4-bit floats and MX formats are multiplied in bfloat16 whatever is asked for, and Mixtral's router too
        narrow = any(args["type"] == "float" and args.get("group_size") in (16, 32) for args in weights)
        dtype = torch.bfloat16 if narrow or config["model_type"] == "mixtral" else torch.float32
        _save_logits(Path(folder), _logits(transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)))


def main(out: str, *names: str) -> None:
    """Make some goldens, or all; ``--zip`` among the names: as the repository keeps them."""
    for name in [name for name in names if name != "--zip"] or GOLDENS:
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made) / name
            GOLDENS[name]()(folder)
            (folder / "recipe.yaml").unlink(missing_ok=True)  # says nothing that config.json does not
            Path(out).mkdir(parents=True, exist_ok=True)
            if "--zip" in names:
                pack(folder, Path(out) / f"{name}.zip")
            else:
                shutil.copytree(folder, Path(out) / name, dirs_exist_ok=True)
            print(f"{name}: done", flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    if sys.argv[1] == "--logits":
        add_logits(*sys.argv[2:])
    else:
        main(*sys.argv[1:])
