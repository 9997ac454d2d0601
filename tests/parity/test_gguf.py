"""GGUF files as the gguf package writes and decodes them: the same numbers, the same logits, the same tokens."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFValueType as Value
from safetensors.torch import load_file, save_file

from fewbit import open_checkpoint
from fewbit.checkpoint import text_folder
from fewbit.checkpoint.gguf.blocks import BLOCKS, decoded, unpacked
from fewbit.checkpoint.names import Names
from fewbit.errors import FewbitError, UnsupportedError
from fewbit.measure import facts
from fewbit.model import load
from fewbit.numerics.qtensor import QTensor
from fewbit.text.tokenizer import Tokenizer
from gguf_files import SCALES, add, blocks_of, write_gguf
from helpers import CORPUS, dense_logits, edit_json, ids, make_model

SIZES = {
    "hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "rope_scaling": None, "rope_parameters": None,
    "use_sliding_window": False, "sliding_window": None, "max_window_layers": None,
}  # fmt: skip
OTHERS = ("Q5_0", "Q5_1", "Q4_1", "Q5_K", "Q2_K", "Q3_K", "IQ4_XS", "IQ4_NL")


def tiny(path: Path, family: str = "llama", **overrides) -> Path:
    return make_model(path, family, dtype=torch.float32, with_tokenizer=False, **SIZES | overrides)


# --- blocks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_are_what_the_package_decodes_them_to(kind):
    weight = np.random.default_rng(1).standard_normal((12, 768)).astype(np.float32)
    blocks = blocks_of(weight, kind, 2)
    theirs = torch.from_numpy(gguf.quants.dequantize(blocks, Kind[kind]))
    ours = unpacked(torch.from_numpy(blocks), kind)
    assert torch.equal(ours.dequantize(), theirs)  # bit for bit
    assert torch.equal(ours.slice(-2, 3, 7).dequantize(), theirs[3:7])
    assert torch.equal(ours.slice(-1, 256, 512).dequantize(), theirs[:, 256:512])


def test_every_byte_of_a_k_block_counts():
    """All of the range of scales, minima and codes, whatever the bytes are: random ones, all ones."""
    for kind in ("Q4_K", "Q6_K", "Q8_0", "Q4_0"):
        blocks = np.full((4, gguf.GGML_QUANT_SIZES[Kind[kind]][1]), 255, np.uint8)
        for start in SCALES.get(kind, (0,)):
            blocks[:, start : start + 2] = np.array([0.7], np.float16).view(np.uint8)
        theirs = torch.from_numpy(gguf.quants.dequantize(blocks, Kind[kind]))
        assert torch.equal(unpacked(torch.from_numpy(blocks), kind).dequantize(), theirs)


@pytest.mark.parametrize("kind", OTHERS)
def test_other_blocks_are_decoded_by_the_package(kind, monkeypatch):
    blocks = blocks_of(np.random.default_rng(1).standard_normal((4, 512)).astype(np.float32), kind, 2)
    theirs = torch.from_numpy(gguf.quants.dequantize(blocks, Kind[kind]))
    assert torch.equal(decoded(torch.from_numpy(blocks), kind), theirs)
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(UnsupportedError, match=rf"type {kind} need the 'gguf' extra .*pip install 'fewbit\[gguf\]'"):
        decoded(torch.from_numpy(blocks), kind)


# --- models -----------------------------------------------------------------------------------------------------------


def same_numbers(file: Path, dense: Path, decoded: dict[str, torch.Tensor], dtype: str) -> None:
    """Weights bit for bit those of the package, and the logits of a plain directory that holds them."""
    tensors = {n: t.clone() for n, t in decoded.items()}
    save_file(tensors, dense / "model.safetensors")
    edit_json(dense / "config.json", dtype=dtype)
    ours, plain = open_checkpoint(file), open_checkpoint(dense)
    assert (ours.spec, ours.dtype) == (plain.spec, plain.dtype)
    assert set(ours.tensors) == set(plain.tensors)
    for name, tensor in plain.tensors.items():
        mine = ours.tensors[name]
        assert torch.equal(mine.dequantize() if isinstance(mine, QTensor) else mine.float(), tensor), name
    window = [ids(24)]
    expected = dense_logits(load(plain, backend="reference"), window)
    assert torch.equal(dense_logits(load(ours, backend="reference"), window), expected)


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_llama_in_blocks(tmp_path, kind):
    dense, file = tiny(tmp_path / "dense"), tmp_path / "model.gguf"
    numbers = write_gguf(dense, file, kind=lambda name: kind if "_proj" in name else "F32")
    same_numbers(file, dense, numbers, "bfloat16")
    found = facts.inspect(open_checkpoint(file))
    assert (found.format, found.architecture, found.quantized_linears) == ("gguf", "LlamaForCausalLM", 14)
    assert found.groups[0][1] == f"{kind.lower()} weights"
    assert found.bits_per_weight == gguf.GGML_QUANT_SIZES[Kind[kind]][1] * 8 / gguf.GGML_QUANT_SIZES[Kind[kind]][0]
    assert found.remarks == ("the file holds no tokenizer",)


MIXED = {"v_proj": "Q6_K", "down_proj": "Q5_K", "embed": "Q6_K", "lm_head": "Q8_0"}


def test_a_mixture_of_blocks_says_what_it_decodes(tmp_path):
    """What llama.cpp calls Q4_K_M: blocks of several kinds, the embedding in blocks too."""
    dense, file = tiny(tmp_path / "dense", tie_word_embeddings=False), tmp_path / "model.gguf"
    numbers = write_gguf(dense, file, kind=lambda n: next((k for part, k in MIXED.items() if part in n), "Q4_K"))
    ours = open_checkpoint(file)
    names = Names(ours.family, ours.spec)
    assert {str(q.weight) for q in ours.quant.values()} == {"q4_k", "q6_k", "q8_0"}
    for name, tensor in ours.tensors.items():
        expected = numbers[names.tensor(name)]
        if isinstance(tensor, QTensor):
            assert torch.equal(tensor.dequantize(), expected)
        else:
            assert torch.equal(tensor, expected.to(tensor.dtype)), name
    assert facts.inspect(ours).remarks == (
        "decoded on reading to bfloat16: token_embd.weight (Q6_K)",
        "decoded on reading to bfloat16: blk.0.ffn_down.weight and 1 more (Q5_K)",
        "the file holds no tokenizer",
    )
    assert dense_logits(load(ours), [ids(9)]).isfinite().all()


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
@pytest.mark.parametrize(
    ("family", "arch", "overrides"),
    [
        ("llama", "llama", {"attention_bias": True}),
        ("qwen2", "qwen2", {"tie_word_embeddings": True}),
        ("qwen3", "qwen3", {}),
    ],
)
def test_families_in_floats(tmp_path, family, arch, overrides, kind):
    dense, file = tiny(tmp_path / "dense", family, **overrides), tmp_path / "model.gguf"
    numbers = write_gguf(dense, file, arch, lambda name: kind)
    same_numbers(file, dense, numbers, {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[kind])
    assert not open_checkpoint(file).quant


@pytest.mark.parametrize(("family", "arch"), [("mixtral", "llama"), ("qwen3_moe", "qwen3moe")])
def test_experts_lie_in_one_tensor(tmp_path, family, arch):
    dense = tiny(tmp_path / "dense", family, moe_intermediate_size=256, norm_topk_prob=True, mlp_only_layers=[])
    config = json.loads((dense / "config.json").read_text())
    count = config.get("num_local_experts") or config["num_experts"]
    keys = {
        f"{arch}__expert_count": (count, Value.UINT32),
        f"{arch}__expert_used_count": (config["num_experts_per_tok"], Value.UINT32),
    }
    if arch == "qwen3moe":
        keys[f"{arch}__expert_feed_forward_length"] = (256, Value.UINT32)
    kind = {True: "Q4_K", False: "F32"}
    file = tmp_path / "model.gguf"
    numbers = write_gguf(dense, file, arch, lambda name: kind["experts" in name or "_proj" in name], **keys)
    same_numbers(file, dense, numbers, "bfloat16")


@pytest.mark.parametrize(("family", "arch"), [("llama", "llama"), ("qwen2", "qwen2")])
def test_transformers_reads_the_same_from_the_file(tmp_path, family, arch):
    pytest.importorskip("accelerate", reason="transformers' loader of GGUF wants it")
    dense, file = tiny(tmp_path / "dense", family), tmp_path / "one" / "model.gguf"
    file.parent.mkdir()
    tokens = [f"t{i}" for i in range(384)]
    extra = {"tokenizer__ggml__tokens": (tokens, Value.ARRAY, Value.STRING)}
    extra |= {f"{arch}__vocab_size": (384, Value.UINT32)}
    write_gguf(dense, file, arch, lambda name: "Q8_0" if "_proj" in name else "F32", **extra)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    checkpoint = open_checkpoint(file)
    decoder = load(checkpoint)
    decoder.codecs = tuple(dataclasses.replace(codec, dtype=torch.float32) for codec in decoder.codecs)
    window = ids(24)
    with torch.no_grad():
        expected = theirs(torch.tensor([window])).logits[0]
    assert torch.allclose(dense_logits(decoder, [window]), expected, rtol=1e-3, atol=1e-3)


def llama3_factors(head_dim: int, theta: float, factor: float, original: int) -> list[float]:
    """What llama.cpp's converter writes: by what each frequency is divided."""
    found = []
    for pair in range(0, head_dim, 2):
        wave = 2 * math.pi * theta ** (pair / head_dim)
        smooth = (original / wave - 1) / (4 - 1)
        if wave < original / 4:
            found.append(1.0)
        elif wave > original:
            found.append(factor)
        else:
            found.append(1 / ((1 - smooth) / factor + smooth))
    return found


