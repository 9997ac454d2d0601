"""Train the bundled `storyteller` model from scratch and write it as a Hugging Face directory.

The script takes public-domain story books, trains a byte-level BPE tokenizer and a small
Llama-architecture language model on them, and writes everything another program needs to load
the result: `config.json`, `generation_config.json`, `model.safetensors` (BF16), the tokenizer
files with a chat template, a model card, and `heldout.txt.gz`, text of books that were kept out
of both training and validation.  With `--calibration FILE` it also writes a sample of the
training text for calibrating quantizers.

It stands alone: it needs `torch` (with `numpy`), `tokenizers` and `safetensors`, and nothing of
this package.

The data is a folder with `train-*.jsonl.gz` and `validation.jsonl.gz`, one book a row, with the
fields `id`, `title`, `author` and `text`; paragraphs are separated by one blank line.

How it trains:

* A training row is the document token followed by consecutive text from the start of a random
  paragraph, so that a prompt of a few words, after the document token, is a familiar sight.
* The document token also stands where one story of a collection ends and the next begins, as
  far as this can be seen from the text ("Once upon a time", a first word in capitals).
* A few rows open with a request such as "Tell me a story about a little fox." followed by a
  passage that is about one.  The request itself is not learned.
* The books are few for the compute at hand, so the rows are repeated for many epochs.  Dropout
  and weight decay hold off overfitting; the checkpoint with the lowest validation loss is kept.

For example, on one GPU in some minutes:

    python tools/train_storyteller.py --data DATA -o models/storyteller --minutes 8.1 \
        --calibration src/fewbit/compress/calibration.txt.gz

With `--minutes` the learning rate follows the clock, so that a run is not repeated exactly.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn

DOCUMENT = "<|endoftext|>"
PAD = "<|pad|>"
DOCUMENT_ID = 0
PAD_ID = 1
IGNORED = -100
MAX_WEIGHT_BYTES = 16_000_000

# Books kept out of training for the held-out file: one fantasy, one realistic adventure.  Neither
# belongs to a series, and neither shares a run of 13 words with any other training book.
HELDOUT_BOOKS = ("pg518", "pg11051")
HELDOUT_CHARS_PER_BOOK = 100_000

CALIBRATION_BYTES = 500_000

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if not loop.first %}{{ '\\n\\n' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] | trim }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] | trim }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\n' }}{% endif %}"
)

# Paragraphs with these period words for peoples, most of them insults, are left out of all text.
EXCLUDED = re.compile(
    r"\b(?:nigg\w+|negro(?:es|id)?|dark(?:e?y|ies|eys)|sheen(?:y|ies)|dago(?:e?s)?|greasers|"
    r"japs?|injuns?|squaws?|redskins?|chinam[ae]n|mulatto\w*|half-breeds?|jew(?:s|ess)?)\b"
    r"|BUILD-A-BOOK|With \d+ Illustrations",
    re.IGNORECASE,
)
OPENING = re.compile(
    r"(?:Once (?:upon|on) a time|There (?:was|were|lived) once|There once (?:was|were|lived)|"
    r"Once there (?:was|were|lived)|Long,? long ago|Many years ago there|A long time ago)\b"
)
# A first word (or two or three) in capitals, as old books print the opening of a chapter.
CAPITALS = re.compile(r"((?:[A-Z]{2,}|[A-Z])(?: [A-Z]{2,}| I\b| A\b){0,3})(?=,? [a-z])")
MIN_STORY_CHARS = 2_000

SUBJECTS = (
    "fox|wolf|bear|cat|kitten|dog|puppy|mouse|rabbit|hare|squirrel|bird|robin|sparrow|swan|"
    "duck|goose|hen|frog|toad|horse|pony|donkey|goat|lamb|pig|lion|tiger|elephant|monkey|"
    "fish|mermaid|dragon|giant|dwarf|fairy|witch|wizard|goblin|elf|king|queen|prince|"
    "princess|knight|soldier|sailor|captain|pirate|merchant|miller|tailor|shoemaker|"
    "woodcutter|fisherman|farmer|hunter|shepherd|cook|teacher|boy|girl|child|baby|lad|maiden|"
    "lady|widow|stranger|beggar|castle|palace|cottage|house|garden|forest|island|ship|boat|"
    "treasure|tree|rose|flower|star|doll|toy|ring|lamp|mirror|bell|clock"
)
SUBJECT = re.compile(rf"\ban? (?:[a-z]+ )?({SUBJECTS})\b")
REQUESTS = (
    "Tell me a story about {}.",
    "Tell me a story about {}.",
    "Please tell me a story about {}.",
    "Write a story about {}.",
    "Write a short story about {}.",
    "Can you tell me a story about {}?",
    "I would like to hear a story about {}.",
)
OPEN_REQUESTS = ("Tell me a story.", "Tell me a fairy tale.", "Please tell me a story.")


# ---------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Book:
    """One book of the data."""

    id: str
    title: str
    author: str
    text: str


def read_books(paths: Iterable[Path]) -> list[Book]:
    """Read the books of gzipped JSON-lines files, in order."""
    books = []
    for path in paths:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                books.append(Book(row["id"], row["title"], row["author"], row["text"]))
    return books


def split_paragraphs(book: Book) -> list[str]:
    """The paragraphs of a book that may be used, as printed."""
    paragraphs = (part.strip() for part in book.text.split("\n\n"))
    return [part for part in paragraphs if part and not EXCLUDED.search(part)]


def lower_opening(paragraph: str) -> tuple[str, bool]:
    """Undo capitals at the opening of a chapter; also say whether there were any."""
    match = CAPITALS.match(paragraph)
    if match is None or not re.search(r"[A-Z]{2}", match.group(1)):
        return paragraph, False
    first, *rest = match.group(1).split(" ")
    words = [first.capitalize(), *(word if word == "I" else word.lower() for word in rest)]
    return " ".join(words) + paragraph[match.end() :], True


def split_stories(book: Book) -> list[list[str]]:
    """Cut a book before paragraphs that visibly open a story or a chapter."""
    stories: list[list[str]] = [[]]
    length = 0
    for original in split_paragraphs(book):
        paragraph, capitals = lower_opening(original)
        if length >= MIN_STORY_CHARS and (capitals or OPENING.match(paragraph)):
            stories.append([])
            length = 0
        stories[-1].append(paragraph)
        length += len(paragraph)
    return [story for story in stories if story]


def cut_passage(paragraphs: Sequence[str], start: int, size: int) -> list[str]:
    """Whole paragraphs from index `start` on, as many as fit in `size` bytes (at least one)."""
    passage: list[str] = []
    total = 0
    for paragraph in paragraphs[start:]:
        total += len(paragraph.encode()) + 2
        if passage and total > size:
            break
        passage.append(paragraph)
    return passage


def heldout_text(books: Sequence[Book]) -> str:
    """Running text of the held-out books, from a tenth of the way into each."""
    parts: list[str] = []
    for book in books:
        paragraphs = split_paragraphs(book)
        parts += cut_passage(paragraphs, len(paragraphs) // 10, HELDOUT_CHARS_PER_BOOK)
    return "\n\n".join(parts) + "\n"


def calibration_text(books: Sequence[Book], rng: np.random.Generator) -> str:
    """One passage of about equal size from a random place of every book."""
    size = CALIBRATION_BYTES // len(books)
    parts: list[str] = []
    for book in books:
        paragraphs = split_paragraphs(book)
        tail = len(cut_passage(paragraphs[::-1], 0, size))
        start = int(rng.integers(max(1, len(paragraphs) - tail + 1)))
        parts += cut_passage(paragraphs, start, size)
    return "\n\n".join(parts) + "\n"


def write_gzip(path: Path, text: str) -> None:
    """Write text gzipped so that the bytes depend on the text only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=buffer, mtime=0) as file:
        file.write(text.encode())
    path.write_bytes(buffer.getvalue())


