"""Tokenizers of each common make, trained on the spot and written as model directories."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "Once upon a time there was a little girl who wanted to count to nine in French.",
    "un, deux, trois, quatre, cinq, six, sept, huit, neuf! Voilà, c'est tout — merci beaucoup.",
    "def f(x):\n    return x ** 2  # a comment\n\n\nprint(f(3))\n",
    "naïve café, größer, 東京は夜, emoji 🙂🙃 and numbers 1234567890.",
] * 4
SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>", "<|end|>"]
TEXTS = [
    "",
    " ",
    "  two  spaces  ",
    "Hello, world!\n\nNew paragraph.\ttab",
    "un deux trois 🙂 東京 größer",
    "unseen: ∑ ż 👩‍👩‍👧 \u200b end",
    "<s>special</s> <|user|>hi<|end|> there",
    "a" * 300,
    "line\r\nline \n  indented",
]


def byte_level() -> Tokenizer:
    """Like GPT-2 and Llama 3: bytes in a printable alphabet."""
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    t.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", t.token_to_id("<s>"))])
    return t


def metaspace() -> Tokenizer:
    """Like Llama 2: spaces as a mark, one put in front, unknown characters as bytes."""
    seed = Tokenizer(models.BPE(unk_token="<unk>"))
    seed.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    # Pieces stay within words while learning, as SentencePiece's do.
    seed.pre_tokenizer = pre_tokenizers.Split(Regex("▁"), "merged_with_next")
    special = [*SPECIAL, *(f"<0x{b:02X}>" for b in range(256))]
    seed.train_from_iterator(
        CORPUS[:2], trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False)
    )
    model = json.loads(seed.to_str())["model"]
    merges = [tuple(m) for m in model["merges"]]
    t = Tokenizer(models.BPE(model["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    t.normalizer = seed.normalizer
    t.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    t.add_special_tokens([AddedToken(s, normalized=False) for s in SPECIAL])
    return t


def unigram() -> Tokenizer:
    """Like T5's: a unigram model and the Metaspace decoder."""
    t = Tokenizer(models.Unigram())
    t.normalizer = normalizers.NFKC()
    t.pre_tokenizer = pre_tokenizers.Metaspace()
    t.decoder = decoders.Metaspace()
    t.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=300, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    )
    return t


def wordpiece() -> Tokenizer:
    """Words and their continuations, joined by the decoder."""
    t = Tokenizer(models.WordPiece(unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    t.decoder = decoders.WordPiece(cleanup=False)
    t.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False)
    )
    return t


MAKES = {"byte_level": byte_level, "metaspace": metaspace, "unigram": unigram, "wordpiece": wordpiece}


def write(directory: Path, backend: Tokenizer, config: dict | None = None, **files: dict) -> Path:
    """A model directory: tokenizer.json, tokenizer_config.json with `config`, and `files` (their names without .json).

    `model_config` is the model's own config.json.
    """
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    base = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(base | (config or {})))
    for name, content in files.items():
        (directory / f"{name.removeprefix('model_')}.json").write_text(json.dumps(content))
    return directory
