"""GGUF files of tiny models, written with the gguf package: what our reader is held to."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file

SCALES = {
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "IQ4_XS": (0,),
    "IQ4_NL": (0,),
}
"""Of the blocks that the package only decodes: where their float16 scales stand."""
ROLES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"self_attn.{n}_proj": f"attn_{n}" for n in "qkv"},
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    **{f"mlp.{n}_proj": f"ffn_{n}" for n in ("gate", "up", "down")},
    "mlp.gate": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
}
EXPERTS = {"w1": "gate", "w2": "down", "w3": "up", "gate_proj": "gate", "down_proj": "down", "up_proj": "up"}


def blocks_of(weight: np.ndarray, kind: str, seed: int) -> np.ndarray:
    """A weight in blocks of a type; where the package cannot round to it, random blocks instead."""
    if kind not in SCALES:
        return gguf.quants.quantize(weight, Kind[kind])
    numbers, size = gguf.GGML_QUANT_SIZES[Kind[kind]]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (weight.size // numbers, size), dtype=np.uint8)
    for start in SCALES[kind]:
        scale = (rng.random((len(blocks), 1)) * 2e-4 + 1e-5).astype(np.float16)
        blocks[:, start : start + 2] = scale.view(np.uint8)
    return blocks.reshape(len(weight), -1)


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k from Hugging Face's rotary order to that of the original Llama."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(
    model: Path, file: Path, arch: str = "llama", kind: Callable[[str], str] = lambda name: "F32", **metadata
) -> dict[str, torch.Tensor]:
    """Write a Hugging Face directory as GGUF; `kind` gives the type of each tensor of two axes.

    Returns:
        What the package decodes each tensor to, float32, under its Hugging Face name.
    """
    config = json.loads((model / "config.json").read_text())
    writer = gguf.GGUFWriter(file, arch)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_file_type(0)
    for key, value in metadata.items():
        writer.add_key_value(key.replace("__", "."), *value)
    decoded, fused = {}, {}
    for seed, (name, tensor) in enumerate(sorted(load_file(model / "model.safetensors").items())):
        if config.get("tie_word_embeddings") and name == "lm_head.weight":
            continue
        weight = tensor.float().numpy()
        found = kind(name) if weight.ndim == 2 and "router" not in name else "F32"
        blocks = blocks_of(weight, found, seed)
        decoded[name] = torch.from_numpy(gguf.quants.dequantize(blocks, Kind[found]).reshape(weight.shape))
        if arch == "llama" and (".q_proj" in name or ".k_proj" in name):
            blocks = permute(blocks, heads if ".q_proj" in name else kv_heads)
        module, leaf = name.rsplit(".", 1)
        layer = module.removeprefix("model.layers.").split(".")[0] if "layers." in module else ""
        if ".experts." in module:
            expert, role = module.split(".experts.")[1].split(".")
            fused.setdefault((f"blk.{layer}.ffn_{EXPERTS[role]}_exps.weight", found), {})[int(expert)] = blocks
            continue
        role = module.removeprefix(f"model.layers.{layer}.") if layer else module
        add(writer, f"blk.{layer}.{ROLES[role]}.{leaf}" if layer else f"{ROLES[role]}.{leaf}", blocks, found)
    for (name, found), experts in fused.items():
        add(writer, name, np.stack([experts[e] for e in range(len(experts))]), found)
    close(writer)
    return decoded


def add(writer: gguf.GGUFWriter, name: str, blocks: np.ndarray, kind: str) -> None:
    """One tensor, as float numbers or as blocks."""
    writer.add_tensor(name, np.ascontiguousarray(blocks), raw_dtype=None if kind in ("F32", "F16") else Kind[kind])


def close(writer: gguf.GGUFWriter) -> None:
    """Write it all."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
