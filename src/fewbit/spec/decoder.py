"""What a decoder-only language model is, as data. There is no torch in here, and no family."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Norm:
    """``x / sqrt(mean(x**2) + eps) * weight``, of ``x - mean(x)`` where it is ``layer``."""

    eps: float
    kind: Literal["rms", "layer"] = "rms"
    bias: bool = False  # added at the end
    plus_one: bool = False  # stored as w, multiplied by 1 + w


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
    truncate: bool = True  # the ramp's ends are rounded to whole pairs


@dataclass(frozen=True)
class LongScaling:
    """LongRoPE (arXiv:2402.13753): each pair is slowed by a factor of its own, attention sharpened."""

    factors: tuple[float, ...]
    attention_factor: float


@dataclass(frozen=True)
class Rope:
    """Rotary positions: pairs of a head's channels are turned."""

    theta: float
    scaling: Llama3Scaling | LinearScaling | YarnScaling | LongScaling | None = None
    fraction: float = 1.0  # how much of each head is turned, its first channels
    interleaved: bool = False  # pairs are neighbours (0, 1), (2, 3), not (0, D/2), (1, D/2 + 1)

    def width(self, head_dim: int) -> int:
        """Channels of a head that are turned."""
        return int(head_dim * self.fraction)


@dataclass(frozen=True)
class Alibi:
    """Linear biases (arXiv:2108.12409): what lies n tokens back counts ``slope * n`` less, a slope for each head."""

    max_bias: float = 8.0  # the last of 2^n heads has the slope 2^-max_bias
    scaled: bool = False  # added before the scores are scaled, rounded to bfloat16 (Falcon-RW)


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention: query head h reads key/value head ``h // (heads // kv_heads)``."""

    heads: int
    kv_heads: int
    head_dim: int
    position: Rope | Alibi | None  # None: none, or learned ones that the embedding adds
    window: int | None = None  # a token sees itself and the window - 1 tokens before it
    qk_norm: Norm | None = None  # before the rotation, over head_dim
    qk_norm_all: bool = False  # over all heads of q, and all of k, together
    qkv_bias: bool = False
    o_bias: bool = False
    multiplier: float | None = None  # what q·k is multiplied by, if not head_dim ** -0.5
    softcap: float | None = None  # scores s become softcap * tanh(s / softcap)
    sinks: bool = False  # each head has one more score that takes part in the softmax and nothing else

    @property
    def scale(self) -> float:
        """What q·k is multiplied by before the softmax."""
        return float(self.head_dim**-0.5) if self.multiplier is None else self.multiplier

    @property
    def rope(self) -> Rope:
        """Its position, of one that is known to turn pairs."""
        assert isinstance(self.position, Rope)
        return self.position


@dataclass(frozen=True)
class MLP:
    """``down(act(gate(x)) * up(x))``, or ``down(act(up(x)))`` where it is not gated.

    With a `limit` (gpt-oss) gate is cut off above it and up on both sides, and one is added to up.
    """

    width: int
    act: str = "silu"
    bias: bool = False
    gated: bool = True
    limit: float | None = None


@dataclass(frozen=True)
class MoE:
    """A mixture of experts: each token goes through the `top_k` MLPs to which a router gives the highest scores.

    The router's logits become scores by a softmax over all experts; the results are added, weighted by them.
    """

    experts: int
    top_k: int
    expert: MLP
    renormalize: bool = True  # the chosen scores are divided by their sum
    router_bias: bool = False
    shared: MLP | None = None  # one more, through which every token goes
    shared_gate: bool = False  # what it makes is multiplied by sigmoid(gate(x))

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
    """``x + post(attention(pre(x)))``, then ``x + post(mlp(pre(x)))``; a norm that is None changes nothing.

    Parallel: ``x + attention(pre_attn(x)) + mlp(pre_mlp(x))``, where a missing `pre_mlp` means `pre_attn` for both.
    """

    attention: Attention
    mlp: MLP | MoE
    pre_attn: Norm | None
    pre_mlp: Norm | None
    post_attn: Norm | None = None
    post_mlp: Norm | None = None
    parallel: bool = False

    @property
    def norms(self) -> dict[str, Norm]:
        """Its norms over the residual stream by canonical name."""
        found = {"pre_attn": self.pre_attn, "post_attn": self.post_attn, "pre_mlp": self.pre_mlp}
        return {name: norm for name, norm in (found | {"post_mlp": self.post_mlp}).items() if norm}

    @property
    def one_input(self) -> bool:
        """Whether attention and MLP read the same normalized input."""
        return self.parallel and self.pre_mlp is None

    def mlps(self, index: int) -> dict[str, MLP]:
        """Its MLPs as layer `index` by canonical name: ``layers.3.mlp``, or one for each expert, then the shared."""
        name = f"layers.{index}.mlp"
        if isinstance(self.mlp, MLP):
            return {name: self.mlp}
        found = {f"{name}.experts.{e}": self.mlp.expert for e in range(self.mlp.experts)}
        return found | ({f"{name}.shared": self.mlp.shared} if self.mlp.shared else {})


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


