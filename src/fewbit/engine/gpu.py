"""The runner on an NVIDIA GPU: pages of K and V, prompts through library products, decode steps as CUDA graphs.

A step of single tokens is one graph, recorded the first time that a batch of its size occurs (the nearest size of
`SIZES` above). Everything else runs kernel by kernel. What a step chose stays on the device, where the next step finds
it: so a step can be launched before the one before it has been collected.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from fewbit.engine.batch import PENDING, Batch, Drawn, Piece
from fewbit.engine.config import EngineConfig
from fewbit.engine.sampler import NOT_FINITE, Choice, choose
from fewbit.engine.score import Scores, score
from fewbit.errors import RecipeError
from fewbit.model.fused import FusedDecoder
from fewbit.model.step import DecodeStep, Pages
from fewbit.ops.attention import attention
from fewbit.ops.attention.decode import decode_attention
from fewbit.ops.attention.store import store_pages
from fewbit.ops.device import to_device, to_host
from fewbit.spec.decoder import Attention

log = logging.getLogger(__name__)

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
"""Batch sizes that graphs are recorded for."""

_CODES = {"e4m3": torch.float8_e4m3fn, "int8": torch.int8}
_LONG = 1024  # tokens from which cuDNN's attention pays for the plan it makes for each new length


def make_pages(decoder: FusedDecoder, count: int, size: int) -> Pages:
    """Pages for every layer. Zeros: a kernel may load (and mask) what no token was written to."""
    k, v = [], []
    for layer, codec in zip(decoder.spec.layers, decoder.codecs, strict=True):
        a = layer.attention
        dtype = _CODES[codec.spec.k.element.name] if codec.spec else decoder.dtype
        shape = (count, a.kv_heads, size, a.head_dim)
        turned = (count, a.kv_heads, a.head_dim, size) if codec.spec else shape
        k.append(torch.zeros(shape, dtype=torch.uint8 if codec.spec else dtype, device=decoder.device).view(dtype))
        v.append(torch.zeros(turned, dtype=torch.uint8 if codec.spec else dtype, device=decoder.device).view(dtype))
    return Pages(k, v, size)


@dataclass
class Launched:
    """A step under way: what each request that was due a token was given, on its way to the host."""

    ids: list[str]
    outcome: Tensor | None = None  # `DecodeStep.outcome` on the host
    choice: Choice | None = None  # with the reports, where somebody wants more than the likeliest token
    scores: Scores | None = None  # of tokens of prompts, where somebody asked
    done: torch.cuda.Event | None = None


class GpuRunner:
    """Runs batches of a `FusedDecoder`; see `fewbit.engine.runner.Runner`."""

    overlaps = True

    def __init__(self, decoder: FusedDecoder, config: EngineConfig) -> None:
        if config.block_size < 16 or config.block_size & (config.block_size - 1):
            raise RecipeError(f"block_size {config.block_size}: on a GPU a power of two from 16 up, 64 is fastest")
        self.decoder, self.config, self.device = decoder, config, decoder.device
        self.pages = make_pages(decoder, config.num_blocks, config.block_size)
        self.sizes = [s for s in SIZES if s < min(config.max_batch, SIZES[-1])]
        self.sizes.append(min(max(config.max_batch, 1), SIZES[-1]))
        self.step = DecodeStep(decoder, self.pages, self.sizes[-1], config.max_model_len, config.max_batch)
        self.computed_tokens = 0
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._rows: dict[str, int] = {}  # where the last step left the token of a request
        self._staging = [
            torch.empty(self.step.inputs.numel(), dtype=torch.int32, pin_memory=True) for _ in range(4)
        ]  # fmt: skip
        self._turn = 0

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V that are really allocated."""
        return sum(t.numel() * t.element_size() for t in self.pages.k + self.pages.v)

    def recover(self) -> None:
        """Make sure the device can go on after a step that failed; a device that cannot raises here."""
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        self.step.reset()

    @torch.inference_mode()
    def launch(self, batch: Batch) -> Launched:
        """Start a step and return at once."""
        pieces = batch.pieces
        if batch.wiped:
            self._wipe(batch.wiped)
        drawing = [p for p in pieces if p.draw is not None]
        launched = Launched([p.id for p in drawing])
        self.computed_tokens += batch.tokens
        replay = len(drawing) == len(pieces) == batch.tokens and len(pieces) <= self.sizes[-1]
        if replay:
            self._replay(pieces)
            logits = self.step.logits[: len(pieces)]
        else:
            hidden, last = self._prompt(pieces)
            scores = score(pieces, hidden, self.decoder.logits, self.decoder.spec.vocab)
            launched.scores = None if scores is None else scores.to_host()
            if not drawing:
                self._rows = {}
                return self._marked(launched)
            logits = self.decoder.logits(hidden[self._tensor(last)])
        plain = all(p.draw.plain for p in drawing if p.draw)
        if not (replay and plain):
            choice = choose(logits, [p.draw for p in drawing if p.draw])
            self.step.chosen[: len(drawing)].copy_(choice.tokens)
            self.step.best[: len(drawing)].copy_(choice.best)
            launched.choice = None if plain else choice.to_host()
        self._rows = {p.id: row for row, p in enumerate(drawing)}
        launched.outcome = to_host(self.step.outcome)
        return self._marked(launched)

    def _marked(self, launched: Launched) -> Launched:
        """With an event after everything that was launched: a step without a draw is waited for as well."""
        launched.done = torch.cuda.Event()
        launched.done.record()
        return launched

    def _wipe(self, blocks: list[int]) -> None:
        index = self._tensor(blocks)
        for page in (*self.pages.k, *self.pages.v):
            page.view(torch.uint8 if page.element_size() == 1 else page.dtype)[index] = 0

    def collect(self, launched: Launched) -> dict[str, Drawn]:
        """Wait for a step: what came of it for each request that was due a token or asked about its prompt."""
        assert launched.done is not None
        launched.done.synchronize()
        drawn = self._drawn(launched)
        return drawn if launched.scores is None else launched.scores.read(drawn)

    def _drawn(self, launched: Launched) -> dict[str, Drawn]:
        if launched.outcome is None:
            return {}
        if launched.choice is not None:
            return dict(zip(launched.ids, launched.choice.read(), strict=True))
        tokens, best = launched.outcome[:, : len(launched.ids)]
        found = zip(launched.ids, tokens.tolist(), best.view(torch.float32).tolist(), strict=True)
        return {i: Drawn(t) if abs(b) < float("inf") else Drawn(fault=NOT_FINITE) for i, t, b in found}

    # ---- single tokens ----

    def _replay(self, pieces: Sequence[Piece]) -> None:
        """Put a step of single tokens into the graph of its size and start it."""
        m = self._size_of(len(pieces))
        width, step = self.step.table_width, self.step
        tokens, sources, lengths = [0] * m, [-1] * m, [0] * m
        table = torch.zeros(m, width, dtype=torch.int32)
        rows = table.numpy()
        for i, piece in enumerate(pieces):
            token = piece.tokens[0]
            if token == PENDING:
                sources[i] = self._rows[piece.id]
            else:
                tokens[i] = token
            lengths[i] = piece.end
            rows[i, : len(piece.blocks)] = piece.blocks
        count = m * (3 + width)
        staging = self._staging[self._turn % len(self._staging)]
        self._turn += 1
        staging[: 3 * m].copy_(torch.tensor(tokens + sources + lengths, dtype=torch.int32))
        staging[3 * m : count].copy_(table.view(-1))
        step.inputs[:count].copy_(staging[:count], non_blocking=True)
        self.graph(m).replay()

    def _record(self, m: int) -> None:
        """Record the graph of a size. The step is run once before: that compiles its kernels."""
        log.info("recording the decode step for %d sequences", m)
        held = self.step.inputs.clone(), self.step.chosen.clone()
        self.step.inputs[: 3 * m].zero_()  # empty rows: nothing is written to the cache
        self.step.run(m)
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            self.step.run(m)
        self._graphs[m] = graph
        self.step.inputs.copy_(held[0])
        self.step.chosen.copy_(held[1])

    def graph(self, rows: int) -> torch.cuda.CUDAGraph:
        """The graph that a batch of so many sequences takes; recorded if it was not yet."""
        m = self._size_of(rows)
        if m not in self._graphs:
            self._record(m)
        return self._graphs[m]

    def _size_of(self, rows: int) -> int:
        return next(size for size in self.sizes if size >= rows)

    # ---- prompts ----

    def _prompt(self, pieces: Sequence[Piece]) -> tuple[Tensor, list[int]]:
        """Any mix of chunks and single tokens; all states [T, hidden], and which of them are due a token."""
        tokens: list[int] = []
        sources: list[int] = []
        positions: list[int] = []
        last: list[int] = []
        for piece in pieces:
            tokens += [max(t, 0) for t in piece.tokens]
            sources += [self._rows[piece.id] if t == PENDING else -1 for t in piece.tokens]
            positions += range(piece.first, piece.end)
            if piece.draw is not None:
                last.append(len(tokens) - 1)
        ids = self._tensor(tokens)
        if any(source >= 0 for source in sources):
            source = self._tensor(sources)
            ids = torch.where(source >= 0, self.step.chosen[source.clamp(min=0)].long(), ids)
        attend = PageAttend(self.decoder, self.pages, pieces, self.step)
        return self.decoder.hidden(ids, self._tensor(positions), attend), last

    def _tensor(self, values: list[int]) -> Tensor:
        return to_device(values, torch.int64, self.device)


