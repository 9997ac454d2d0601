"""Rounding weights where it is hot: the search of scales, and columns one after another."""

from fewbit.ops.rounding.rounding import choose_scale, quantize, round_columns

__all__ = ["choose_scale", "quantize", "round_columns"]