# ---------------------------------------------------------------------------------------------
# Tokens
# ---------------------------------------------------------------------------------------------


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer; it puts the document token before a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[DOCUMENT, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{DOCUMENT} $A",
                pair=f"{DOCUMENT} $A {DOCUMENT} $B",
                special_tokens=[(DOCUMENT, DOCUMENT_ID)],
            ),
        ]
    )
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"the text gives {tokenizer.get_vocab_size()} tokens, not {vocab_size}")
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of the texts, without special tokens."""
    batch = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [encoding.ids for encoding in batch]


@dataclass
class Corpus:
    """The training text as one run of tokens."""

    tokens: np.ndarray  # uint16
    paragraphs: np.ndarray  # where paragraphs start, ascending
    requests: list[tuple[list[int], int]] = field(default_factory=list)  # request, where to go on


def build_corpus(books: Sequence[Book], tokenizer: Tokenizer, rng: np.random.Generator) -> Corpus:
    """Encode the books: paragraphs joined by blank lines, the document token after each story."""
    stories = [story for book in books for story in split_stories(book)]
    texts = [paragraph for story in stories for paragraph in story]
    encoded = encode(tokenizer, texts)
    blank_line = encode(tokenizer, ["a\n\nb"])[0][1:-1]

    pieces: list[int] = []
    starts: list[int] = []
    asked: list[tuple[str, int]] = []
    index = 0
    for story in stories:
        for place in range(len(story)):
            starts.append(len(pieces))
            request = choose_request(story, place, rng)
            if request is not None:
                asked.append((request, len(pieces)))
            pieces += encoded[index]
            pieces += blank_line if place + 1 < len(story) else [DOCUMENT_ID]
            index += 1
    prompts = encode(tokenizer, [request + "\n\n" for request, _ in asked])
    return Corpus(
        tokens=np.array(pieces, dtype=np.uint16),
        paragraphs=np.array(starts, dtype=np.int64),
        requests=[(ids, start) for ids, (_, start) in zip(prompts, asked, strict=True)],
    )


def choose_request(story: Sequence[str], place: int, rng: np.random.Generator) -> str | None:
    """A request that the story, from this paragraph on, could be an answer to, if any."""
    paragraph = story[place]
    if paragraph[0] in "\"'" or len(paragraph) < 100:
        return None
    opens = place == 0 and OPENING.match(paragraph) is not None
    match = SUBJECT.search(paragraph[:240])
    if match is not None:
        following = " ".join(story[place : place + 8])[:2000].lower()
        mentions = len(re.findall(rf"\b{match.group(1)}", following))
        if mentions >= (2 if opens else 3):
            return REQUESTS[rng.integers(len(REQUESTS))].format(match.group(0))
    return OPEN_REQUESTS[rng.integers(len(OPEN_REQUESTS))] if opens else None


def training_rows(
    corpus: Corpus, context: int, request_share: float, rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """One epoch of (inputs, labels), in random order; rows start at paragraphs."""
    last = int(np.searchsorted(corpus.paragraphs, len(corpus.tokens) - context, side="right")) - 1
    targets = np.arange(rng.integers(context), len(corpus.tokens), context)
    places = np.minimum(np.searchsorted(corpus.paragraphs, targets), last)
    requests = [request for request in corpus.requests if request[1] <= corpus.paragraphs[last]]
    for start in rng.permutation(corpus.paragraphs[places]):
        head = [DOCUMENT_ID]
        if requests and rng.random() < request_share:
            prompt, start = requests[rng.integers(len(requests))]
            head = head + prompt
        row = np.empty(context + 1, dtype=np.int64)
        row[: len(head)] = head
        row[len(head) :] = corpus.tokens[start : start + context + 1 - len(head)]
        labels = row[1:].copy()
        labels[: len(head) - 1] = IGNORED
        yield row[:-1], labels


def training_batches(
    corpus: Corpus, context: int, batch: int, request_share: float, rng: np.random.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches without end; rows left over at the end of an epoch are dropped."""
    while True:
        rows: list[tuple[np.ndarray, np.ndarray]] = []
        for row in training_rows(corpus, context, request_share, rng):
            rows.append(row)
            if len(rows) == batch:
                inputs, labels = (np.stack(part) for part in zip(*rows, strict=True))
                yield torch.from_numpy(inputs), torch.from_numpy(labels)
                rows = []


