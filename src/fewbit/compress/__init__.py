"""Make it small: recipes, the block loop, techniques."""

from fewbit.compress.decide import Decision, decide
from fewbit.compress.plan import Plan, Report, dialect, plan
from fewbit.compress.recipe import Recipe, built_in, group_name, read_recipe, summary
from fewbit.compress.run import compress
from fewbit.compress.verify import Verified, bits_per_weight, layer_bits, verify

__all__ = [
    "Decision",
    "Plan",
    "Recipe",
    "Report",
    "Verified",
    "bits_per_weight",
    "built_in",
    "compress",
    "decide",
    "dialect",
    "group_name",
    "layer_bits",
    "plan",
    "read_recipe",
    "summary",
    "verify",
]
