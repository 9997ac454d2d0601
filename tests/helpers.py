"""Tiny models made on the spot, for every folder of tests. Nothing here needs transformers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from fewbit.checkpoint.checkpoint import Checkpoint
from fewbit.checkpoint.names import Names
from fewbit.checkpoint.places import Places
from fewbit.model import Decoder, DenseAttend
from fewbit.spec.decoder import DecoderSpec
from fewbit.spec.families import Family, families
from fewbit.spec.hfconfig import HFConfig

VOCAB = 384
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CORPUS = [
    "Once upon a time there was a little fox who was afraid of the dark and lived with his mother under an old oak.",
    "The rain came down all day, and the children sat at the window and told each other stories about the sea.",
    "un, deux, trois, quatre, cinq; größer, naïve, 東京 🙂",
] * 3
WIDE = {"intermediate_size": 256, "hidden_size": 128}
"""Sizes that every numeric format fits."""


class Ended(NamedTuple):
    """How a command ended."""

    status: int
    out: str
    err: str


def make_model(
    path: Path,
    family: str = "llama",
    dtype: torch.dtype = torch.bfloat16,
    with_tokenizer: bool = True,
    chat: bool = True,
    seed: int = 0,
    gain: float = 1.5,
    **overrides: Any,
) -> Path:
    """Save a random model of a family as a Hugging Face directory: its TINY config, changed by `overrides`.

    The vocabulary is that of the tokenizer saved beside it (byte-level, with BOS, EOS and, if `chat`, a template).
    """
    path.mkdir(parents=True, exist_ok=True)
    kind = families()[family]
    config = {**kind.TINY, _vocab(kind): VOCAB, "bos_token_id": 1, "eos_token_id": 2, **overrides}
    config["dtype"] = str(dtype).removeprefix("torch.")
    (path / "config.json").write_text(json.dumps(config))
    spec = kind.read(HFConfig(config))
    names, random = Names(kind, spec), torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in spec.tensors().items():
        noise = torch.randn(shape, generator=random)
        if name in ("embed.weight", "positions.weight"):
            value = noise
        elif len(shape) == 2:
            value = noise * gain * shape[1] ** -0.5
        else:
            value = noise * 0.1 + (0 if name.endswith("bias") or centred(spec, name) else 1)
        tensors[name] = value.to(dtype)
    save_file(stored(Places(names, spec, {}), tensors), path / "model.safetensors", metadata={"format": "pt"})
    if with_tokenizer:
        write_tokenizer(path, config[_vocab(kind)], chat)
    return path


def _vocab(kind: Family) -> str:
    return "padded_vocab_size" if "padded_vocab_size" in kind.TINY else "vocab_size"


def centred(spec: DecoderSpec, name: str) -> bool:
    """Whether a weight is that of a norm that adds one to it."""
    return spec.final_norm.plus_one and ("norm" in name or ".pre_" in name or ".post_" in name)


def stored(places: Places, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors by canonical name as a family's files hold them."""
    found: dict[str, torch.Tensor] = {}
    for name in tensors:
        place = places.of_tensor(name)
        if name == place.names[0]:
            whole = place.join({n: tensors[n] for n in place.names}).contiguous()
            if place.experts:
                found.setdefault(place.source, torch.empty(place.shape, dtype=whole.dtype))[place.expert] = whole
            else:
                found[place.source] = whole
    return found


def write_tokenizer(path: Path, vocab: int = VOCAB, chat: bool = True) -> None:
    """A small byte-level tokenizer that opens every text with BOS."""
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "<s>", "</s>"]
    t.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=vocab, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    t.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    if chat:
        config["chat_template"] = TEMPLATE
    (path / "tokenizer_config.json").write_text(json.dumps(config))


def edit_json(path: Path, **changes: Any) -> None:
    """Change some keys of a JSON file; None removes one."""
    old = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in (old | changes).items() if v is not None}))


def dense_logits(decoder: Decoder, windows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Logits of windows of one length, [T, vocab]."""
    length = len(windows[0])
    tokens = torch.tensor([t for window in windows for t in window])
    positions = torch.arange(length).repeat(len(windows))
    return decoder.logits(decoder.hidden(tokens, positions, DenseAttend(decoder.codecs, length)))


def same_tensors(a: Checkpoint, b: Checkpoint) -> None:
    """Both hold the same: quantized weights code for code and scale for scale, the rest bit for bit."""
    assert set(a.tensors) == set(b.tensors)
    for name in a.tensors:
        mine, theirs = a.tensors[name], b.tensors[name]
        assert type(mine) is type(theirs), name
        assert mine.equal(theirs) if not isinstance(mine, torch.Tensor) else torch.equal(mine, theirs), name


def ids(count: int, vocab: int = VOCAB, seed: int = 0, first: int = 3) -> list[int]:
    """Random token ids, none of them special."""
    return torch.randint(first, vocab, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