# ---------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """What `config.json` says of the architecture, under the same names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0

    def check(self) -> None:
        """Refuse shapes that quantization in blocks of 128 could not cut evenly."""
        sizes = {
            "vocab": self.vocab_size,
            "hidden": self.hidden_size,
            "intermediate": self.intermediate_size,
            "heads * head_dim": self.num_attention_heads * self.head_dim,
            "kv heads * head_dim": self.num_key_value_heads * self.head_dim,
        }
        for name, size in sizes.items():
            if size % 128:
                raise ValueError(f"{name} is {size}, not a multiple of 128")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("heads is not a multiple of kv heads")


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last axis."""
        x = x.float()
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        normed: Tensor = self.weight * (x * scale)
        return normed


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        queries = shape.num_attention_heads * shape.head_dim
        keys = shape.num_key_value_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, shape.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Mix positions."""

        def heads(y: Tensor) -> Tensor:
            return y.view(*y.shape[:-1], -1, self.head_dim).transpose(1, 2)

        def rotate(y: Tensor) -> Tensor:
            first, second = y.chunk(2, dim=-1)
            return (y * cos + torch.cat((-second, first), dim=-1) * sin).to(y.dtype)

        q, k, v = (
            rotate(heads(self.q_proj(x))),
            rotate(heads(self.k_proj(x))),
            heads(self.v_proj(x)),
        )
        repeats = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        mixed: Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return mixed


