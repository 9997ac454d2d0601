"""The trained weights of stories260K as an ordinary Hugging Face directory.

The file holds seven int32 (sizes), then float32 tensors, all layers of a kind together. Its rotary embedding turns
adjacent pairs of a head; Hugging Face's turns the two halves against each other, so rows of q and k change places.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

GREEDY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a "
    "big, red ball."
)
"""What the model says greedily from BOS, by the document that came with it."""


def convert(source: Path, target: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write `target` from the folder that holds ``stories260K.bin`` and ``tok512.bin``."""
    target.mkdir(parents=True, exist_ok=True)
    raw = (source / "stories260K.bin").read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, context = struct.unpack_from("<7i", raw)
    numbers = torch.frombuffer(bytearray(raw[28:]), dtype=torch.float32)
    head_dim, offset = dim // heads, 0

    def take(*shape: int) -> torch.Tensor:
        nonlocal offset
        count = int(torch.tensor(shape).prod())
        offset += count
        return numbers[offset - count : offset].view(shape)

    def halves(weight: torch.Tensor) -> torch.Tensor:
        """Rows of each head from (0, 1), (2, 3), ... to evens, then odds."""
        return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)

    kv = kv_heads * head_dim
    tensors = {"model.embed_tokens.weight": take(vocab, dim)}
    stacked = {
        "input_layernorm": take(layers, dim),
        "self_attn.q_proj": take(layers, dim, dim),
        "self_attn.k_proj": take(layers, kv, dim),
        "self_attn.v_proj": take(layers, kv, dim),
        "self_attn.o_proj": take(layers, dim, dim),
        "post_attention_layernorm": take(layers, dim),
        "mlp.gate_proj": take(layers, hidden, dim),
        "mlp.down_proj": take(layers, dim, hidden),
        "mlp.up_proj": take(layers, hidden, dim),
    }
    tensors["model.norm.weight"] = take(dim)
    for name, stack in stacked.items():
        for i in range(layers):
            weight = halves(stack[i]) if name.endswith(("q_proj", "k_proj")) else stack[i]
            tensors[f"model.layers.{i}.{name}.weight"] = weight
    save_file({n: t.to(dtype).contiguous() for n, t in tensors.items()}, target / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": dim,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": context,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    (target / "config.json").write_text(json.dumps(config))
    _tokenizer(source / "tok512.bin", vocab).save(str(target / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    (target / "tokenizer_config.json").write_text(json.dumps(settings))
    return target


def _tokenizer(path: Path, vocab: int) -> Tokenizer:
    """The sentencepiece model as a `tokenizers` one: merges in the order of their pieces' scores."""
    raw, offset = path.read_bytes(), 4
    pieces: list[str] = []
    scores: list[float] = []
    for _ in range(vocab):
        score, length = struct.unpack_from("<fi", raw, offset)
        pieces.append(raw[offset + 8 : offset + 8 + length].decode().replace(" ", "▁"))
        scores.append(score)
        offset += 8 + length
    pieces[:3] = ["<unk>", "<s>", "</s>"]
    ids = {piece: i for i, piece in enumerate(pieces)}
    merges = []
    for piece, i in sorted(ids.items(), key=lambda item: -scores[item[1]]):
        if i >= 259:
            splits = [(piece[:k], piece[k:]) for k in range(1, len(piece))]
            merges += sorted((s for s in splits if s[0] in ids and s[1] in ids), key=lambda s: (ids[s[0]], ids[s[1]]))
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer
