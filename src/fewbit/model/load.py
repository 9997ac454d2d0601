"""From a checkpoint to the forward: a kernel chosen and prepared for every linear."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fewbit.checkpoint import Checkpoint
from fewbit.model.attend import KVCodec
from fewbit.model.decoder import Decoder, DecoderLayer
from fewbit.numerics.quantspec import QuantSpec
from fewbit.ops.device import DeviceInfo, arithmetic_dtype, device_info
from fewbit.ops.linear import Choice, LinearKernel, LinearProblem, LinearWeights, choose
from fewbit.spec.decoder import LinearShape


class Linear:
    """A linear layer: a kernel and the weights it prepared."""

    def __init__(self, kernel: LinearKernel, weights: LinearWeights, dtype: torch.dtype) -> None:
        self.kernel = kernel
        self._prepared = kernel.prepare(weights, dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        return self.kernel.run(x, self._prepared)


def load(checkpoint: Checkpoint, device: str | torch.device = "cpu", backend: str = "auto") -> Decoder:
    """Load a whole model.

    Args:
        checkpoint: what `open_checkpoint` gave.
        device: where to.
        backend: ``auto``, or the name of the kernel to use for every linear.

    Raises:
        UnsupportedError: `backend` cannot do it.
        CheckpointError: a file ends early.
    """
    return Loader(checkpoint, torch.device(device), backend).decoder()


def choices(
    checkpoint: Checkpoint, device: torch.device, backend: str = "auto"
) -> Iterator[tuple[LinearShape, QuantSpec, Choice]]:
    """For every linear the kernel that `load` would take, and why each better one declined."""
    loader = Loader(checkpoint, device, backend)
    for linear in checkpoint.spec.linears():
        yield linear, checkpoint.quant.get(linear.name, QuantSpec()), loader.choose(linear)


class Loader:
    """Builds the parts of a model one by one, so that a caller may hold only some of them."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, backend: str = "auto") -> None:
        self.checkpoint, self.device, self.backend = checkpoint, device, backend
        self.dtype = arithmetic_dtype(device, checkpoint.dtype)
        self._info: DeviceInfo = device_info(device)

    def decoder(self) -> Decoder:
        """The whole model."""
        spec = self.checkpoint.spec
        return Decoder(
            spec,
            self.embed(),
            [self.layer(index) for index in range(len(spec.layers))],
            self.norm("final_norm"),
            self.head(),
            [self.codec(index) for index in range(len(spec.layers))],
            self.dtype,
        )

    def embed(self) -> Tensor:
        """The embedding as stored: a step looks up few of its rows."""
        return self.checkpoint.tensors.dense("embed.weight").to(self.device)

    def norm(self, name: str) -> Tensor:
        """The weight of a norm."""
        return self.checkpoint.tensors.dense(f"{name}.weight").to(self.device, self.dtype)

    def layer(self, index: int) -> DecoderLayer:
        """One layer with its kernels."""
        shapes = self.checkpoint.spec.layer_linears(index)
        linears = {shape.name.rpartition(".")[2]: self.linear(shape) for shape in shapes}
        return DecoderLayer(index, self.checkpoint.spec.layers[index], linears, self.norms(index))

    def norms(self, index: int) -> dict[str, Tensor]:
        """The norm weights of one layer, by their last name."""
        prefix = f"layers.{index}"
        names = [f"{prefix}.pre_attn", f"{prefix}.pre_mlp"]
        if self.checkpoint.spec.layers[index].attention.qk_norm:
            names += [f"{prefix}.attn.q_norm", f"{prefix}.attn.k_norm"]
        return {name.rpartition(".")[2]: self.norm(name) for name in names}

    def head(self) -> Linear:
        """The language-model head; a tied one shares the embedding's numbers."""
        return self.linear(LinearShape("lm_head", self.checkpoint.spec.vocab, self.checkpoint.spec.hidden))

    def codec(self, index: int) -> KVCodec:
        """How one layer's K and V are stored."""
        kv = self.checkpoint.kv.get(index)
        if kv is None:
            return KVCodec(self.checkpoint.dtype)
        scales = (self.checkpoint.tensors.dense(f"layers.{index}.attn.{n}_scale").to(self.device) for n in "kv")
        return KVCodec(self.checkpoint.dtype, kv, *scales)

    def choose(self, shape: LinearShape) -> Choice:
        """The kernel for one linear."""
        return self.choose_for(self.checkpoint.quant.get(shape.name, QuantSpec()), shape)

    def choose_for(self, quant: QuantSpec, shape: LinearShape) -> Choice:
        """The kernel for one linear, were it quantized so."""
        return choose(LinearProblem(quant, shape.out_features, shape.in_features, self.dtype, self._info), self.backend)

    def linear(self, shape: LinearShape) -> Linear:
        """One linear, loaded and prepared."""
        return Linear(self.choose(shape).kernel, self.weights(shape), self.dtype)

    def weights(self, shape: LinearShape) -> LinearWeights:
        """One linear as the checkpoint has it, on the device."""
        tensors, name = self.checkpoint.tensors, shape.name
        quant = self.checkpoint.quant.get(name, QuantSpec())
        source = "embed.weight" if name == "lm_head" and self.checkpoint.spec.tied else f"{name}.weight"

        def optional(leaf: str, wanted: bool) -> Tensor | None:
            return tensors.dense(f"{name}.{leaf}").to(self.device) if wanted else None

        return LinearWeights(
            quant,
            tensors[source].to(self.device),
            optional("bias", shape.bias),
            optional("input_scale", quant.calibrated),
            optional("prescale", quant.prescale),
        )
