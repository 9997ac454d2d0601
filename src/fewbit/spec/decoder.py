"""What a decoder-only language model is, as data. There is no torch in here, and no family."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Norm:
    """RMS normalization: ``x / sqrt(mean(x**2) + eps) * weight``."""

    eps: float


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's rotary scaling: long wavelengths are slowed by `factor`, short ones kept, a ramp between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclass(frozen=True)
class LinearScaling:
    """Positions are divided by `factor`."""

    factor: float


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (arXiv:2309.00071): interpolated and plain frequencies blended by wavelength, attention sharpened."""

    factor: float
    original_context: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None


@dataclass(frozen=True)
class Rope:
    """Rotary positions over the halves of a head."""

    theta: float
    scaling: Llama3Scaling | LinearScaling | YarnScaling | None = None


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention: query head h reads key/value head ``h // (heads // kv_heads)``."""

    heads: int
    kv_heads: int
    head_dim: int
    position: Rope
    window: int | None = None  # a token sees itself and the window - 1 tokens before it
    qk_norm: Norm | None = None  # over head_dim, before the rotation
    qkv_bias: bool = False
    o_bias: bool = False

    @property
    def scale(self) -> float:
        """What q·k is multiplied by before the softmax."""
        return float(self.head_dim**-0.5)


@dataclass(frozen=True)
class MLP:
    """``down(act(gate(x)) * up(x))``."""

    width: int
    act: str = "silu"
    bias: bool = False


@dataclass(frozen=True)
class MoE:
    """A mixture of experts: each token goes through the `top_k` MLPs to which a router gives the highest scores.

    The router's logits become scores by a softmax over all experts; the results are added, weighted by them.
    """

    experts: int
    top_k: int
    expert: MLP
    renormalize: bool = True  # the chosen scores are divided by their sum

    @property
    def width(self) -> int:
        """Of one expert."""
        return self.expert.width

    @property
    def act(self) -> str:
        """Of every expert."""
        return self.expert.act


