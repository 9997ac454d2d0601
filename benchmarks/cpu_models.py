"""The models of the CPU benchmark: random weights of a shape, once, and every engine's files of the same weights."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors.torch import save_file

import fewbit
from fewbit.checkpoint import Checkpoint
from fewbit.checkpoint.gguf.source import NAMES
from fewbit.checkpoint.names import Names
from fewbit.compress import compress, plan
from fewbit.compress.recipe import AS_IT_WAS, parse_recipe
from fewbit.measure.dummy import dummy_checkpoint, shape_named
from fewbit.model.rope import frequencies
from fewbit.spec.decoder import Rope

STORYTELLER = "storyteller"
DENSE = "bf16+bf16"


def config_of(shape: str) -> dict[str, Any]:
    """The config.json of the bundled model or of a built-in shape.

    Raises:
        UnsupportedError: no such shape.
    """
    if shape == STORYTELLER:
        found: dict[str, Any] = json.loads((fewbit.demo_model() / "config.json").read_text("utf8"))
        return found
    return shape_named(shape) | {"dtype": "bfloat16"}


def model_of(shape: str, name: str, work: Path, tell: Callable[[str], None]) -> Path:
    """The files of a model below `work`, made if they are not there.

    Args:
        shape: see `config_of`.
        name: ``Q4_0`` or ``Q8_0``: a GGUF file; ``LAYERS+HEAD``: formats of fewbit, ``bf16`` where nothing is rounded.
        work: folder of all models.
        tell: told in words what is going on.
    """
    here = work / shape
    here.mkdir(parents=True, exist_ok=True)
    target = here / (f"{name}.gguf" if name in gguf.GGMLQuantizationType.__members__ else name)
    if target.exists():
        return target
    tell(f"{shape}: writing {name}")
    if name == DENSE:
        write_dense(config_of(shape), target)
        return target
    dense = fewbit.open_checkpoint(model_of(shape, DENSE, work, tell))
    if target.suffix == ".gguf":
        write_gguf(dense, name, target)
        return target
    layers, _, head = name.partition("+")
    rules = {"lm_head": head, "layers.*": layers}
    lines = [f'  - {{match: "{match}", weight: {fmt}}}' for match, fmt in rules.items() if fmt != "bf16"]
    compress(dense, plan(dense, parse_recipe(name, "\n".join(["rules:", *lines]))), target)
    return target


def write_dense(config: Mapping[str, Any], target: Path) -> None:
    """A Hugging Face directory in BF16."""
    made = dummy_checkpoint(config, AS_IT_WAS, torch.device("cpu"))
    names = Names(made.family, made.spec)
    unfinished = target.with_name(target.name + ".part")
    unfinished.mkdir(exist_ok=True)
    tensors = {names.tensor(name): made.tensors.dense(name) for name in made.spec.tensors()}
    save_file(tensors, unfinished / "model.safetensors", {"format": "pt"})
    (unfinished / "config.json").write_text(json.dumps(config, indent=2), "utf8")
    os.replace(unfinished, target)


def write_gguf(dense: Checkpoint, kind: str, target: Path) -> None:
    """A GGUF file of the architecture `llama` without a tokenizer: linears and embeddings in blocks of `kind`.

    A tied head is written once more, so that fewbit reads its blocks and not only the embeddings.
    """
    spec, config = dense.spec, dense.config
    attention = spec.layers[0].attention
    unfinished = target.with_name(target.name + ".part")
    writer = gguf.GGUFWriter(unfinished, "llama")
    writer.add_block_count(len(spec.layers))
    writer.add_context_length(spec.context)
    writer.add_embedding_length(spec.hidden)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_vocab_size(spec.vocab)
    writer.add_head_count(attention.heads)
    writer.add_head_count_kv(attention.kv_heads)
    writer.add_key_length(attention.head_dim)
    writer.add_value_length(attention.head_dim)
    writer.add_rope_dimension_count(attention.head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    writer.add_tokenizer_model("no_vocab")
    rope = attention.rope
    writer.add_rope_freq_base(rope.theta)
    if rope.scaling is not None:
        plain, scaled = (frequencies(r, attention.head_dim, torch.device("cpu"))[0] for r in (Rope(rope.theta), rope))
        writer.add_tensor("rope_freqs.weight", (plain / scaled).numpy())
    blocks = gguf.GGMLQuantizationType[kind]
    for name in spec.tensors():
        module, _, leaf = name.rpartition(".")
        layer = module.split(".")[1] if module.startswith("layers.") else ""
        theirs = NAMES[module.replace(f".{layer}.", ".{i}.") if layer else module].replace("{i}", layer)
        weight = dense.tensors.dense(name).float()
        if module.endswith(("attn.q", "attn.k")):  # this architecture turns neighbours, the original's order
            weight = weight.unflatten(0, (-1, 2, attention.head_dim // 2)).transpose(1, 2).flatten(0, 2)
        numbers = weight.contiguous().numpy()
        if weight.ndim == 1:
            writer.add_tensor(f"{theirs}.{leaf}", numbers)
            continue
        rounded = gguf.quants.quantize(numbers, blocks)
        writer.add_tensor(f"{theirs}.{leaf}", rounded, raw_dtype=blocks)
        if module == "embed" and spec.tied:
            writer.add_tensor(f"{NAMES['lm_head']}.{leaf}", rounded, raw_dtype=blocks)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(unfinished, target)
