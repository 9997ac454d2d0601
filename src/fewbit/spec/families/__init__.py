"""Families: one file each, found by looking into this folder.

A family's module holds ``ARCHITECTURES`` (names in config.json), ``read`` (config.json to `DecoderSpec`), ``write``
(the way back), ``NAMES`` (canonical module to the checkpoint's or a `Part`, ``{i}`` for the layer, ``{e}`` for the
expert), ``DROPPED`` (patterns of tensors it knowingly does not use) and ``TINY`` (a config.json for tests). Where
models of a family differ in their names it has ``names`` too: what to change in ``NAMES`` for a spec; and ``PREFIX``:
what the names in some of its files lack.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any, Protocol, cast

from fewbit.errors import CheckpointError, UnsupportedError, nearest_name
from fewbit.spec.decoder import DecoderSpec
from fewbit.spec.hfconfig import HFConfig
from fewbit.spec.part import Part

UNSUPPORTED = {
    "Llama4ForCausalLM": "its attention in chunks with a temperature by position, nor experts whose input is scaled",
    "Llama4ForConditionalGeneration": "the attention and the experts of Llama 4, nor images",
    "NemotronHForCausalLM": "its Mamba layers between those with attention",
    "DeepseekV2ForCausalLM": "its latent attention (MLA)",
    "DeepseekV3ForCausalLM": "its latent attention (MLA)",
    "Qwen3NextForCausalLM": "its layers with linear attention",
}
"""Architectures that a `DecoderSpec` cannot say, and what it is that it cannot."""


class Family(Protocol):
    """What a module of this folder offers."""

    ARCHITECTURES: tuple[str, ...]
    NAMES: Mapping[str, str | Part]
    DROPPED: tuple[str, ...]
    TINY: Mapping[str, Any]

    def read(self, config: HFConfig) -> DecoderSpec:
        """What the config.json describes."""
        ...

    def write(self, spec: DecoderSpec) -> dict[str, Any]:
        """A config.json that `read` turns into `spec` again."""
        ...


@functools.cache
def families() -> dict[str, Family]:
    """Every family by its file's name."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    return {name: cast("Family", importlib.import_module(f"{__name__}.{name}")) for name in names}


def family_of(config: Mapping[str, Any]) -> Family:
    """The family whose architecture a config.json names.

    Raises:
        CheckpointError: it names none.
        UnsupportedError: none of ours.
    """
    given = config.get("architectures")
    if not isinstance(given, list) or not given or not isinstance(given[0], str):
        raise CheckpointError(f"config.json: 'architectures' is {given!r}, expected a list with one name")
    known = {name: family for family in families().values() for name in family.ARCHITECTURES}
    if given[0] in UNSUPPORTED:
        raise UnsupportedError(f"architecture '{given[0]}' is not supported: nothing here runs {UNSUPPORTED[given[0]]}")
    if given[0] not in known:
        raise UnsupportedError(f"architecture '{given[0]}' is not supported; {nearest_name(given[0], known)}")
    return known[given[0]]
