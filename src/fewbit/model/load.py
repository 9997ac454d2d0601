"""From a checkpoint to the forward: a kernel chosen and prepared for every linear."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from fewbit.checkpoint import Checkpoint
from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.model.attend import KVCodec
from fewbit.model.cpu import CpuLayer, CpuLayers
from fewbit.model.decoder import Decoder, DecoderLayer, Embedding, LayerOp, LinearOp, Normalize
from fewbit.model.fused import FusedDecoder, FusedLayer
from fewbit.numerics.quantspec import QuantSpec
from fewbit.ops.cpu import layer as in_c
from fewbit.ops.cpu.build import Library, Missing, library
from fewbit.ops.device import DeviceInfo, arithmetic_dtype, device_info, release_memory
from fewbit.ops.linear import Choice, LinearKernel, LinearProblem, LinearWeights, choose
from fewbit.ops.linear.cpu import Cpu
from fewbit.ops.linear.dense import Dense
from fewbit.ops.linear.gpu import GpuKernel, GpuLinear
from fewbit.spec.decoder import MLP, DecoderSpec, Layer, LinearShape, MoE, Norm, Rope, key_of, leaf_of

log = logging.getLogger(__name__)


class Linear:
    """A linear layer: a kernel and the weights it prepared, and a low-rank branch where there is one."""

    def __init__(self, kernel: LinearKernel, weights: LinearWeights, dtype: torch.dtype) -> None:
        self.kernel = kernel
        self._prepared = kernel.prepare(weights, dtype)
        beside = None if isinstance(kernel, GpuKernel) else weights.lowrank  # those add it themselves
        self._branch = [_branch_linear(w, dtype) for w in beside or ()]

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        y = self.kernel.run(x, self._prepared)
        for step in self._branch:  # A, then B
            x = step(x)
        return y + x if self._branch else y


def _branch_linear(weight: Tensor, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """One factor of a branch, by the kernel that keeps a token's numbers the same alone and in a batch."""
    kernel = Dense()
    prepared = kernel.prepare(LinearWeights(QuantSpec(), weight), dtype)
    return lambda x: kernel.run(x, prepared)


def load(checkpoint: Checkpoint, device: str | torch.device = "cpu", backend: str = "exact") -> Decoder | FusedDecoder:
    """Load a whole model: on a GPU fused, if `fused_why_not` has nothing against it.

    Args:
        checkpoint: what `open_checkpoint` gave.
        device: where to.
        backend: ``exact``: for each linear the best kernel of floats that rounds nothing but what its QuantSpec says;
            ``auto``: the best one, which on a CPU may round inputs to INT8; or the name of the kernel for every linear.

    Raises:
        UnsupportedError: `backend` cannot do it.
        CheckpointError: a file ends early; a calibrated scale is no positive number.
    """
    loader = Loader(checkpoint, torch.device(device), backend)
    return loader.decoder() if loader.fused_why_not() else loader.fused()


def choices(
    checkpoint: Checkpoint, device: torch.device, backend: str = "exact"
) -> Iterator[tuple[LinearShape, QuantSpec, Choice]]:
    """For every linear the kernel that `load` would take, and why each better one declined."""
    loader = Loader(checkpoint, device, backend)
    for linear in checkpoint.spec.linears():
        yield linear, checkpoint.quant.get(linear.name, QuantSpec()), loader.choose(linear)


Look = Callable[[str, LinearWeights], None]
_T = TypeVar("_T")


def _nothing(name: str, weights: LinearWeights) -> None:
    pass


def _one_by_one(made: Iterable[_T]) -> Iterator[_T]:
    """The same; after each, what making it has freed goes back to the system."""
    for each in made:
        release_memory()
        yield each


