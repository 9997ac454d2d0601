"""The block loop: one decoder layer after another is read, calibrated, quantized and written, and then let go.

Beside the calibration data, a little held-out text runs through the model twice, once in float and once as quantized
so far. The second ends in the logits that the finished files must reproduce bit for bit.

A run that was stopped goes on after the last layer that it finished: those before it are not quantized again, the data
only run through them as they lie on the disk.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from fewbit.checkpoint import Checkpoint, CheckpointWriter, check_target, open_checkpoint
from fewbit.checkpoint.names import Names
from fewbit.checkpoint.places import Places
from fewbit.compress.calibrate import observe, observe_head, set_reach
from fewbit.compress.data import in_words, windows_of
from fewbit.compress.disk import Disk
from fewbit.compress.fold import outers_of
from fewbit.compress.plan import Plan, Report, prepared
from fewbit.compress.ranks import Follower, Ranks
from fewbit.compress.scales import kv_scales, relative_error
from fewbit.compress.stats import Block, Stats
from fewbit.compress.stream import Stream
from fewbit.compress.target import writer_of
from fewbit.compress.techniques import BlockTechnique, Correction, LayerTechnique, round_to_nearest
from fewbit.compress.verify import verify
from fewbit.errors import CheckpointError, FewbitError
from fewbit.model import DecoderLayer, KVCodec, Linear, Loader
from fewbit.model.decoder import Embedding, finish_logits
from fewbit.numerics.format import ALL
from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.quantspec import QuantSpec
from fewbit.numerics.reference import input_scale
from fewbit.ops.device import device_peak_bytes, forget_peak, peak_bytes, release_memory
from fewbit.ops.linear import LinearWeights
from fewbit.ops.linear.dense import Dense
from fewbit.spec.decoder import LinearShape, key_of, leaf_of

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, how much is done, and of how much."""