def key_of(tensor: str) -> str:
    """What a tensor of a layer that is no linear's is called there: ``pre_attn``, ``pre_attn.bias``, ``router``."""
    rest = tensor.split(".", 2)[2]
    return rest.removeprefix("attn.").removeprefix("mlp.").removesuffix(".weight")


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


def _norm_tensors(name: str, norm: Norm, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.{leaf}": (width,) for leaf in ("weight", "bias")[: 2 if norm.bias else 1]}


@dataclass(frozen=True)
class DecoderSpec:
    """A whole decoder. Layers are a tuple: alternating windows or uneven widths are just another spec."""

    vocab: int
    hidden: int
    layers: tuple[Layer, ...]
    final_norm: Norm
    tied: bool = False  # lm_head is the embedding
    context: int = 2048  # longest sequence the positions were made for
    learned_positions: int = 0  # rows of a table that is added to the embedding, by position
    embed_scale: float = 1.0
    logit_softcap: float | None = None  # logits x become softcap * tanh(x / softcap)
    unit_head: bool = False  # rows of a head that is not quantized are divided by their length

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
            gate_up = qkv if layer.one_input else f"{name}.gate_up"
            if m.gated:
                found.append(LinearShape(f"{name}.gate", m.width, h, m.bias, gate_up))
            found.append(LinearShape(f"{name}.up", m.width, h, m.bias, gate_up))
            found.append(LinearShape(f"{name}.down", h, m.width, m.bias))
        return tuple(found)

    def linears(self) -> Iterator[LinearShape]:
        """Every linear of the model, layer by layer, ``lm_head`` last."""
        for index in range(len(self.layers)):
            yield from self.layer_linears(index)
        yield LinearShape("lm_head", self.vocab, self.hidden)

    def layer_vectors(self, index: int) -> dict[str, tuple[int, ...]]:
        """Canonical name and shape of what layer `index` has beside its linears: norms, routers, sinks."""
        layer, p = self.layers[index], f"layers.{index}"
        a, m = layer.attention, layer.mlp
        shapes: dict[str, tuple[int, ...]] = {}
        around = {f"{p}.{name}": _norm_tensors(f"{p}.{name}", norm, self.hidden) for name, norm in layer.norms.items()}
        shapes |= around.pop(f"{p}.pre_attn", {})
        if a.qk_norm:
            q, k = (a.heads, a.kv_heads) if a.qk_norm_all else (1, 1)
            shapes |= _norm_tensors(f"{p}.attn.q_norm", a.qk_norm, q * a.head_dim)
            shapes |= _norm_tensors(f"{p}.attn.k_norm", a.qk_norm, k * a.head_dim)
        if a.sinks:
            shapes[f"{p}.attn.sinks"] = (a.heads,)
        for tensors in around.values():
            shapes |= tensors
        if isinstance(m, MoE):
            shapes[f"{p}.mlp.router.weight"] = (m.experts, self.hidden)
            if m.router_bias:
                shapes[f"{p}.mlp.router.bias"] = (m.experts,)
            if m.shared_gate:
                shapes[f"{p}.mlp.shared_gate.weight"] = (1, self.hidden)
        return shapes

    def layer_tensors(self, index: int) -> dict[str, tuple[int, ...]]:
        """Canonical name and shape of every unquantized tensor of layer `index`."""
        vectors = self.layer_vectors(index)
        shapes = {name: shape for name, shape in vectors.items() if ".pre_attn." in name}
        for linear in self.layer_linears(index):
            shapes[f"{linear.name}.weight"] = (linear.out_features, linear.in_features)
            if linear.bias:
                shapes[f"{linear.name}.bias"] = (linear.out_features,)
        return shapes | vectors

    def routers(self) -> list[str]:
        """Canonical names of the routers: linear in the files' own words, but not for rounding."""
        mixtures = {f"layers.{i}.mlp": layer.mlp for i, layer in enumerate(self.layers) if isinstance(layer.mlp, MoE)}
        gates = [f"{name}.shared_gate" for name, m in mixtures.items() if m.shared_gate]
        return [f"{name}.router" for name in mixtures] + gates

    def outer_tensors(self) -> dict[str, tuple[int, ...]]:
        """Canonical name and shape of every tensor that belongs to no layer."""
        shapes: dict[str, tuple[int, ...]] = {"embed.weight": (self.vocab, self.hidden)}
        if self.learned_positions:
            shapes["positions.weight"] = (self.learned_positions, self.hidden)
        shapes |= _norm_tensors("final_norm", self.final_norm, self.hidden)
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