class MLP(nn.Module):
    """SwiGLU feed-forward layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each position."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Block(nn.Module):
    """One pre-norm transformer layer, with dropout on what it adds to the residual stream."""

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = MLP(shape)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Add attention, then the feed-forward layer."""
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), cos, sin))
        y: Tensor = x + self.dropout(self.mlp(self.post_attention_layernorm(x)))
        return y


class Decoder(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Block(shape, dropout) for _ in range(shape.num_hidden_layers))
        self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.dropout = nn.Dropout(dropout)


class Llama(nn.Module):
    """A Llama language model with tied embeddings; parameters carry Hugging Face's names."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape, dropout: float = 0.0) -> None:
        super().__init__()
        self.shape = shape
        self.model = Decoder(shape, dropout)
        rates = shape.rope_theta ** (-torch.arange(0, shape.head_dim, 2) / shape.head_dim)
        angles = torch.outer(torch.arange(shape.max_position_embeddings), rates).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                depth = 2 * shape.num_hidden_layers if into_residual else 1
                nn.init.normal_(parameter, std=0.02 / math.sqrt(depth))

    def forward(self, ids: Tensor) -> Tensor:
        """Logits for the token after each of `ids`, rows of equal length from position 0."""
        length = ids.shape[1]
        cos, sin = self.cos[:length], self.sin[:length]
        x = self.model.dropout(self.model.embed_tokens(ids))
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)


def load_model(directory: Path) -> Llama:
    """Load a model that this script wrote."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    model = Llama(Shape(**{name: config[name] for name in Shape.__dataclass_fields__}))
    weights = load_file(directory / "model.safetensors")
    model.load_state_dict({name: weight.float() for name, weight in weights.items()})
    return model.eval()


# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """How well a model predicts a text."""

    loss: float  # nats a token
    tokens: int
    bytes: int

    @property
    def perplexity(self) -> float:
        """Perplexity a token."""
        return math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """Bits a byte of UTF-8, which does not depend on the tokenizer."""
        return self.loss * self.tokens / self.bytes / math.log(2)


@dataclass
class Scored:
    """A text cut into windows for scoring."""

    windows: list[list[int]]
    tokens: int
    bytes: int


def cut_windows(texts: Sequence[str], tokenizer: Tokenizer, context: int) -> Scored:
    """Windows of the document token and the next `context - 1` tokens, without overlap."""
    encoded = encode(tokenizer, texts)
    step = context - 1
    windows = [[DOCUMENT_ID, *ids[start : start + step]] for ids in encoded for start in range(0, len(ids), step)]
    return Scored(windows, sum(map(len, encoded)), sum(len(text.encode()) for text in texts))


@torch.no_grad()
def score(model: Llama, scored: Scored, device: torch.device, autocast: bool) -> Score:
    """Mean loss over every token of the text."""
    was_training = model.training
    model.eval()
    context = max(map(len, scored.windows))
    total = 0.0
    for first in range(0, len(scored.windows), 32):
        rows = scored.windows[first : first + 32]
        ids = torch.full((len(rows), context), PAD_ID)
        labels = torch.full((len(rows), context), IGNORED)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            labels[i, : len(row) - 1] = torch.tensor(row[1:])
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            logits = model(ids.to(device))
        losses = F.cross_entropy(logits.float().flatten(0, 1), labels.to(device).flatten(), reduction="sum")
        total += losses.item()
    model.train(was_training)
    return Score(total / scored.tokens, scored.tokens, scored.bytes)


def make_optimizers(model: Llama, kind: str, lr: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """AdamW for all, or Muon for the layers' matrices and AdamW for the rest.

    Weight decay is on matrices only.  Muon's step is scaled to the size of AdamW's, so that both
    take the same learning rate.
    """
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    embedding = [model.model.embed_tokens.weight]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    decayed = embedding if kind == "muon" else [*embedding, *matrices]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    fused = next(model.parameters()).is_cuda
    adamw = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=fused)
    if kind == "adamw":
        return [adamw]
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    return [adamw, muon]


def lr_factor(step: int, progress: float, warmup: int) -> float:
    """Linear warm-up over `warmup` steps, then a cosine from 1 to 0 as progress goes to 1."""
    return min(1.0, (step + 1) / warmup) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