@pytest.mark.parametrize(("factor", "original"), [(8.0, 8192), (32.0, 8192), (8.0, 64)])
def test_the_scaling_of_llama_3_is_found_in_its_factors(tmp_path, factor, original):
    dense, file = tiny(tmp_path / "dense"), tmp_path / "model.gguf"
    config = json.loads((dense / "config.json").read_text())
    factors = np.array(llama3_factors(64, config["rope_theta"], factor, original), np.float32)
    with_factors(dense, file, factors)
    scaling = open_checkpoint(file).spec.layers[0].attention.position.scaling
    assert (scaling.factor, scaling.original_context) == (factor, original)
    assert (scaling.low_freq_factor, scaling.high_freq_factor) == (1, 4)
    factors[3] = 1.5
    with_factors(dense, file, factors)
    with pytest.raises(UnsupportedError, match=r"rope_freqs.weight holds factors that are not those of Llama 3"):
        open_checkpoint(file)


def with_factors(dense: Path, file: Path, factors: np.ndarray) -> None:
    plain = gguf.GGUFWriter.write_header_to_file

    def more(self, *args, **kwargs):
        add(self, "rope_freqs.weight", factors, "F32")
        return plain(self, *args, **kwargs)

    gguf.GGUFWriter.write_header_to_file = more
    try:
        write_gguf(dense, file)
    finally:
        gguf.GGUFWriter.write_header_to_file = plain


