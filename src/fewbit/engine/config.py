"""The engine's settings: options in, one resolved value out, with no "auto" left in it. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints

from fewbit.errors import RecipeError
from fewbit.spec.decoder import DecoderSpec

Policy = Literal["max_utilization", "guaranteed_no_evict", "guaranteed_completion"]
"""The last two are one; `EngineOptions` calls it by the first of its names."""
STEP_TOKENS = {"cpu": 512, "cuda": 8192}
"""Tokens of prompts that a step takes where nothing else is said."""

_TYPES = {str: "a string", int: "an integer", float: "a number", bool: "True or False", type(None): "None"}


@dataclass(frozen=True)
class EngineOptions:
    """What a user may set. None: decided by `resolve` from the model, the device and its free memory.

    Attributes:
        device: ``cpu``, ``cuda:N``, or ``auto`` for a GPU if there is one.
        backend: which kernels, see `fewbit.model.load`.
        block_size: tokens of a K/V block; None: 64 on a GPU, where a block is a tile of its kernels, else 16.
        num_blocks, kv_bytes, kv_fraction: size of the K/V cache in blocks, in bytes, or as a fraction of the memory
            that is free once the weights are loaded; at most one of them.
        max_batch: sequences that run at the same time.
        max_batch_tokens: tokens computed in one step: every running sequence's next one, then prefill chunks.
        max_model_len: longest sequence, prompt and output together.
        prefix_cache: whether K and V of a known prefix are used again.
        policy: ``max_utilization`` starts a request as soon as its prompt fits and, when blocks run out, puts the
            youngest of the lowest priority back and computes it again later; ``guaranteed_no_evict`` starts one only
            when its whole possible length fits, and never interrupts it (``guaranteed_completion``: the same).
        max_queued: requests that may wait; more are refused.
        max_queued_tokens: tokens of prompts that may wait; a request that would make them more is refused, unless
            nobody waits.
        seed: from which the seeds of requests without one are made; None: from the system.
    """

    device: str = "cpu"
    backend: str = "auto"
    block_size: int | None = None
    num_blocks: int | None = None
    kv_bytes: int | None = None
    kv_fraction: float | None = None
    max_batch: int | None = None
    max_batch_tokens: int | None = None
    max_model_len: int | None = None
    prefix_cache: bool = True
    policy: Policy = "max_utilization"
    max_queued: int = 1024
    max_queued_tokens: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        """Take the one name of the policy that has two.

        Raises:
            RecipeError: An option is of the wrong type.
        """
        for name, kind in get_type_hints(EngineOptions).items():
            _check_type(name, getattr(self, name), (str,) if kind is Policy else get_args(kind) or (kind,))
        if self.policy == "guaranteed_completion":
            object.__setattr__(self, "policy", "guaranteed_no_evict")


@dataclass(frozen=True)
class EngineConfig:
    """What the engine does; see `EngineOptions`."""

    device: str
    block_size: int
    num_blocks: int
    token_bytes: int  # of K and V of one token, all layers
    max_batch: int
    max_batch_tokens: int
    max_model_len: int
    prefix_cache: bool
    policy: Policy
    max_queued: int
    seed: int | None
    vocab: int
    eos_token_ids: tuple[int, ...] = ()
    max_queued_tokens: int | None = None

    @property
    def capacity(self) -> int:
        """Tokens the K/V cache holds."""
        return self.num_blocks * self.block_size


def resolve(
    options: EngineOptions,
    *,
    spec: DecoderSpec,
    token_bytes: int,
    free_bytes: int,
    step_bytes: int = 0,
    eos_token_ids: tuple[int, ...] = (),
) -> EngineConfig:
    """Decide everything that `options` left open.

    Args:
        options: the user's.
        spec: the model.
        token_bytes: bytes of K and V of one token, all layers together, as the cache stores them.
        free_bytes: memory of the device that is free now, with the weights loaded.
        step_bytes: how much of that the largest step needs.
        eos_token_ids: the ids with which the model ends a text.

    Raises:
        RecipeError: a setting is out of range, contradicts another, or leaves no room for a sequence.
    """
    gpu = options.device != "cpu"
    block_size = options.block_size if options.block_size is not None else (64 if gpu else 16)
    max_batch, budget = limits(options)
    _check_ranges(options, max_batch, budget, spec)
    wanted = options.max_model_len if options.max_model_len is not None else spec.context
    num_blocks, how = _num_blocks(options, block_size, wanted * max_batch, token_bytes, free_bytes, step_bytes)
    capacity = num_blocks * block_size
    # the last token of a sequence is never stored: nothing comes after it
    if capacity < 1 or (options.max_model_len is not None and wanted - 1 > capacity):
        least = -(-(wanted - 1) // block_size) * block_size * token_bytes
        raise RecipeError(
            f"the K/V cache holds {num_blocks} blocks of {block_size} = {capacity} tokens ({how}, "
            f"{token_bytes} bytes a token), not one sequence of {wanted}; give it at least {least} bytes (kv_bytes) or "
            f"lower max_model_len"
        )
    return EngineConfig(
        device=options.device,
        block_size=block_size,
        num_blocks=num_blocks,
        token_bytes=token_bytes,
        max_batch=max_batch,
        max_batch_tokens=budget,
        max_model_len=min(wanted, capacity + 1),
        prefix_cache=options.prefix_cache,
        policy=options.policy,
        max_queued=options.max_queued,
        seed=options.seed,
        vocab=spec.vocab,
        eos_token_ids=eos_token_ids,
        max_queued_tokens=options.max_queued_tokens,
    )


def limits(options: EngineOptions) -> tuple[int, int]:
    """Most sequences, and most tokens, of a step."""
    gpu = options.device != "cpu"
    max_batch = options.max_batch if options.max_batch is not None else (256 if gpu else 32)
    budget = options.max_batch_tokens
    if budget is None:
        budget = STEP_TOKENS["cuda"] + max_batch if gpu else max(STEP_TOKENS["cpu"], max_batch)
    return max_batch, budget


def _check_type(name: str, value: object, kinds: tuple[type, ...]) -> None:
    if type(value) not in kinds and not (float in kinds and type(value) is int):  # True is no number here
        expected = " or ".join(_TYPES[kind] for kind in kinds)
        raise RecipeError(f"{name} must be {expected}, got {value!r}")


def _check_ranges(options: EngineOptions, max_batch: int, budget: int, spec: DecoderSpec) -> None:
    for name, value in (
        ("block_size", options.block_size),
        ("num_blocks", options.num_blocks),
        ("kv_bytes", options.kv_bytes),
        ("max_batch", max_batch),
        ("max_batch_tokens", budget),
        ("max_queued", options.max_queued),
        ("max_queued_tokens", options.max_queued_tokens),
    ):
        if value is not None and value < 1:
            raise RecipeError(f"{name} must be at least 1, got {value}")
    if options.max_model_len is not None and options.max_model_len < 2:
        raise RecipeError(f"max_model_len must be at least 2 (a prompt and an answer), got {options.max_model_len}")
    if options.kv_fraction is not None and not 0 < options.kv_fraction <= 1:
        raise RecipeError(f"kv_fraction must lie in (0, 1], got {options.kv_fraction}")
    if options.policy not in get_args(Policy):
        raise RecipeError(f"policy must be one of {', '.join(get_args(Policy))}, got '{options.policy}'")
    sizes = [n for n in ("num_blocks", "kv_bytes", "kv_fraction") if getattr(options, n) is not None]
    if len(sizes) > 1:
        raise RecipeError(f"the size of the K/V cache is given {len(sizes)} times ({', '.join(sizes)}); keep one")
    if budget < max_batch:
        raise RecipeError(
            f"max_batch_tokens {budget} is less than max_batch {max_batch}, so not every running sequence could get "
            f"its next token in a step; raise it to at least {max_batch}"
        )
    if options.max_model_len is not None and options.max_model_len > spec.context:
        raise RecipeError(
            f"max_model_len {options.max_model_len} exceeds the {spec.context} positions the model was made for"
        )


_FLAG = "--kv-blocks on the command line"


def _num_blocks(
    options: EngineOptions, block_size: int, useful_tokens: int, token_bytes: int, free_bytes: int, step_bytes: int
) -> tuple[int, str]:
    """Number of blocks, and where it comes from in words."""
    if options.num_blocks is not None:
        need = options.num_blocks * block_size * token_bytes
        if need > free_bytes:
            raise RecipeError(
                f"num_blocks {options.num_blocks} x {block_size} tokens x {token_bytes} bytes = {need} bytes, "
                f"but only {free_bytes} are free on {options.device}; lower num_blocks ({_FLAG})"
            )
        return options.num_blocks, f"num_blocks, {_FLAG}"
    block_bytes = block_size * token_bytes
    if options.kv_bytes is not None:
        if options.kv_bytes > free_bytes:
            raise RecipeError(f"kv_bytes {options.kv_bytes} exceeds the {free_bytes} bytes free on {options.device}")
        return options.kv_bytes // block_bytes, f"kv_bytes {options.kv_bytes}"
    if options.kv_fraction is not None:
        size = int(free_bytes * options.kv_fraction)
        return size // block_bytes, f"{options.kv_fraction} of {free_bytes} free bytes"
    # Decided here: no more than max_batch sequences of full length can ever use, and leave memory for activations and,
    # on a CPU, for everybody else.
    fraction = 0.5 if options.device == "cpu" else 0.9
    size = min(int(free_bytes * fraction), max(free_bytes - step_bytes, 0))
    useful_blocks = -(-useful_tokens // block_size)
    return min(useful_blocks, size // block_bytes), f"{fraction} of {free_bytes} free bytes"