@dataclass
class Record:
    """What happened in training."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_step: int = 0
    best_loss: float = math.inf
    curve: list[tuple[int, float]] = field(default_factory=list)


def train(
    model: Llama,
    corpus: Corpus,
    validation: Scored,
    options: argparse.Namespace,
    device: torch.device,
) -> Record:
    """Train, and leave the weights with the lowest validation loss in `model`."""
    rng = np.random.default_rng(options.seed)
    autocast = device.type == "cuda"
    steps_per_epoch = max(1, len(corpus.tokens) // (options.context * options.batch))
    steps = math.ceil(options.epochs * steps_per_epoch)
    if options.max_steps:
        steps = min(steps, options.max_steps)
    optimizers = make_optimizers(model, options.optimizer, options.lr, options.weight_decay)

    def loss_of(ids: Tensor, labels: Tensor) -> Tensor:
        logits = model(ids).float().flatten(0, 1)
        return F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED)

    run_loss: Callable[[Tensor, Tensor], Tensor] = loss_of
    if options.compile:
        run_loss = torch.compile(loss_of)

    record = Record()
    best: dict[str, Tensor] = {}
    batches = training_batches(corpus, options.context, options.batch, options.request_share, rng)
    micro = options.micro_batch or options.batch
    began = time.monotonic()
    limit = options.minutes * 60 if options.minutes else math.inf
    print(f"{steps} steps, {steps_per_epoch} to an epoch", flush=True)
    model.train()
    while True:
        step = record.steps
        progress = max(step / steps, (time.monotonic() - began) / limit)
        if step % options.eval_every == 0 or progress >= 1:
            current = score(model, validation, device, autocast).loss
            record.curve.append((step, current))
            record.seconds = time.monotonic() - began
            print(
                f"step {step} epoch {step / steps_per_epoch:.1f} validation {current:.4f} {record.seconds:.0f} s",
                flush=True,
            )
            if current < record.best_loss:
                record.best_loss, record.best_step = current, step
                best = {name: weight.clone() for name, weight in model.state_dict().items()}
        if progress >= 1:
            break
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = options.lr * lr_factor(step, progress, options.warmup)
        ids, labels = next(batches)
        if device.type == "cuda":
            ids, labels = ids.pin_memory(), labels.pin_memory()
        ids, labels = ids.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        total = torch.zeros((), device=device)
        parts = list(zip(torch.split(ids, micro), torch.split(labels, micro), strict=True))
        for part_ids, part_labels in parts:
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                loss = run_loss(part_ids, part_labels) / len(parts)
            torch.autograd.backward(loss)
            total += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        record.steps += 1
        record.tokens += ids.numel()
        if step % 100 == 0:
            print(f"step {step} training {total.item():.4f}", flush=True)
    model.load_state_dict(best)
    model.eval()
    return record


# ---------------------------------------------------------------------------------------------
# Output
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """A text that the model wrote, with the settings that give it again."""

    prompt: str
    request: bool  # whether the prompt was put through the chat template
    temperature: float  # 0: greedy
    top_p: float
    seed: int
    text: str


@torch.no_grad()
def generate(
    model: Llama,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    request: bool = False,
    temperature: float = 0.8,
    top_p: float = 0.9,
    seed: int = 0,
    max_tokens: int = 160,
) -> Sample:
    """Continue a prompt; random numbers come from the processor's generator of torch."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    text = prompt.strip() + "\n\n" if request else prompt
    ids = [DOCUMENT_ID, *encode(tokenizer, [text])[0]]
    written: list[int] = []
    while len(written) < max_tokens:
        window = torch.tensor([(ids + written)[-model.shape.max_position_embeddings :]])
        logits = model(window.to(device))[0, -1].float().cpu()
        if temperature == 0:
            choice = int(logits.argmax())
        else:
            probabilities, order = (logits / temperature).softmax(-1).sort(descending=True)
            probabilities[probabilities.cumsum(-1) - probabilities >= top_p] = 0
            choice = int(order[torch.multinomial(probabilities, 1, generator=generator)])
        if choice == DOCUMENT_ID:
            break
        written.append(choice)
    return Sample(prompt, request, temperature, top_p, seed, tokenizer.decode(written))


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write JSON the way Hugging Face does."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_model(output: Path, model: Llama, tokenizer: Tokenizer) -> int:
    """Write the weights and every configuration file; give the size of the weights' file."""
    shape = model.shape
    output.mkdir(parents=True, exist_ok=True)
    weights = {
        name: weight.detach().to("cpu", torch.bfloat16).contiguous() for name, weight in model.state_dict().items()
    }
    save_file(weights, output / "model.safetensors", metadata={"format": "pt"})
    write_json(
        output / "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": DOCUMENT_ID,
            "dtype": "bfloat16",
            "eos_token_id": DOCUMENT_ID,
            "head_dim": shape.head_dim,
            "hidden_act": "silu",
            "hidden_size": shape.hidden_size,
            "initializer_range": 0.02,
            "intermediate_size": shape.intermediate_size,
            "max_position_embeddings": shape.max_position_embeddings,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": shape.num_attention_heads,
            "num_hidden_layers": shape.num_hidden_layers,
            "num_key_value_heads": shape.num_key_value_heads,
            "pad_token_id": PAD_ID,
            "rms_norm_eps": shape.rms_norm_eps,
            "rope_scaling": None,
            "rope_theta": shape.rope_theta,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "vocab_size": shape.vocab_size,
        },
    )
    write_json(
        output / "generation_config.json",
        {
            "bos_token_id": DOCUMENT_ID,
            "do_sample": True,
            "eos_token_id": DOCUMENT_ID,
            "pad_token_id": PAD_ID,
            "temperature": 0.8,
            "top_p": 0.9,
        },
    )
    tokenizer.save(str(output / "tokenizer.json"))
    special = {"bos_token": DOCUMENT, "eos_token": DOCUMENT, "pad_token": PAD}
    write_json(output / "special_tokens_map.json", special)

    def added(content: str) -> dict[str, Any]:
        return {
            "content": content,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }

    write_json(
        output / "tokenizer_config.json",
        {
            "added_tokens_decoder": {
                str(DOCUMENT_ID): added(DOCUMENT),
                str(PAD_ID): added(PAD),
            },
            **special,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "model_max_length": shape.max_position_embeddings,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
    return (output / "model.safetensors").stat().st_size


def score_row(name: str, value: Score) -> str:
    """A row of the card's table of scores."""
    return f"| {name} | {value.tokens:,} | {value.loss:.4f} | {value.perplexity:.2f} | {value.bits_per_byte:.4f} |"


def sample_section(sample: Sample) -> str:
    """A sample as it stands in the card."""
    how = (
        "greedy"
        if sample.temperature == 0
        else f"temperature {sample.temperature}, top-p {sample.top_p}, seed {sample.seed}"
    )
    kind = "Chat message" if sample.request else "Prompt"
    quoted = "\n".join(f"> {line}".rstrip() for line in sample.text.strip().split("\n"))
    return f"{kind} `{sample.prompt}`, {how}, continues:\n\n{quoted}\n"


def count_parameters(model: Llama) -> int:
    """Parameters, the tied embedding counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def write_card(
    output: Path,
    model: Llama,
    weight_bytes: int,
    record: Record,
    scores: dict[str, Score],
    samples: Sequence[Sample],
    books: dict[str, Sequence[Book]],
    corpus: Corpus,
    options: argparse.Namespace,
    device_name: str,
) -> None:
    """Write the model card."""
    shape = model.shape
    numbers = ", ".join(book.id.removeprefix("pg") for book in books["training"])
    heldout = "; ".join(f"*{b.title}* by {b.author} (no. {b.id[2:]})" for b in books["heldout"])
    validation = "; ".join(f"*{b.title}* (no. {b.id[2:]})" for b in books["validation"])
    epochs = record.tokens / len(corpus.tokens)
    optimizer = "AdamW, betas 0.9 and 0.95"
    if options.optimizer == "muon":
        optimizer = f"Muon for the layers' matrices, {optimizer} for the rest"
    end = f"{options.epochs:g} epochs"
    if options.minutes:
        end += f" or after {options.minutes:g} minutes, whichever comes first"
    card = f"""---
language: en
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags:
- llama
- story-generation
---

# storyteller

A small language model that continues stories.  It was trained from scratch on children's books of
the years around 1850 to 1925, has {count_parameters(model):,} parameters in the Llama
architecture, and exists so that quantizing, serving and testing can be tried with a real model
that loads in a moment and writes readable English.  It is not a chat model and knows nothing of
the world.

The weights are under the Apache License 2.0.  They were written by
`tools/train_storyteller.py`, which also wrote this card; the figures below are those of that run.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("models/storyteller")
model = AutoModelForCausalLM.from_pretrained("models/storyteller")
inputs = tokenizer("Once upon a time", return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=200)
print(tokenizer.decode(output[0], skip_special_tokens=True))
```

`<|endoftext|>` (id 0) begins and ends a document; the tokenizer puts it before a text.  The chat
template writes the text of all messages, of whatever role, as paragraphs of one story, and the
model goes on from there.  Requests of the form "Tell me a story about a little fox." were in the
training rows; other instructions were not.

## Architecture

| | |
| --- | --- |
| class | `LlamaForCausalLM` |
| parameters | {count_parameters(model):,} (embedding tied to the output, counted once) |
| weights | BF16, {weight_bytes:,} bytes |
| vocabulary | {shape.vocab_size}, byte-level BPE |
| hidden size | {shape.hidden_size} |
| layers | {shape.num_hidden_layers} |
| attention | {shape.num_attention_heads} heads of {shape.head_dim}, \
{shape.num_key_value_heads} key/value heads (grouped-query) |
| feed-forward | SwiGLU, {shape.intermediate_size} |
| norm | RMSNorm, eps {shape.rms_norm_eps:g} |
| positions | RoPE, theta {shape.rope_theta:g} |
| context | {shape.max_position_embeddings} tokens, trained at {options.context} |

## Data

Books of Project Gutenberg that are in the public domain in the USA: fairy tales, children's books,
and adventure stories for boys and girls.  They were read from the public collection
`rcdm-uga/Gutenberg_Text` (commit `a0b16d35a985`) and cleaned: Project Gutenberg's name, headers
and licence, chapter headings, verse, notes and contents were removed, books were deduplicated and
split by book.  Paragraphs with a list of period words for peoples, most of them insults, were
left out as well.  Elsewhere than in the USA some of the books may still be under copyright; the
books themselves are not part of this model's files, except for the excerpt in `heldout.txt.gz`.

- Training: {len(books["training"])} books, {len(corpus.tokens):,} tokens.
- Validation, used to choose the checkpoint: {len(books["validation"])} books: {validation}.
- Held out, used for nothing but the figures below: {heldout}.
  `heldout.txt.gz` holds running text of these, from a tenth of the way into each book.

## Training

| | |
| --- | --- |
| steps | {record.steps:,} of {options.batch} rows of {options.context} tokens |
| tokens seen | {record.tokens:,} (about {epochs:.1f} epochs) |
| kept checkpoint | step {record.best_step:,} |
| optimizer | {optimizer}, weight decay {options.weight_decay:g}, gradient clipped at 1.0 |
| learning rate | {options.lr:g}, {options.warmup} steps of warm-up, then a cosine to 0 at {end} |
| dropout | {options.dropout:g} (embedding and residual) |
| precision | BF16 autocast, float32 weights, rounded to BF16 at the end |
| seed | {options.seed} |
| hardware | {device_name} |
| time | {record.seconds / 60:.1f} minutes |

In {options.request_share:.0%} of the rows a request ("Tell me a story about ...") precedes a
passage that opens with its subject; the request is not part of the loss.

## Scores

Of the BF16 weights, computed in float32.  Each text is cut into windows of the document token and
{options.context - 1} tokens without overlap, and every token is scored once; loss is in nats.

| text | tokens | loss a token | perplexity a token | bits a byte |
| --- | --- | --- | --- | --- |
{chr(10).join(score_row(name, value) for name, value in scores.items())}

The training row is a sample of the training books, as printed.

## Samples

The first attempts with these settings, unedited, up to 160 tokens each, from the sampler in
`tools/train_storyteller.py` with the BF16 weights computed in float32.

{chr(10).join(sample_section(sample) for sample in samples)}
## Limits

- It invents everything, loses the thread within a paragraph or two, and confuses who is who.
- It repeats itself.  Read greedily, it falls into loops within a few sentences; sample from it.
- The books are about a century old or older.  Their language and their views of women, class,
  empire, religion and peoples are those of their time, and the model can repeat them, also
  without being asked.  Leaving out paragraphs by a word list does not change that.
- English only.  Verse, lists, code, facts, arithmetic and dialogue with a user are beyond it.
- Beyond {options.context} tokens of context it was not trained.
- It has had no safety training; it is meant for demonstrations and tests.

## Training books

Numbers of the training books at Project Gutenberg: {numbers}.
"""
    (output / "README.md").write_text(card, encoding="utf-8")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description="Train the storyteller model and write it as a Hugging Face directory."
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder of train-*.jsonl.gz, validation.jsonl.gz")
    add("-o", "--output", type=Path, required=True, help="directory to write")
    add("--calibration", type=Path, help="also write calibration text to this .txt.gz file")
    add("--texts-only", action="store_true", help="write the text files and stop")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    shape = parser.add_argument_group("shape")
    shape.add_argument("--vocab", type=int, default=4096)
    shape.add_argument("--hidden", type=int, default=256)
    shape.add_argument("--intermediate", type=int, default=640)
    shape.add_argument("--layers", type=int, default=10)
    shape.add_argument("--heads", type=int, default=4)
    shape.add_argument("--kv-heads", type=int, default=2)
    shape.add_argument("--head-dim", type=int, default=64)
    shape.add_argument("--context", type=int, default=2048)
    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=float, default=45)
    training.add_argument("--max-steps", type=int, help="stop the schedule here at the latest")
    training.add_argument("--minutes", type=float, help="end the schedule after this time")
    training.add_argument("--batch", type=int, default=64, help="rows a step")
    training.add_argument("--micro-batch", type=int, help="rows at a time (default: all)")
    training.add_argument("--optimizer", choices=("adamw", "muon"), default="muon")
    training.add_argument("--lr", type=float, default=3e-3)
    training.add_argument("--warmup", type=int, default=200)
    training.add_argument("--weight-decay", type=float, default=0.2)
    training.add_argument("--dropout", type=float, default=0.15)
    training.add_argument("--request-share", type=float, default=0.08)
    training.add_argument("--eval-every", type=int, default=200)
    training.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run from data to model directory."""
    options = parse_arguments(argv)
    device = torch.device(options.device)
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("highest")
    rng = np.random.default_rng(options.seed)

    all_books = read_books(sorted(options.data.glob("train-*.jsonl.gz")))
    by_id = {book.id: book for book in all_books}
    books: dict[str, Sequence[Book]] = {
        "training": [book for book in all_books if book.id not in HELDOUT_BOOKS],
        "validation": read_books([options.data / "validation.jsonl.gz"]),
        "heldout": [by_id[name] for name in HELDOUT_BOOKS],
    }
    held = heldout_text(books["heldout"])
    write_gzip(options.output / "heldout.txt.gz", held)
    if options.calibration is not None:
        text = calibration_text(books["training"], np.random.default_rng(options.seed))
        write_gzip(options.calibration, text)
    if options.texts_only:
        return

    shape = Shape(
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        head_dim=options.head_dim,
        max_position_embeddings=options.context,
    )
    shape.check()
    texts = ("\n\n".join(story) for book in books["training"] for story in split_stories(book))
    tokenizer = train_tokenizer(texts, shape.vocab_size)
    corpus = build_corpus(books["training"], tokenizer, rng)
    documents = int((corpus.tokens == DOCUMENT_ID).sum())
    print(
        f"{len(corpus.tokens):,} tokens, {documents:,} documents, {len(corpus.requests):,} places for a request",
        flush=True,
    )
    scored = {
        "training": cut_windows([calibration_text(books["training"], rng)], tokenizer, options.context),
        "validation": cut_windows(
            ["\n\n".join(split_paragraphs(book)) for book in books["validation"]],
            tokenizer,
            options.context,
        ),
        "held out": cut_windows([held], tokenizer, options.context),
    }

    model = Llama(shape, options.dropout).to(device)
    print(f"{count_parameters(model):,} parameters", flush=True)
    record = train(model, corpus, scored["validation"], options, device)
    weight_bytes = write_model(options.output, model, tokenizer)
    if weight_bytes > MAX_WEIGHT_BYTES:
        print(f"note: {weight_bytes:,} bytes of weights are too many to bundle", flush=True)

    written = load_model(options.output).to(device)
    scores = {name: score(written, text, device, False) for name, text in scored.items()}
    samples = [
        generate(written, tokenizer, "Once upon a time"),
        generate(written, tokenizer, "The old king called his three daughters"),
        generate(written, tokenizer, "Tell me a story about a little fox.", request=True),
        generate(written, tokenizer, "Once upon a time there was a little girl", temperature=0),
    ]
    for name, value in scores.items():
        print(score_row(name, value), flush=True)
    for sample in samples:
        print(sample_section(sample), flush=True)
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else "processor"
    write_card(
        options.output,
        model,
        weight_bytes,
        record,
        scores,
        samples,
        books,
        corpus,
        options,
        device_name,
    )
    print(json.dumps({"record": asdict(record), "bytes": weight_bytes}), flush=True)


if __name__ == "__main__":
    main()