@dataclass(frozen=True)
class _Chunk:
    """Several tokens of one sequence, or equally long beginnings of several that follow each other."""

    rows: slice
    first: int
    end: int
    blocks: Tensor | None  # int64; None: nothing was stored before
    sequences: int = 1


class PageAttend:
    """The `Attend` of a step that is not only single tokens; see `fewbit.model.attend.Attend`."""

    def __init__(self, decoder: FusedDecoder, pages: Pages, pieces: Sequence[Piece], step: DecodeStep) -> None:
        self.decoder, self.pages, self.step = decoder, pages, step
        device, size = decoder.device, pages.size
        parts, singles, row = [], [], 0
        self.chunks: list[_Chunk] = []
        for piece in pieces:
            count = len(piece.tokens)
            for block in range(piece.first // size, -(-piece.end // size)):
                begin, stop = max(piece.first, block * size), min(piece.end, (block + 1) * size)
                parts.append((piece.blocks[block], row + begin - piece.first, begin % size, stop - begin))
            if count == 1 and len(piece.blocks) <= step.table_width:
                singles.append((row, piece))
            else:
                self._chunk(row, piece, device)
            row += count
        self.parts = to_device(parts, torch.int32, device)
        self.single_rows: Tensor | None = None
        if singles:
            self.single_rows = to_device([r for r, _ in singles], torch.int64, device)
            width = max(len(p.blocks) for _, p in singles)
            tables = [p.blocks + [0] * (width - len(p.blocks)) for _, p in singles]
            self.tables = to_device(tables, torch.int32, device)
            self.lengths = to_device([p.end for _, p in singles], torch.int32, device)

    def _chunk(self, row: int, piece: Piece, device: torch.device) -> None:
        count, before = len(piece.tokens), self.chunks[-1] if self.chunks else None
        if piece.first == 0 and before and before.blocks is None and before.end == count and before.rows.stop == row:
            self.chunks[-1] = _Chunk(slice(before.rows.start, row + count), 0, count, None, before.sequences + 1)
        else:
            blocks = to_device(piece.blocks, torch.int64, device) if piece.first else None
            self.chunks.append(_Chunk(slice(row, row + count), piece.first, piece.end, blocks))

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, a: Attention, sinks: Tensor | None = None
    ) -> Tensor:
        """See `fewbit.model.attend.Attend`; codes are written back into k and v decoded."""
        assert sinks is None  # no fused model has any
        codec, pages = self.decoder.codecs[layer], self.pages
        store_pages(k, v, pages.k[layer], pages.v[layer], codec, self.parts, pages.size)
        if self.single_rows is None and len(self.chunks) == 1:
            return self._chunk_attention(layer, q, k, v, a, self.chunks[0])
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if self.single_rows is not None:
            rows, at = q[self.single_rows], 0
            seen = torch.empty(rows.shape, dtype=q.dtype, device=q.device).flatten(-2)
            for some in rows.split(self.step.rows):
                m = len(some)
                decode_attention(
                    some.flatten(-2), seen[at : at + m], pages.k[layer], pages.v[layer], codec,
                    self.tables[at : at + m], self.lengths[at : at + m], a, pages.size, self.step.scratch,
                    cut=self.step.cut(m, a, codec),
                )  # fmt: skip
                at += m
            out[self.single_rows] = seen.view(rows.shape)
        for chunk in self.chunks:
            out[chunk.rows] = self._chunk_attention(layer, q, k, v, a, chunk)
        return out

    def _chunk_attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor, a: Attention, chunk: _Chunk) -> Tensor:
        queries, keys, values = (x[chunk.rows] for x in (q, k, v))
        if chunk.blocks is not None:
            return _continued(queries, *self._read(layer, chunk), a, chunk.first)
        shape = (chunk.sequences, chunk.end)
        queries, keys, values = (x.unflatten(0, shape) for x in (queries, keys, values))
        return _causal(queries, keys, values, a).flatten(0, 1)

    def _read(self, layer: int, chunk: _Chunk) -> tuple[Tensor, Tensor]:
        """K and V of a sequence from its pages, [tokens, kv, D]."""
        codec, pages = self.decoder.codecs[layer], self.pages
        k = pages.k[layer].view(torch.uint8 if codec.spec else self.decoder.dtype)[chunk.blocks]  # [n, kv, page, D]
        v = pages.v[layer].view(torch.uint8 if codec.spec else self.decoder.dtype)[chunk.blocks]
        k, v = (
            k.transpose(1, 2).flatten(0, 1),
            (v.permute(0, 3, 1, 2) if codec.spec else v.transpose(1, 2)).flatten(0, 1),
        )
        return codec.load(k[: chunk.end].contiguous(), v[: chunk.end].contiguous(), self.decoder.dtype)


def _causal(q: Tensor, k: Tensor, v: Tensor, a: Attention) -> Tensor:
    """Sequences from their beginning, [n, t, heads, D]."""
    if a.window and q.shape[1] > a.window:
        return attention(q, k, v, a)
    best = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    if q.shape[1] >= _LONG:
        best.insert(0, SDPBackend.CUDNN_ATTENTION)
    with sdpa_kernel(best, set_priority=True):
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, scale=a.scale,
            enable_gqa=a.heads != a.kv_heads,
        )  # fmt: skip
    return out.transpose(1, 2)


def _continued(q: Tensor, k: Tensor, v: Tensor, a: Attention, first: int) -> Tensor:
    """Tokens `first` .. of a sequence whose keys are all there, q [t, heads, D], k, v [s, kv, D]."""
    if a.window and first + len(q) > a.window:
        return attention(q, k, v, a, first)
    group = a.heads // a.kv_heads
    queries = q.transpose(0, 1)[None]
    keys, values = (x.transpose(0, 1).repeat_interleave(group, 0)[None] for x in (k, v))
    bias = causal_lower_right(q.shape[0], k.shape[0])
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias, scale=a.scale)[0].transpose(0, 1)
