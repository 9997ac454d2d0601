"""With which tokens a model ends a text, as its files say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources.abc import Traversable
from typing import Any

from fewbit.errors import CheckpointError


def eos_token_ids(config: Mapping[str, Any], generation_config: Traversable | None) -> tuple[int, ...]:
    """End-of-sequence ids: of generation_config.json, which knows a chat model's end of turn, else of config.json.

    Raises:
        CheckpointError: something else than an id or a list of ids stands there.
    """
    value, where = config.get("eos_token_id"), "config.json"
    if generation_config is not None:
        where = str(generation_config)
        try:
            given = json.loads(generation_config.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{where} cannot be read as JSON: {error}") from None
        if not isinstance(given, dict):
            raise CheckpointError(f"{where} must hold an object, got {type(given).__name__}")
        value = given.get("eos_token_id", value)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise CheckpointError(f"{where}: eos_token_id must be an id or a list of ids, got {value!r}")
    return tuple(dict.fromkeys(ids))