class Loader:
    """Builds the parts of a model one by one, so that a caller may hold only some of them."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, backend: str = "exact") -> None:
        self.checkpoint, self.device, self.backend = checkpoint, device, backend
        self._exact = backend not in ("auto", Cpu.name)
        self.dtype = arithmetic_dtype(device, checkpoint.dtype)
        self._info: DeviceInfo = device_info(device)
        self._warned = False

    def decoder(self) -> Decoder:
        """The whole model."""
        spec = self.checkpoint.spec
        head = self.head()  # first: preparing the largest linear takes most, and now there is nothing beside it
        layers: list[LayerOp] = []
        for c_does, run in itertools.groupby(range(len(spec.layers)), lambda index: self.cpu_why_not(index) is None):
            if c_does:
                layers.append(CpuLayers(list(_one_by_one(map(self.cpu_layer, run)))))
            else:
                layers += _one_by_one(map(self.layer, run))
        return Decoder(
            spec,
            self.embed(),
            layers,
            self.final_norm(),
            head,
            [self.codec(index) for index in range(len(spec.layers))],
            self.dtype,
            exact=self._exact,
        )

    def fused_why_not(self) -> str | None:
        """None: the whole model can run as a `FusedDecoder`; else the reason, for a user to read."""
        if self.device.type != "cuda":
            return "needs an NVIDIA GPU"
        if self.backend not in ("auto", "exact"):
            return f"every linear was asked to run on '{self.backend}'"
        if reason := _spec_why_not(self.checkpoint.spec):
            return reason
        for shape in self.checkpoint.spec.linears():
            kernel = self.choose(shape).kernel
            if not isinstance(kernel, GpuKernel):
                return f"{shape.name} runs on '{kernel.name}'"
        layers = self.checkpoint.spec.layers
        if len({(y.attention.heads, y.attention.kv_heads, y.attention.head_dim) for y in layers}) > 1:
            return "its layers differ in their heads"
        for index, layer in enumerate(layers):
            if reason := self._layer_why_not(index, layer):
                return f"layer {index}: {reason}"
        return None

    def _layer_why_not(self, index: int, layer: Layer) -> str | None:
        a, kv = layer.attention, self.checkpoint.kv.get(index)
        if reason := _shape_why_not(layer):
            return reason
        if reason := _act_why_not(layer.mlp):
            return reason
        if layer.mlp.width % 8:
            return f"an MLP width of {layer.mlp.width} does not divide by 8"
        if a.head_dim not in (32, 64, 128, 256) or a.heads // a.kv_heads > 16:
            return f"{a.heads} heads of {a.head_dim} over {a.kv_heads}: the kernels know 32 to 256, at most 16 to one"
        if kv and (kv.k.element != kv.v.element or kv.k.element.name not in ("e4m3", "int8")):
            return f"K and V are stored as {kv}; the kernels know FP8 (E4M3) and INT8"
        if kv and kv.k.element.name == "e4m3" and self._info.capability < (8, 9):
            return "an FP8 cache needs compute capability 8.9"
        prefix = f"layers.{index}"
        for group in (("attn.q", "attn.k", "attn.v"), ("mlp.gate", "mlp.up")):
            quants = [self.checkpoint.quant.get(f"{prefix}.{name}", QuantSpec()) for name in group]
            if any(quant != quants[0] for quant in quants):
                return f"{', '.join(group)} read one input and differ in numerics"
            if quants[0].calibrated:
                scales = [self.checkpoint.tensors.dense(f"{prefix}.{name}.input_scale") for name in group]
                if any(not torch.equal(scale, scales[0]) for scale in scales):
                    return f"{', '.join(group)} read one input and round it under different scales"
        return None

    def fused(self) -> FusedDecoder:
        """The whole model, joined and fused; `fused_why_not` has been asked."""
        spec = self.checkpoint.spec
        layers = [self._fused_layer(index) for index in range(len(spec.layers))]
        embed, norm = self.embed().weight.to(self.dtype), self.vector("final_norm.weight")
        shape = LinearShape("lm_head", spec.vocab, spec.hidden)
        kernel = self.choose(shape).kernel
        assert isinstance(kernel, GpuKernel)
        shared = spec.tied and embed.dtype == self.checkpoint.dtype
        head = kernel.join([LinearWeights(QuantSpec(), embed) if shared else self.weights(shape)])
        codecs = []
        for layer, codec in zip(spec.layers, map(self.codec, range(len(spec.layers))), strict=True):
            heads = layer.attention.kv_heads
            k, v = (None if s is None else s.float().expand(heads).contiguous() for s in (codec.k_scale, codec.v_scale))
            codecs.append(replace(codec, k_scale=k, v_scale=v))
        return FusedDecoder(spec, embed, layers, norm, head, codecs)

    def _fused_layer(self, index: int) -> FusedLayer:
        q, k, v, o, gate, up, down = self.checkpoint.spec.layer_linears(index)
        linears = {
            "qkv": self._joined((q, k, v)),
            "o": self._joined((o,)),
            "gate_up": self._joined((gate, up), gated=True),
            "down": self._joined((down,)),
        }
        return FusedLayer(index, self.checkpoint.spec.layers[index], linears, self.norms(index))

    def _joined(self, shapes: tuple[LinearShape, ...], gated: bool = False) -> GpuLinear:
        kernel = self.choose(shapes[0]).kernel
        assert isinstance(kernel, GpuKernel)
        return kernel.join([self.weights(shape) for shape in shapes], gated)

    def embed(self) -> Embedding:
        """The embedding as stored: a step looks up few of its rows."""
        spec, tensors = self.checkpoint.spec, self.checkpoint.tensors
        table = tensors.dense("positions.weight", self.device) if spec.learned_positions else None
        return Embedding(tensors.dense("embed.weight", self.device), spec.embed_scale, table)

    def vector(self, name: str) -> Tensor:
        """A tensor that is no linear's, by its canonical name."""
        return self.checkpoint.tensors.dense(name, self.device).to(self.dtype)

    def final_norm(self) -> LinearOp:
        """The norm before the head."""
        norm = self.checkpoint.spec.final_norm
        if not self._exact and norm == Norm(norm.eps) and self.device.type == "cpu" and isinstance(library(), Library):
            return in_c.Normalize(self.vector("final_norm.weight"), norm.eps)
        return Normalize(norm, self.vector("final_norm.weight"), self.vector("final_norm.bias") if norm.bias else None)

    def cpu_why_not(self, index: int) -> str | None:
        """None: this layer can run as a `CpuLayer`; else the reason, for a user to read."""
        layer, shapes = self.checkpoint.spec.layers[index], self.checkpoint.spec.layer_linears(index)
        for shape in shapes:
            if (kernel := self.choose(shape).kernel).name != Cpu.name:
                return f"{shape.name} runs on '{kernel.name}'"
            if self.checkpoint.quant.get(shape.name, QuantSpec()).lowrank:
                return f"{shape.name} has a low-rank branch"
        if not isinstance(layer.mlp, MLP):
            return "it is a mixture of experts"
        return _shape_why_not(layer) or _act_why_not(layer.mlp)

    def cpu_layer(self, index: int) -> CpuLayer:
        """One layer in C; `cpu_why_not` has been asked."""
        kernel, linears = Cpu(), {}
        prescales: list[Tensor] = []
        for shape in self.checkpoint.spec.layer_linears(index):
            weights = self.weights(shape)
            if weights.prescale is not None:  # one tensor for those that have the same: their input is rounded once
                same = next((p for p in prescales if torch.equal(p, weights.prescale)), weights.prescale.float())
                prescales.append(same)
                weights = replace(weights, prescale=same)
            linears[shape.name.rpartition(".")[2]] = kernel.prepare(weights, self.dtype)
        return CpuLayer(index, self.checkpoint.spec.layers[index], linears, self.norms(index))

    def layer(self, index: int, look: Look = _nothing) -> DecoderLayer:
        """One layer with its kernels; see `linear`."""
        shapes = self.checkpoint.spec.layer_linears(index)
        linears = {leaf_of(shape.name): self.linear(shape, look) for shape in shapes}
        return DecoderLayer(index, self.checkpoint.spec.layers[index], linears, self.norms(index))

    def norms(self, index: int) -> dict[str, Tensor]:
        """What one layer has beside its linears, as `DecoderLayer` takes it."""
        return {key_of(name): self.vector(name) for name in self.checkpoint.spec.layer_vectors(index)}

    def head(self, look: Look = _nothing) -> Linear:
        """The language-model head; a tied one shares the embedding's numbers."""
        return self.linear(LinearShape("lm_head", self.checkpoint.spec.vocab, self.checkpoint.spec.hidden), look)

    def codec(self, index: int) -> KVCodec:
        """How one layer's K and V are stored."""
        kv = self.checkpoint.kv.get(index)
        if kv is None:
            return KVCodec(self.checkpoint.dtype)
        if kv.k.outer or kv.v.outer:
            raise UnsupportedError(
                f"K and V in {kv} can be exported, not run: a cache with a scale a block is not there"
            )
        scales = (self.checkpoint.tensors.dense(f"layers.{index}.attn.{n}_scale", self.device) for n in "kv")
        return KVCodec(self.checkpoint.dtype, kv, *scales)

    def choose(self, shape: LinearShape) -> Choice:
        """The kernel for one linear."""
        return self.choose_for(self.checkpoint.quant.get(shape.name, QuantSpec()), shape)

    def choose_for(self, quant: QuantSpec, shape: LinearShape) -> Choice:
        """The kernel for one linear, were it quantized so."""
        problem = LinearProblem(
            quant, shape.out_features, shape.in_features, self.dtype, self._info, stored=self.checkpoint.dtype
        )
        return choose(problem, self.backend)

    def linear(self, shape: LinearShape, look: Look = _nothing) -> Linear:
        """One linear, loaded and prepared; `look` is shown its name and its weights in between."""
        look(shape.name, weights := self.weights(shape))
        choice = self.choose(shape)
        for _, reason in choice.declined:
            if isinstance(reason, Missing) and not self._warned:
                self._warned = True
                log.warning("weights are widened to float32, slower and in up to 8 times the memory: %s", reason)
        return Linear(choice.kernel, weights, self.dtype)

    def weights(self, shape: LinearShape) -> LinearWeights:
        """One linear as the checkpoint has it, on the device.

        Raises:
            CheckpointError: its calibrated scale is no positive number.
        """
        tensors, name = self.checkpoint.tensors, shape.name
        quant = self.checkpoint.quant.get(name, QuantSpec())
        source = "embed.weight" if name == "lm_head" and self.checkpoint.spec.tied else f"{name}.weight"

        def optional(leaf: str, wanted: bool) -> Tensor | None:
            return tensors.dense(f"{name}.{leaf}", self.device) if wanted else None

        scale = optional("input_scale", quant.calibrated)
        if scale is not None and not (scale > 0).all():
            raise CheckpointError(
                f"{name}.input_scale is {scale.flatten().tolist()[0]:g}; expected a positive number: calibrate it again"
            )
        weight = tensors.on(source, self.device)
        if name == "lm_head" and self.checkpoint.spec.unit_head and isinstance(weight, Tensor):
            weight = (weight / weight.float().norm(dim=1, keepdim=True).clamp_min(1e-12)).to(weight.dtype)
        return LinearWeights(
            quant,
            weight,
            optional("bias", shape.bias),
            scale,
            optional("prescale", quant.prescale),
            (tensors.dense(f"{name}.lowrank_a", self.device), tensors.dense(f"{name}.lowrank_b", self.device))
            if quant.lowrank
            else None,
        )


