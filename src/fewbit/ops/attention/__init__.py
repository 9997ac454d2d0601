"""Attention over keys and values in a row: `reference` in torch; over pages in `decode` (GPUs) and `cpu`."""

from fewbit.ops.attention.reference import KEYS, attention

__all__ = ["KEYS", "attention"]