def compress(
    checkpoint: Checkpoint,
    planned: Plan,
    target: Path,
    *,
    device: str = "cpu",
    force: bool = False,
    ranks: Ranks | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Report:
    """Carry out a plan and write the result to `target`, which appears whole or not at all.

    Args:
        checkpoint: the model.
        planned: what `plan` made of it.
        target: the folder to make.
        device: ``cpu`` or ``cuda:N``.
        force: replace a folder that is not empty.
        ranks: processes that calibrate together, see `fewbit.compress.ranks`; each calls this.
        progress: called with a stage's name, how much is done, and of how much.

    Raises:
        FewbitError: the data, the weights or the target are not as they must be; or what was written, opened again,
            does not hold what was meant.
    """
    check_target(target, force, checkpoint.path)
    with torch.inference_mode():
        return _Run(checkpoint, planned, target, torch.device(device), force, ranks or Ranks(), progress).run()


class _Run:
    """One compression under way."""

    def __init__(
        self, checkpoint: Checkpoint, planned: Plan, target: Path, device: torch.device, force: bool, ranks: Ranks,
        progress: Progress,
    ) -> None:  # fmt: skip
        self.checkpoint = checkpoint = prepared(checkpoint, planned.recipe)
        self.plan, self.target, self.force, self.ranks = planned, target.absolute(), force, ranks
        self.progress, self.device = progress, device
        self.loader = Loader(checkpoint, device)
        self.names = Names(checkpoint.family, checkpoint.spec)
        self.places = Places(self.names, checkpoint.spec, planned.quant)
        self.rounded: dict[str, QTensor] = {}  # of linears that were rounded with another
        self.report = Report()
        forget_peak(self.device)
        self.start_bytes = peak_bytes()
        self.codecs: list[KVCodec] = []
        techniques = planned.recipe.techniques
        self.block_techniques = [cast("BlockTechnique", t) for t in techniques if hasattr(t, "block")]
        layered = [cast("LayerTechnique", t) for t in techniques if hasattr(t, "layer")]
        self.rounding: LayerTechnique = layered[0] if layered else round_to_nearest.Settings()
        self.splitting = planned.recipe.splitting
        self.correction = next((cast("Correction", t) for t in techniques if hasattr(t, "correct")), None)
        self.needs = {t.needs for t in techniques}
        self.stored = checkpoint.tensors.dtype("embed.weight")  # config.json may say another dtype than the files

    def run(self) -> Report:
        calibration, held_out = windows_of(
            self.checkpoint, self.plan.recipe.calibration if self.plan.calibrated else None
        )
        if calibration:
            self.report.calibration = in_words(calibration, self.plan.recipe.calibration)
        spec, embed = self.checkpoint.spec, self._embed()
        data = Stream(self.ranks.share(calibration), embed, self.loader.dtype, self.ranks)
        exact, rounded = Stream(held_out, embed, self.loader.dtype), Stream(held_out, embed, self.loader.dtype)
        with self._writer() as writer, Disk(self.report.seconds, self.device.type != "cpu") as disk:
            self.writer, self.disk = writer, disk
            self._write("embed.weight", embed.weight)
            if embed.table is not None:
                self._write("positions.weight", embed.table)
            del embed
            done = self._go_on(data, exact, rounded)
            coming = disk.read(self._read, done) if done < len(spec.layers) else None
            for index in range(done, len(spec.layers)):
                self.progress("compress", index, len(spec.layers))
                assert coming is not None
                block = coming()
                disk.catch_up()
                coming = disk.read(self._read, index + 1) if index + 1 < len(spec.layers) else None
                self._block(block, data, exact, rounded)
                del block
                disk.write(writer.record, self._progress(index + 1))
            logits = self._head(data, exact, rounded)
            self.progress("compress", len(spec.layers), len(spec.layers))
            disk.wait()
            if isinstance(writer, Follower):
                return self.report
            with self._stage("write"):
                folder = writer.finish()
                (folder / "recipe.yaml").write_text(self.plan.recipe.text, "utf8")
            with self._stage("check"):
                self.report.verified = verify(open_checkpoint(folder), held_out, logits, self.device, self.progress)
            with self._stage("write"):
                writer.commit()
        self.report.peak_bytes, self.report.device_bytes = peak_bytes(), device_peak_bytes(self.device)
        self.report.grown_bytes = self.report.peak_bytes - self.start_bytes
        return self.report

    # --- the parts ----------------------------------------------------------------------------------------------------

    def _writer(self) -> CheckpointWriter | Follower:
        """In the first process the writer; the others learn from it what an unfinished run left."""
        own: list[CheckpointWriter] = []

        def begin() -> tuple[Path, dict[str, Any] | None]:
            used, world = self.report.calibration, self.ranks.world
            own.append(writer_of(self.checkpoint, self.plan, self.target, used, self.device, self.force, world))
            return own[0].folder, own[0].recorded

        follower = Follower(*self.ranks.first(begin))
        return own[0] if own else follower

    def _progress(self, done: int) -> dict[str, Any]:
        """What a later run must know to go on after `done` layers."""
        weight, output, experts = self.report.weight_error, self.report.output_error, self.report.experts
        pairs: dict[str, Mapping[Any, Any]] = {"weight_error": weight, "output_error": output, "experts": experts}
        return {
            "done": done,
            "scarce": list(self.report.scarce),
            **{name: list(d.items()) for name, d in pairs.items()},
        }

    def _go_on(self, data: Stream, exact: Stream, rounded: Stream) -> int:
        """Bring the streams to where an unfinished run stopped; how many layers it finished."""
        if (found := self.writer.recorded) is None:
            return 0
        done: int = found["done"]
        self.report.resumed_after = done
        self.report.weight_error, self.report.output_error = dict(found["weight_error"]), dict(found["output_error"])
        self.report.experts, self.report.scarce = dict(found.get("experts", ())), list(found.get("scarce", ()))
        partial = Loader(open_checkpoint(self.writer.folder), self.device)
        for index in range(done):
            self.progress("compress", index, len(self.checkpoint.spec.layers))
            block = self._read(index)
            with self._stage("calibrate"):
                exact.through(self._float_layer(block), [*self.codecs, KVCodec(self.checkpoint.dtype)])
                del block
                self.codecs.append(partial.codec(index))
                layer = partial.layer(index)
                rounded.through(layer, self.codecs)
                data.through(layer, self.codecs)
        return done

    def _block(self, block: Block, data: Stream, exact: Stream, rounded: Stream) -> None:
        """Everything about one layer."""
        index, layer = block.index, self._float_layer(block)
        shapes = self.checkpoint.spec.layer_linears(index)
        plain = [*self.codecs, KVCodec(self.checkpoint.dtype)]
        with self._stage("calibrate"):
            exact.through(layer, plain)
            if data:
                observe(block, shapes, layer, data, plain, self.needs)
                self.report.experts |= block.tokens
                self.report.scarce += sorted({name.rpartition(".")[0] for name in block.scarce})
        layer.linears.clear()  # techniques make others of the weights: no layer of the old ones is held beside them
        with self._stage("quantize"):
            for technique in self.block_techniques:
                technique.block(block)
            # what is stored is what later layers must see: a norm that a technique changed is rounded here
            layer.norms = {
                key_of(name): block.norms[key_of(name)].to(self.checkpoint.tensors.dtype(name)).to(self.loader.dtype)
                for name in self.checkpoint.spec.layer_vectors(index)
            }
        if data and self.plan.recipe.calibration.method != "max":
            with self._stage("calibrate"):
                again = self._float_layer(block)
                again.norms = dict(layer.norms)
                set_reach(block, shapes, again, data, plain, self.plan.kv.get(index), self.plan.recipe.calibration)
                del again
        outers = outers_of(shapes, block)
        with self._stage("quantize"):
            self._round_together(block, outers)
        for shape in shapes:
            layer.linears[leaf_of(shape.name)] = self._linear(shape, block, outers.get(shape.name))
        for name in self.checkpoint.spec.layer_vectors(index):
            self._write(name, layer.norms[key_of(name)].to(self.checkpoint.tensors.dtype(name)))
        scales = kv_scales(block, self.plan.kv.get(index))
        self.codecs.append(self._codec(index, scales))
        for which, scale in scales.items():
            self._write(f"layers.{index}.attn.{which}_scale", scale)
        with self._stage("calibrate"):
            rounded.through(layer, self.codecs)
            data.through(layer, self.codecs)
        self.report.output_error[index] = rounded.error(exact)
        layer.linears.clear()
        release_memory()

    def _embed(self) -> Embedding:
        embed = self.loader.embed()
        self._finite("embed.weight", embed.weight)
        if embed.table is not None:
            self._finite("positions.weight", embed.table)
        return embed

    def _read(self, index: int) -> Block:
        """The layer in float: one copy of each weight, shared by the forward pass and the techniques."""
        shapes = self.checkpoint.spec.layer_linears(index)
        weights = dict(zip((shape.name for shape in shapes), self.disk.each(self._weights, shapes), strict=True))
        quant = {shape.name: self.plan.quant[shape.name] for shape in shapes if shape.name in self.plan.quant}
        floats = {name: cast("Tensor", w.weight) for name, w in weights.items()}
        norms = self.loader.norms(index)
        for name in self.checkpoint.spec.layer_vectors(index):
            self._finite(name, norms[key_of(name)])
        biases = {name: w.bias for name, w in weights.items() if w.bias is not None}
        layer = self.checkpoint.spec.layers[index]
        return Block(index, layer, quant, floats, norms, self.stored, biases)

    def _weights(self, shape: LinearShape) -> LinearWeights:
        w = self.loader.weights(shape)
        assert isinstance(w.weight, Tensor)
        self._finite(f"{shape.name}.weight", w.weight)
        if w.bias is not None:
            self._finite(f"{shape.name}.bias", w.bias)
        w = replace(w, weight=w.weight.to(self.loader.dtype))
        release_memory()
        return w

    def _finite(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor, once it is known to hold numbers only; looked at in pieces, which costs no memory."""
        if not all(torch.isfinite(piece).all() for piece in tensor.split(1024)):
            raise CheckpointError(f"tensor '{self.names.tensor(name)}' holds NaN or infinity; repair the weights first")
        return tensor

    def _float_layer(self, block: Block) -> DecoderLayer:
        linears = {}
        for name, weight in block.weights.items():
            weights = LinearWeights(QuantSpec(), weight, block.biases.get(name))
            linears[leaf_of(name)] = Linear(Dense(), weights, self.loader.dtype)
        return DecoderLayer(block.index, block.layer, linears, block.norms)

    def _linear(self, shape: LinearShape, block: Block, outer: Tensor | None) -> Linear:
        """Quantize one linear, write it, and return it as it will be served."""
        # from here on only its quantized form is held
        weight, stats = block.weights.pop(shape.name), block.stats.pop(shape.name, None)
        quant, bias = block.quant.get(shape.name), block.biases.get(shape.name)
        if bias is not None:  # a technique may have changed it
            bias = bias.to(self.checkpoint.tensors.dtype(f"{shape.name}.bias"))
        if quant is None:
            stored = weight.to(self.checkpoint.tensors.dtype(f"{shape.name}.weight"))
            self._write(f"{shape.name}.weight", stored)
            served = LinearWeights(QuantSpec(), stored, bias)
        else:
            with self._stage("quantize"):
                branch: tuple[Tensor, Tensor] | tuple[()] = ()
                if (q := self.rounded.pop(shape.name, None)) is None:
                    q, branch = self._round(shape.name, weight.float(), quant, stats, outer)
            self._write(f"{shape.name}.weight", q)
            for leaf, factor in zip(("lowrank_a", "lowrank_b"), branch, strict=False):
                self._write(f"{shape.name}.{leaf}", factor)
            scale = None
            if quant.calibrated:
                assert quant.input is not None
                assert stats is not None
                scale = input_scale(block.reach.get(shape.name, stats.amax.max()), quant.input)
                self._write(f"{shape.name}.input_scale", scale)
            if self.correction is not None and bias is not None and stats is not None:
                off = q.dequantize() - weight.float()
                off = off + branch[1].float() @ branch[0].float() if branch else off
                bias = self.correction.correct(block.biases[shape.name], off, stats).to(bias.dtype)
            served = LinearWeights(quant, q, bias, scale, lowrank=branch or None)
        if bias is not None:
            self._write(f"{shape.name}.bias", bias)
        del weight, stats
        release_memory()
        return Linear(self.loader.choose_for(served.quant, shape).kernel, served, self.loader.dtype)

    def _round_together(self, block: Block, outers: Mapping[str, Tensor]) -> None:
        """Round as one what lies in one stored tensor and has one scale for all of its rows."""
        for name, quant in block.quant.items():
            names = self.places.of_linear(name).names
            if len(names) == 1 or name != names[0] or quant.weight is None or quant.weight.block[0] != ALL:
                continue
            weights, start = [block.weights[n].float() for n in names], 0
            stats = block.stats.get(name)  # they read one input
            whole, _ = self._round(name, torch.cat(weights), quant, stats, outers.get(name))
            for n, weight in zip(names, weights, strict=True):
                self.rounded[n] = whole.slice(-2, start, start := start + len(weight))
                self.report.weight_error[n] = relative_error(self.rounded[n], weight, weight)

    def _round(
        self, name: str, weight: Tensor, quant: QuantSpec, stats: Stats | None, outer: Tensor | None
    ) -> tuple[QTensor, tuple[Tensor, Tensor] | tuple[()]]:
        """A weight's codes, and the two factors of its branch where it has one."""
        rest, branch = weight, cast("tuple[Tensor, Tensor] | tuple[()]", ())
        try:
            if quant.lowrank:
                assert self.splitting is not None
                assert stats is not None
                q, a, b = self.splitting.split(weight, quant, stats, outer, self.rounding, self.stored)
                rest, branch = weight - b.float() @ a.float(), (a, b)
            else:
                q = self.rounding.layer(weight, quant, stats, outer)
        except FewbitError as error:
            raise type(error)(f"{name}.weight: {error}") from None
        self.report.weight_error[name] = relative_error(q, rest, weight)
        return q, branch

    def _codec(self, index: int, scales: Mapping[str, Tensor]) -> KVCodec:
        kv = self.plan.kv.get(index)
        return KVCodec(self.checkpoint.dtype, kv, scales["k"], scales["v"]) if kv else KVCodec(self.checkpoint.dtype)

    def _head(self, data: Stream, exact: Stream, rounded: Stream) -> Tensor:
        """The final norm and the head; returns the held-out logits of the quantized model."""
        spec = self.checkpoint.spec
        shape = LinearShape("lm_head", spec.vocab, spec.hidden)
        final, tensors = self.loader.final_norm(), self.checkpoint.tensors
        for name in ("final_norm.weight", "final_norm.bias")[: 2 if spec.final_norm.bias else 1]:
            self._write(name, self._finite(name, tensors.dense(name)))
        w = self.loader.weights(shape)
        assert isinstance(w.weight, Tensor)
        self._finite("lm_head.weight", w.weight)
        head = Linear(self.loader.choose_for(QuantSpec(), shape).kernel, w, self.loader.dtype)
        states = [final(s.states()) for s in (exact, rounded)]
        reference = head(states[0])
        if (quant := self.plan.quant.get("lm_head")) is not None:
            floats = {"lm_head": w.weight.to(self.loader.dtype)}
            block = Block(len(spec.layers), spec.layers[-1], {"lm_head": quant}, floats, {})
            if data and (quant.calibrated or self.needs - {"none"}):
                observe_head(block, data, final, self.plan.recipe.calibration, self.needs)
            head = self._linear(shape, block, outers_of([shape], block).get("lm_head"))
        elif not spec.tied:
            self._write("lm_head.weight", tensors.dense("lm_head.weight"))
        logits = finish_logits(head(states[1]), spec)
        log_p, log_q = finish_logits(reference, spec).log_softmax(-1), logits.log_softmax(-1)
        self.report.kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
        return logits

    def _write(self, name: str, tensor: Tensor | QTensor) -> None:
        self.disk.write(self.writer.add, name, tensor)

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.report.seconds[name] = self.report.seconds.get(name, 0.0) + time.perf_counter() - start