def _spec_why_not(spec: DecoderSpec) -> str | None:
    """What a model has, beyond its layers, that the fused kernels do not know."""
    if spec.routers():
        return "it is a mixture of experts"
    if spec.final_norm != Norm(spec.final_norm.eps):
        return "its last norm is not a plain RMSNorm"
    if spec.learned_positions or spec.embed_scale != 1.0:
        return "its embedding is scaled or has learned positions"
    if spec.unit_head and spec.tied:
        return "its head is the embedding with rows of length one"
    return "its logits are capped" if spec.logit_softcap is not None else None


def _act_why_not(mlp: MLP | MoE) -> str | None:
    return None if mlp.act == "silu" else f"the activation is {mlp.act}, the kernels know silu"


def _shape_why_not(layer: Layer) -> str | None:
    """What a layer has that the fused kernels do not know."""
    a, m = layer.attention, layer.mlp
    if layer.parallel or layer.norms.keys() != {"pre_attn", "pre_mlp"}:
        return "the kernels know layers of two norms, one before attention and one before the MLP"
    if any(norm != Norm(norm.eps) for norm in (*layer.norms.values(), a.qk_norm) if norm) or a.qk_norm_all:
        return "the kernels know plain RMSNorms, over one head of q and k"
    if not isinstance(a.position, Rope) or a.position.fraction != 1.0 or a.position.interleaved:
        return "the kernels know rotary positions over the halves of whole heads"
    if a.softcap is not None or a.sinks:
        return "the kernels know no capped scores and no sinks"
    if isinstance(m, MLP) and (not m.gated or m.limit is not None):
        return "the kernels know plain gated MLPs"
    return None
