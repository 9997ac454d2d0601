"""Attention over keys and values in a row. `reference` is the only implementation so far."""

from fewbit.ops.attention.reference import KEYS, attention

__all__ = ["KEYS", "attention"]