def test_other_scalings_and_windows(tmp_path):
    dense, file = tiny(tmp_path / "dense"), tmp_path / "model.gguf"
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    for config, keys in (
        (
            yarn,
            {
                "llama__rope__scaling__type": ("yarn", Value.STRING),
                "llama__rope__scaling__factor": (4.0, Value.FLOAT32),
                "llama__rope__scaling__original_context_length": (64, Value.UINT32),
            },
        ),
        (
            {"rope_type": "linear", "factor": 2.0},
            {
                "llama__rope__scaling__type": ("linear", Value.STRING),
                "llama__rope__scaling__factor": (2.0, Value.FLOAT32),
            },
        ),
    ):
        edit_json(dense / "config.json", rope_scaling=config)
        write_gguf(dense, file, **keys)
        assert open_checkpoint(file).spec == open_checkpoint(dense).spec
    write_gguf(dense, file, llama__attention__sliding_window=(9, Value.UINT32))
    opened = open_checkpoint(file)
    assert {layer.attention.window for layer in opened.spec.layers} == {9}
    assert opened.config["architectures"] == ["MistralForCausalLM"]


def test_a_folder_that_holds_one_file(tmp_path):
    dense, folder = tiny(tmp_path / "dense"), tmp_path / "folder"
    folder.mkdir()
    write_gguf(dense, folder / "a.gguf")
    assert open_checkpoint(folder).format == "gguf"
    assert open_checkpoint(folder).path == folder / "a.gguf"
    (folder / "b.gguf").write_bytes((folder / "a.gguf").read_bytes())
    with pytest.raises(UnsupportedError, match=rf"{folder} holds 2 GGUF files; give the one that is meant, such as"):
        open_checkpoint(folder)
    (dense / "a.gguf").write_bytes((folder / "a.gguf").read_bytes())
    assert open_checkpoint(dense).format == "hf"  # a model directory with a GGUF beside it is itself