@dataclass(frozen=True)
class Layer:
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``."""

    attention: Attention
    mlp: MLP | MoE
    pre_attn: Norm
    pre_mlp: Norm

    def mlps(self, index: int) -> dict[str, MLP]:
        """Its MLPs as layer `index` by canonical name: ``layers.3.mlp``, or one for each expert."""
        name = f"layers.{index}.mlp"
        if isinstance(self.mlp, MLP):
            return {name: self.mlp}
        return {f"{name}.experts.{e}": self.mlp.expert for e in range(self.mlp.experts)}


@dataclass(frozen=True)
class LinearShape:
    """One linear layer: rows out, columns in, whether a bias is added, and who reads the same input."""

    name: str  # canonical: layers.3.attn.q, layers.3.mlp.down, layers.3.mlp.experts.7.down, lm_head
    out_features: int
    in_features: int
    bias: bool = False
    shares_input: str = ""  # linears of one name here read one input: layers.3.attn.qkv, layers.3.mlp.gate_up


def leaf_of(name: str) -> str:
    """What a linear of this canonical name is called in its layer: ``q``, ``down``, ``experts.7.down``."""
    return name.split(".", 3)[-1]


def by_input(shapes: Iterable[LinearShape]) -> list[list[LinearShape]]:
    """Linears in groups that read one input."""
    groups: dict[str, list[LinearShape]] = {}
    for shape in shapes:
        groups.setdefault(shape.shares_input or shape.name, []).append(shape)
    return list(groups.values())


def role_of(name: str) -> str:
    """What linears do in their layer, whichever expert they belong to: ``attn.q``, ``mlp.experts.*.down``."""
    return ".".join("*" if part.isdigit() else part for part in name.split(".")[2:])


def by_role(shapes: Iterable[LinearShape]) -> list[list[LinearShape]]:
    """The linears of a layer in groups that read one input, those of all experts together."""
    groups: dict[str, list[LinearShape]] = {}
    for group in by_input(shapes):
        groups.setdefault(role_of(group[0].name), []).extend(group)
    return list(groups.values())


@dataclass(frozen=True)
class DecoderSpec:
    """A whole decoder. Layers are a tuple: alternating windows or uneven widths are just another spec."""

    vocab: int
    hidden: int
    layers: tuple[Layer, ...]
    final_norm: Norm
    tied: bool = False  # lm_head is the embedding
    context: int = 2048  # longest sequence the positions were made for

    def layer_linears(self, index: int) -> tuple[LinearShape, ...]:
        """The linears of layer `index`, in the order in which they run."""
        layer, p = self.layers[index], f"layers.{index}"
        a, h, qkv = layer.attention, self.hidden, f"{p}.attn.qkv"
        found = [
            LinearShape(f"{p}.attn.q", a.heads * a.head_dim, h, a.qkv_bias, qkv),
            LinearShape(f"{p}.attn.k", a.kv_heads * a.head_dim, h, a.qkv_bias, qkv),
            LinearShape(f"{p}.attn.v", a.kv_heads * a.head_dim, h, a.qkv_bias, qkv),
            LinearShape(f"{p}.attn.o", h, a.heads * a.head_dim, a.o_bias),
        ]
        for name, m in layer.mlps(index).items():
            found += [
                LinearShape(f"{name}.gate", m.width, h, m.bias, f"{name}.gate_up"),
                LinearShape(f"{name}.up", m.width, h, m.bias, f"{name}.gate_up"),
                LinearShape(f"{name}.down", h, m.width, m.bias),
            ]
        return tuple(found)

    def linears(self) -> Iterator[LinearShape]:
        """Every linear of the model, layer by layer, ``lm_head`` last."""
        for index in range(len(self.layers)):
            yield from self.layer_linears(index)
        yield LinearShape("lm_head", self.vocab, self.hidden)

    def layer_tensors(self, index: int) -> dict[str, tuple[int, ...]]:
        """Canonical name and shape of every unquantized tensor of layer `index`."""
        layer, p = self.layers[index], f"layers.{index}"
        shapes: dict[str, tuple[int, ...]] = {f"{p}.pre_attn.weight": (self.hidden,)}
        for linear in self.layer_linears(index):
            shapes[f"{linear.name}.weight"] = (linear.out_features, linear.in_features)
            if linear.bias:
                shapes[f"{linear.name}.bias"] = (linear.out_features,)
        if layer.attention.qk_norm:
            shapes[f"{p}.attn.q_norm.weight"] = (layer.attention.head_dim,)
            shapes[f"{p}.attn.k_norm.weight"] = (layer.attention.head_dim,)
        shapes[f"{p}.pre_mlp.weight"] = (self.hidden,)
        if isinstance(layer.mlp, MoE):
            shapes[f"{p}.mlp.router.weight"] = (layer.mlp.experts, self.hidden)
        return shapes

    def routers(self) -> list[str]:
        """Canonical names of the routers: linear in the files' own words, but not for rounding."""
        return [f"layers.{i}.mlp.router" for i, layer in enumerate(self.layers) if isinstance(layer.mlp, MoE)]

    def outer_tensors(self) -> dict[str, tuple[int, ...]]:
        """Canonical name and shape of every tensor that belongs to no layer."""
        shapes = {"embed.weight": (self.vocab, self.hidden), "final_norm.weight": (self.hidden,)}
        return shapes if self.tied else shapes | {"lm_head.weight": (self.vocab, self.hidden)}

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Canonical name and shape of every tensor, in the order in which a forward pass needs them."""
        outer = self.outer_tensors()
        shapes = {"embed.weight": outer.pop("embed.weight")}
        for index in range(len(self.layers)):
            shapes |= self.layer_tensors(index)
        return shapes | outer

    @property
    def parameters(self) -> int:
        """Number of weights, a tied head counted once."""
        total = 0
        for shape in self.tensors().values():
            count = 1
            for size in shape:
                count *= size
            total += count
        return total
