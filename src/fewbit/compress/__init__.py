"""Make it small: recipes, the block loop, techniques."""

from fewbit.compress.recipe import Recipe, built_in, read_recipe, summary
from fewbit.compress.run import Plan, Report, compress, plan
from fewbit.compress.verify import Verified, bits_per_weight, verify

__all__ = [
    "Plan",
    "Recipe",
    "Report",
    "Verified",
    "bits_per_weight",
    "built_in",
    "compress",
    "plan",
    "read_recipe",
    "summary",
    "verify",
]