def test_opening_reads_no_weight(tmp_path, monkeypatch):
    dense, file = tiny(tmp_path / "dense"), tmp_path / "model.gguf"
    write_gguf(dense, file, kind=lambda name: "Q4_K")
    monkeypatch.setattr("fewbit.checkpoint.gguf.source.read_tensor", lambda *_: pytest.fail("read a weight"))
    facts.inspect(open_checkpoint(file))


# --- tokenizers -------------------------------------------------------------------------------------------------------

TEXTS = [*CORPUS[:3], "  two  spaces\n\nand 12345 numbers, don't they'll", "x", "", " <s> in the middle", "日本 🙂\t"]


def with_tokenizer(tmp_path: Path, keys: dict) -> Path:
    dense, file = tiny(tmp_path / "dense"), tmp_path / "model.gguf"
    write_gguf(dense, file, **keys)
    return file


def byte_level(pattern: str | None) -> tokenizers.Tokenizer:
    t = tokenizers.Tokenizer(tokenizers.models.BPE())
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    split = [tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")] if pattern else []
    t.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([*split, level])
    t.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    t.train_from_iterator([*CORPUS, "12345 1999 7 don't they'll"], trainer)
    return t


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(("pre", "pattern"), [("llama-bpe", LLAMA3), ("gpt-2", None)])
@pytest.mark.parametrize("opens", [True, False])
def test_byte_level_bpe(tmp_path, pre, pattern, opens):
    theirs = byte_level(pattern)
    model = json.loads(theirs.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    merges = [" ".join(m) for m in model["merges"]]
    keys = {
        "tokenizer__ggml__model": ("gpt2", Value.STRING),
        "tokenizer__ggml__pre": (pre, Value.STRING),
        "tokenizer__ggml__tokens": (tokens, Value.ARRAY, Value.STRING),
        "tokenizer__ggml__token_type": ([3, 3] + [1] * (len(tokens) - 2), Value.ARRAY, Value.INT32),
        "tokenizer__ggml__merges": (merges, Value.ARRAY, Value.STRING),
        "tokenizer__ggml__bos_token_id": (0, Value.UINT32),
        "tokenizer__ggml__eos_token_id": (1, Value.UINT32),
        "tokenizer__ggml__add_bos_token": (opens, Value.BOOL),
        "tokenizer__chat_template": ("{{ bos_token }}{{ messages[0].content }}", Value.STRING),
    }
    file = with_tokenizer(tmp_path, keys)
    checkpoint = open_checkpoint(file)
    ours = Tokenizer.load(text_folder(file))
    for text in TEXTS:
        expected = theirs.encode(text).ids
        assert ours.encode(text) == [0] * opens + expected, text
        assert ours.decode(ours.encode(text)) == theirs.decode(expected)
    assert (ours.bos_id, ours.eos_id, ours.special_ids) == (0, 1, {0, 1})
    assert ours.chat_template.render([{"role": "user", "content": "hi"}]) == "<s>hi"
    assert checkpoint.config["eos_token_id"] == 1
    assert set(checkpoint.files) == {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert json.loads(checkpoint.files["generation_config.json"].read_text()) == {"eos_token_id": [1]}
    assert facts.inspect(checkpoint).remarks == ()


def metaspace() -> tuple[tokenizers.Tokenizer, list[str], list[float]]:
    """A SentencePiece-like BPE with byte fallback, its pieces, and as scores how early each was merged."""
    t = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    t.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=384, special_tokens=special, limit_alphabet=40, show_progress=False
    )
    t.train_from_iterator(CORPUS, trainer)
    model = json.loads(t.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    rank = {"".join(merge): -float(place) for place, merge in enumerate(model["merges"])}
    layout = json.loads(t.to_str())
    layout["added_tokens"] = [x for x in layout["added_tokens"] if not x["content"].startswith("<0x")]
    layout["decoder"] = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    }
    return tokenizers.Tokenizer.from_str(json.dumps(layout)), tokens, [rank.get(token, -1e9) for token in tokens]


def test_sentencepiece(tmp_path):
    theirs, tokens, scores = metaspace()
    keys = {
        "tokenizer__ggml__model": ("llama", Value.STRING),
        "tokenizer__ggml__tokens": (tokens, Value.ARRAY, Value.STRING),
        "tokenizer__ggml__scores": (scores, Value.ARRAY, Value.FLOAT32),
        "tokenizer__ggml__token_type": (
            [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259),
            Value.ARRAY,
            Value.INT32,
        ),
        "tokenizer__ggml__bos_token_id": (1, Value.UINT32),
        "tokenizer__ggml__eos_token_id": (2, Value.UINT32),
        "tokenizer__ggml__unknown_token_id": (0, Value.UINT32),
    }
    ours = Tokenizer.load(text_folder(with_tokenizer(tmp_path, keys)))
    for text in TEXTS:
        expected = theirs.encode(text).ids
        assert ours.encode(text) == [1, *expected], text
        assert ours.decode(ours.encode(text)) == theirs.decode(expected)
    assert (ours.bos_id, ours.eos_id) == (1, 2)


def test_a_damaged_tokenizer_leaves_the_model_without_one(tmp_path):
    keys = {
        "tokenizer__ggml__model": ("llama", Value.STRING),
        "tokenizer__ggml__tokens": (["a", "b"], Value.ARRAY, Value.STRING),
        "tokenizer__ggml__scores": ([0.0, 1.0, 2.0], Value.ARRAY, Value.FLOAT32),
    }
    assert facts.inspect(open_checkpoint(with_tokenizer(tmp_path, keys))).remarks == (
        "its tokenizer is damaged: 2 tokens, but not as many of scores",
    )
    keys["tokenizer__ggml__scores"] = ([0.0, 1.0], Value.ARRAY, Value.FLOAT32)
    keys["tokenizer__ggml__bos_token_id"] = (2, Value.UINT32)
    assert facts.inspect(open_checkpoint(with_tokenizer(tmp_path, keys))).remarks == (
        "its tokenizer is damaged: bos_token_id 2 of 2 tokens",
    )


@pytest.mark.parametrize(
    ("kind", "pre", "message"),
    [
        ("gpt2", "tekken", "byte-level BPE that cuts words as 'tekken' is not read; known: llama-bpe, llama3, qwen2"),
        ("t5", "default", "tokenizers of kind 't5' are not read; known: gpt2, llama"),
        ("llama", "default", "its tokenizer has no scores"),
    ],
)
def test_another_tokenizer_leaves_the_model_without_one_and_says_so(tmp_path, kind, pre, message):
    keys = {
        "tokenizer__ggml__model": (kind, Value.STRING),
        "tokenizer__ggml__pre": (pre, Value.STRING),
        "tokenizer__ggml__tokens": (["a", "b"], Value.ARRAY, Value.STRING),
    }
    checkpoint = open_checkpoint(with_tokenizer(tmp_path, keys))
    (remark,) = facts.inspect(checkpoint).remarks
    assert message in remark
    assert "tokenizer.json" not in checkpoint.files


# --- broken files -----------------------------------------------------------------------------------------------------


def refused(file: Path) -> str:
    with pytest.raises(FewbitError) as e:
        open_checkpoint(file)
    assert "\n" not in str(e.value)
    return str(e.value)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    folder = tmp_path_factory.mktemp("whole")
    write_gguf(tiny(folder / "dense", num_hidden_layers=1), folder / "model.gguf", kind=lambda name: "Q8_0")
    return (folder / "model.gguf").read_bytes()


def test_damaged_files_are_one_clear_line(tmp_path, whole):
    file = tmp_path / "model.gguf"
    for at, raw, message in (
        (0, b"PK\x03\x04", "is no GGUF file: it does not begin with 'GGUF'"),
        (4, struct.pack("<I", 1), "GGUF version 1 is not supported"),
        (4, struct.pack(">I", 3), "version 50331648 is not supported; known: 2, 3, little-endian"),
        (8, struct.pack("<Q", 1 << 60), "model.gguf"),
        (16, struct.pack("<Q", 1 << 60), "damaged"),
        (24, struct.pack("<Q", 1 << 62), "ends inside its header"),
    ):
        file.write_bytes(whole[:at] + raw + whole[at + len(raw) :])
        assert message in refused(file), (at, raw)
    for size in (0, 3, 10, 30, 200, 700, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        assert any(word in refused(file) for word in ("GGUF", "truncated", "damaged"))


def test_random_damage_of_the_header_never_crashes(tmp_path, whole):
    """It opens, or is refused in a line; nothing else escapes."""
    rng, file = np.random.default_rng(0), tmp_path / "model.gguf"
    for _ in range(150):
        raw = bytearray(whole)
        for at in rng.integers(0, 1500, 3):
            raw[at] = rng.integers(0, 256)
        file.write_bytes(raw)
        with contextlib.suppress(FewbitError):
            open_checkpoint(file)


def test_models_that_are_not_read_are_one_clear_line(tmp_path):
    dense, file = tiny(tmp_path / "dense"), tmp_path / "model.gguf"
    write_gguf(dense, file, "mamba")
    assert "GGUF architecture 'mamba' is not supported; known: llama, qwen2, qwen3, qwen3moe" in refused(file)
    write_gguf(dense, file, llama__logit_scale=(2.0, Value.FLOAT32))
    assert "metadata 'llama.logit_scale' is not supported" in refused(file)
    write_gguf(dense, file, split__count=(3, Value.UINT16))
    assert "is one of 3 files; join them with gguf-split --merge" in refused(file)
    write_gguf(dense, file, llama__rope__scaling__type=("longrope", Value.STRING))
    assert "rope scaling 'longrope' is not supported" in refused(file)
    tensors = load_file(dense / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, dense / "model.safetensors")
    write_gguf(dense, file)
    assert "tensor 'model.layers.0.mlp.up_proj.weight' [512, 256] is missing" in refused(file)


def test_a_tensor_that_no_model_has(tmp_path):
    dense, file = tiny(tmp_path / "dense"), tmp_path / "model.gguf"
    write_gguf(dense, file)
    config = json.loads((dense / "config.json").read_text())
    writer, plain = gguf.GGUFWriter(file, "llama"), gguf.GGUFReader(file)
    for field in plain.fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture")):
            writer.add_key_value(field.name, field.contents(), field.types[0])
    for tensor in plain.tensors:
        add(writer, tensor.name, np.array(tensor.data), "F32")
    add(writer, "blk.0.attn_sinks.weight", np.zeros(config["num_attention_heads"], np.float32), "F32")
    other = tmp_path / "other.gguf"
    writer.path = other
    close_to(writer, other)
    assert "tensor 'blk.0.attn_sinks.weight'" in refused(other)


def close_to(writer: gguf.GGUFWriter, file: Path) -> None:
    writer.write_header_to_file(file)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
