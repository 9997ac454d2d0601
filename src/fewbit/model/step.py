"""One decode step as a fixed row of kernels over fixed buffers: what a CUDA graph can record.

Five kernels a layer: q, k, v (with the norm before folded in); attention (with the rotation and the write of the new K
and V); o, added to the residual; gate and up, silu and product; down, added to the residual. A linear whose input is
rounded under a scale of the whole row takes one more before it, from the second token on; who makes the row leaves its
largest magnitude. So does one whose input is rounded in blocks, and a low-rank branch beside a linear takes one.

The residual is float32 here. Several programs add to it and to the product of q, k, v, in whatever order they finish:
two runs may differ in the last bits of a sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewbit.model.attend import KVCodec
from fewbit.model.fused import FusedDecoder, cosines
from fewbit.ops.attention.decode import cut_of, decode_attention, stored_as
from fewbit.ops.device import dependent_launches, gpu_name, shared_memory
from fewbit.ops.linear.branch import Branch
from fewbit.ops.linear.gpu import FEW, Codes, Folded, GpuLinear, Residual, Rounding
from fewbit.ops.linear.tiles import Tile
from fewbit.ops.rows.rows import block_of
from fewbit.spec.decoder import Attention

PIECES = 16
"""Programs that look for the largest logit of a row."""


@dataclass(frozen=True)
class Pages:
    """K and V of every layer in pages: K [P, kv, page, D], V the same or, for codes, [P, kv, D, page]."""

    k: list[Tensor]
    v: list[Tensor]
    size: int  # tokens of a page


class DecodeStep:
    """The step for up to `rows` sequences of up to `longest` tokens.

    Attributes:
        inputs: int32, of a step of m rows: tokens [m], sources [m], lengths [m], tables [m, pages]; see `run`.
        outcome: int32 [2, slots]: `chosen`, and the bits of `best`.
        chosen: int32 [slots], the likeliest token of each row, in place when `run` is done.
        best: float32 [slots], its logit: not finite if something is wrong.
        logits: [rows, vocab] float32.
    """

    def __init__(self, decoder: FusedDecoder, pages: Pages, rows: int, longest: int, slots: int | None = None) -> None:
        assert rows <= FEW
        self.decoder, self.pages, self.rows = decoder, pages, rows
        self.table_width = -(-longest // pages.size)
        spec, device = decoder.spec, decoder.device
        self.pdl = dependent_launches(device)

        self._dependent = {"launch_pdl": True} if self.pdl else {}

        def buffer(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        attentions = [layer.attention for layer in spec.layers]
        qkv = max((a.heads + 2 * a.kv_heads) * a.head_dim for a in attentions)
        heads = max(a.heads * a.head_dim for a in attentions)
        width = max(layer.mlp.width for layer in spec.layers)
        self.inputs = buffer(rows * (3 + self.table_width), dtype=torch.int32)
        self.outcome = buffer(2, max(slots or rows, rows), dtype=torch.int32)
        self.chosen, self.best = self.outcome[0], self.outcome[1].view(torch.float32)
        self.logits = buffer(rows, spec.vocab)
        self.res = buffer(rows, spec.hidden)
        self.x = buffer(rows, spec.hidden, dtype=decoder.dtype)  # residual * the next norm's weight
        self.qkv = [buffer(rows * qkv) for _ in range(2)]
        self.seen = buffer(rows * heads, dtype=decoder.dtype)
        self.act = buffer(rows * width, dtype=decoder.dtype)
        self.codes = buffer(rows * max(spec.hidden, heads, width) * decoder.dtype.itemsize, dtype=torch.uint8)
        self.code_scale = buffer(rows)
        self.stats = [buffer(rows, 3, 16) for _ in range(2)]
        self.count = buffer(max(spec.hidden // 16, 1) * 8, dtype=torch.int32)
        self.parts = buffer(rows, PIECES)
        self.part_ids = buffer(rows, PIECES, dtype=torch.int32)
        self.row_count = buffer(rows, dtype=torch.int32)
        ranks = [linear.branch.rank for linear in decoder.linears() if linear.branch]
        # a branch reads one, and its first half clears the other for the next branch
        self.shrunk = [buffer(rows, max(ranks)) for _ in range(2)] if ranks else []
        self._branches = 0
        self.gpu, self.shared = gpu_name(device), shared_memory(device)
        kinds = {(a, stored_as(codec)): codec for a, codec in zip(attentions, decoder.codecs, strict=True)}
        groups = max(
            self.cut(m, a, codec)["SPLITS"] * m * a.heads for m in range(1, rows + 1) for (a, _), codec in kinds.items()
        )
        depth = max(a.head_dim for a in attentions)
        count = buffer(rows * max(a.kv_heads for a in attentions), dtype=torch.int32)
        self.scratch = buffer(groups * depth), buffer(groups * 2), count  # of attention
        positions = torch.arange(longest, device=device)
        self.angles = {(a.rope, a.head_dim): cosines(a.rope, a.head_dim, positions) for a in dict.fromkeys(attentions)}

    def reset(self) -> None:
        """Put right what a step that broke off may have left behind."""
        for counter in (*self.stats, *self.qkv, self.count, self.row_count, self.scratch[2]):
            counter.zero_()

    @torch.inference_mode()
    def run(self, m: int) -> None:
        """Launch the step for `m` rows. Nothing is allocated, nothing waits for the GPU.

        The token of row i is ``chosen[source]`` of the step before, or the given one where the source is negative; its
        K and V go to place ``length - 1`` of its table; a row of length 0 is empty.
        """
        decoder, spec = self.decoder, self.decoder.spec
        tokens, sources, lengths = self.inputs[: 3 * m].view(3, m)
        table = self.inputs[3 * m : 3 * m + m * self.table_width].view(m, self.table_width)
        self._branches = 0
        for shrunk in self.shrunk:  # a step may end with either of them in use
            shrunk.zero_()
        stats_a, stats_b = self.stats  # each is cleared by the product that reads the other
        self._embed(m, tokens, sources)
        for i, layer in enumerate(decoder.layers):
            a, eps = layer.layer.attention, layer.layer.norms
            n = (a.heads + 2 * a.kv_heads) * a.head_dim
            qkv, clear = (self.qkv[(i + j) % 2][: m * n].view(m, n) for j in range(2))
            x = self.x[:m]
            norm = Folded(stats_a, stats_b, eps["pre_attn"].eps)
            last = i + 1 == len(decoder.layers)
            following = decoder.head if last else decoder.layers[i + 1].qkv
            self._apply(layer.qkv, x, qkv, "add", norm, tops=stats_a[:m, 1], ahead=self._ahead(layer.o))
            static = _static(layer.o)
            seen = self.seen[: m * layer.o.k].view(m, layer.o.k)
            target = seen if static is None else self._codes(m, layer.o.k, layer.o.few_dtype)
            cos, sin = self.angles[a.rope, a.head_dim]
            cut = self.cut(m, a, decoder.codecs[i])
            decode_attention(
                qkv, target, self.pages.k[i], self.pages.v[i], decoder.codecs[i], table, lengths, a, self.pages.size,
                self.scratch, write=(cos, sin, layer.norms),
                clear=clear, rounding=static, tops=stats_a[:m, 2] if layer.o.dynamic else None, pdl=self.pdl,
                ahead=self._ahead(layer.gate_up), cut=cut,
            )  # fmt: skip
            self._apply(
                layer.o, seen, x, "residual", residual=Residual(self.res[:m], layer.norms["pre_mlp"], self.count),
                coded=None if static is None else target, tops=stats_a[:m, 2], stats=stats_b,
                out_tops=layer.gate_up.dynamic, ahead=self._ahead(layer.gate_up, cut.get("AHEAD", 0)),
            )  # fmt: skip
            static = _static(layer.down)
            act = self.act[: m * layer.down.k].view(m, layer.down.k)
            norm = Folded(stats_b, stats_a, eps["pre_mlp"].eps)
            coded = None
            if static is not None:
                # the codes of gate_up's own input lie at the start of the same memory
                coded = self.act.view(torch.uint8)[: m * layer.down.k * layer.down.few_dtype.itemsize]
                coded = coded.view(layer.down.few_dtype).view(m, layer.down.k)
            self._apply(
                layer.gate_up, x, act if coded is None else coded, "silu", norm, tops=stats_b[:m, 1], stats=stats_b,
                out_rounding=static, out_tops=layer.down.dynamic, ahead=self._ahead(layer.down),
            )  # fmt: skip
            g = decoder.final_norm if last else decoder.layers[i + 1].norms["pre_attn"]
            self._apply(
                layer.down, act, x, "residual", residual=Residual(self.res[:m], g, self.count), coded=coded,
                tops=stats_b[:m, 2], stats=stats_a,
                out_tops=following.dynamic, ahead=self._ahead(following),
            )  # fmt: skip
        logits = self.logits[:m]
        norm = Folded(stats_a, stats_b, spec.final_norm.eps)
        self._apply(decoder.head, self.x[:m], logits, "store", norm, tops=stats_a[:m, 1])
        self._choose(m, logits)

    def cut(self, m: int, a: Attention, codec: KVCodec) -> Tile:
        """How attention of `m` rows is cut; `scratch` has room for it."""
        return cut_of(m, a, stored_as(codec), self.pages.size, self.gpu, self.shared)

    def _ahead(self, linear: GpuLinear, known: int = 0) -> Tensor | None:
        """A later product's weights, of which a kernel may bring some to the cache; `known` MiB are there already."""
        return linear.memory[known << 20 :] if self.pdl else None

    def _embed(self, m: int, tokens: Tensor, sources: Tensor) -> None:
        from fewbit.ops.rows.triton_rows import embed

        decoder = self.decoder
        first = decoder.layers[0]
        block, warps = block_of(decoder.spec.hidden)
        clear = first.qkv.n
        embed[(m,)](
            tokens, sources, self.chosen, decoder.embed_weight, first.norms["pre_attn"], self.res, self.x,
            self.stats[0], self.qkv[0], decoder.spec.hidden, clear, BLOCK=block, CLEAR=1 << (clear - 1).bit_length(),
            PDL=int(self.pdl), num_warps=warps,
        )  # fmt: skip

    def _apply(
        self, linear: GpuLinear, x: Tensor, out: Tensor, ending: str, norm: Folded | None = None, *, tops: Tensor,
        coded: Tensor | None = None, **more: Any,
    ) -> None:  # fmt: skip
        """One linear; `coded`: its input, rounded already under the linear's own scale; `more`: as `few` takes it."""
        if linear.branch:
            more["shrunk"] = self._shrink(linear.branch, x, norm)
        rounding, dtype = linear.coded(len(x))
        if rounding is None and coded is None:
            linear.few(x, out, ending=ending, norm=norm, tops=tops, pdl=self.pdl, **more)
            return
        if coded is not None:
            assert linear.rounding is not None
            assert linear.rounding.scale is not None
            codes = Codes(coded, linear.rounding.scale)
        else:
            assert rounding is not None
            codes = self._round(x, rounding, dtype or rounding.dtype, norm, tops)
        linear.few(codes, out, ending=ending, pdl=self.pdl, **more)

    def _codes(self, m: int, width: int, dtype: torch.dtype) -> Tensor:
        return self.codes[: m * width * dtype.itemsize].view(dtype).view(m, width)

    def _round(self, x: Tensor, rounding: Rounding, dtype: torch.dtype, norm: Folded | None, tops: Tensor) -> Codes:
        from fewbit.ops.rows.triton_rows import round_known

        m, width = x.shape
        codes = Codes(self._codes(m, width, dtype), self.code_scale[:m] if rounding.scale is None else rounding.scale)
        stats, clear, eps = (norm.stats, norm.clear, norm.eps) if norm else (x, x, 0.0)
        round_known[(m, -(-width // 2048))](
            x, stats, tops, clear, codes.x, codes.scale, width, eps, BLOCK=2048, NORM=norm is not None,
            CODE=rounding.code, DYNAMIC=rounding.dynamic, PDL=int(self.pdl), PTX=x.is_cuda, num_warps=4,
            **self._dependent,
        )  # fmt: skip
        return codes

    def _shrink(self, branch: Branch, x: Tensor, norm: Folded | None) -> Tensor:
        """The first half of a branch: float32 [m, R]."""
        from fewbit.ops.linear.triton_branch import shrink

        m, width = x.shape
        here, next_ = (self.shrunk[(self._branches + j) % 2] for j in range(2))
        self._branches += 1
        t = here.view(-1)[: m * branch.rank].view(m, branch.rank)
        shrink[(-(-width // 128), -(-m // 16))](
            x, branch.a, t, next_, norm.stats if norm else t, m, width, norm.eps if norm else 0.0,
            BM=16, BK=128, RANK=branch.rank, CLEAR=next_.shape[1], NORM=norm is not None, PDL=int(self.pdl),
            num_warps=4, **self._dependent,
        )  # fmt: skip
        return t

    def _choose(self, m: int, logits: Tensor) -> None:
        from fewbit.ops.rows.triton_rows import argmax

        argmax[(m, PIECES)](
            logits, self.parts, self.part_ids, self.row_count, self.best, self.chosen, self.decoder.spec.vocab,
            BLOCK=4096, PIECES=PIECES, PDL=int(self.pdl), num_warps=4, **self._dependent,
        )  # fmt: skip


def _static(linear: GpuLinear) -> Rounding | None:
    """The rounding of a linear whose input's producer can round it: the scale is known before."""
    r = linear.rounding
    return r if r is not None and r.scale is not None and not r.blocks and linear.branch is None else None
