"""Recipes: read strictly, resolved before any weight is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from fewbit.compress import built_in, group_name, read_recipe, summary
from fewbit.compress.recipe import Source, parse_recipe
from fewbit.compress.techniques import awq, gptq, scale_search, smoothquant
from fewbit.errors import RecipeError, UnsupportedError
from fewbit.numerics.format import FORMATS
from fewbit.numerics.quantspec import KVSpec, QuantSpec
from fewbit.spec.families import families
from fewbit.spec.hfconfig import HFConfig

LLAMA = families()["llama"]
SPEC = LLAMA.read(HFConfig(LLAMA.TINY))
LEAVES = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")
LINEARS = {f"layers.{i}.{leaf}" for i in range(2) for leaf in LEAVES}
F = FORMATS
MEANT = {
    "fp8": QuantSpec(F["fp8"], F["fp8"], "static"),
    "fp8_dynamic": QuantSpec(F["fp8_row"], F["fp8_row"]),
    "int8": QuantSpec(F["int8_row"], F["int8_row"]),
    "int8_wo": QuantSpec(F["int8_row"]),
    "int4": QuantSpec(F["int4_g128"]),
    "w4a8": QuantSpec(F["int4_g128"], F["fp8_row"]),
    "nvfp4": QuantSpec(F["nvfp4"], F["nvfp4"], "outer"),
    "nvfp4_wo": QuantSpec(F["nvfp4"]),
    "mxfp4": QuantSpec(F["mxfp4"], F["mxfp4"]),
    "mxfp4_wo": QuantSpec(F["mxfp4"]),
    "int8_sq": QuantSpec(F["int8_row"], F["int8_row"]),
    "int8_sq_static": QuantSpec(F["int8_row"], F["int8"], "static"),
    "int4_awq": QuantSpec(F["int4_g128"]),
    "int4_awq_asym": QuantSpec(F["int4_g128_asym"]),
    "int4_gptq": QuantSpec(F["int4_g128"]),
    "w4a8_awq": QuantSpec(F["int4_g128"], F["fp8_row"]),
    "w4a8_awq_static": QuantSpec(F["int4_g128"], F["fp8"], "static"),
    "nvfp4_awq": QuantSpec(F["nvfp4"], F["nvfp4"], "outer"),
}
SMOOTHED = (smoothquant.Settings(alpha=0.8), gptq.Settings())
TECHNIQUES = {
    "int8_sq": (smoothquant.Settings(inputs="norms"), gptq.Settings()),
    "int8_sq_static": SMOOTHED,
    "int4_gptq": (awq.Settings(clip=False), gptq.Settings()),
}
TECHNIQUES |= dict.fromkeys(("int4_awq", "int4_awq_asym", "w4a8_awq", "w4a8_awq_static"), (awq.Settings(),))
TECHNIQUES["nvfp4_awq"] = (awq.Settings(), scale_search.Settings())


def rules(*lines: str, more: str = "") -> str:
    return "rules:\n" + "".join(f"  - {{{line}}}\n" for line in lines) + more


def test_every_built_in_is_known_here():
    assert built_in().keys() == MEANT.keys() | {"auto", "nvfp4_svd"}  # see test_auto.py, test_svdquant.py
    assert all(text.endswith((".", "data.")) and not text.startswith("#") for text in built_in().values())


@pytest.mark.parametrize("name", MEANT)
def test_built_in_recipes(name):
    recipe = read_recipe(name)
    decided = recipe.resolve(SPEC)
    assert decided == dict.fromkeys(LINEARS, MEANT[name])
    assert (recipe.name, recipe.kv, recipe.techniques) == (name, None, TECHNIQUES.get(name, ()))
    assert (recipe.calibration.samples, recipe.calibration.length, recipe.calibration.data) == (32, 512, ())
    assert recipe.with_kv("int8").kv == KVSpec(F["int8"], F["int8"])
    assert recipe.with_kv(None) == recipe


@pytest.mark.parametrize("name", MEANT)
@pytest.mark.parametrize("family", families())
def test_built_in_recipes_fit_every_family(name, family):
    kind = families()[family]
    spec = kind.read(HFConfig(kind.TINY))
    assert read_recipe(name).resolve(spec).keys() == {n.name for n in spec.linears()} - {"lm_head"}


def test_the_first_rule_that_matches_decides():
    text = rules(
        'match: "layers.1.mlp.down", weight: none',
        'match: "*.mlp.down", weight: fp8_row',
        'match: "layers.*.attn.[qk]", weight: int4_g32',
        'match: "layers.*", weight: int8_row, input: int8_row',
        "match: lm_head, weight: fp8",
    )
    decided = parse_recipe("own", text).resolve(SPEC)
    assert decided.keys() == LINEARS - {"layers.1.mlp.down"} | {"lm_head"}
    assert str(decided["layers.0.mlp.down"]) == "fp8_row weights"
    assert str(decided["layers.1.attn.k"]) == "int4_g32 weights"
    assert str(decided["layers.1.attn.v"]) == "int8_row weights, int8_row inputs (dynamic)"
    assert str(decided["lm_head"]) == "fp8 weights"
    groups = dict(summary(decided, SPEC))
    assert groups["layers.*.mlp.down"] in ("fp8_row weights", "as it was")
    assert group_name("layers.13.attn.q") == "layers.*.attn.q"
    assert group_name("layers.3.mlp.experts.12.up") == "layers.*.mlp.experts.*.up"
    assert group_name("lm_head") == "lm_head"


def test_everything_a_recipe_can_say(tmp_path):
    (tmp_path / "whole.yaml").write_text(
        rules('match: "*", weight: fp8, input: fp8, input_scale: static')
        + "kv: {format: fp8, scale: static}\ntechniques:\n  - round_to_nearest: {}\n"
        + "calib: {samples: 3, length: 9, data: a.txt}\n"
    )
    recipe = read_recipe(str(tmp_path / "whole.yaml"))
    assert recipe.name == "whole"
    assert recipe.kv == KVSpec(F["fp8"], F["fp8"])
    assert [type(t).__module__ for t in recipe.techniques] == ["fewbit.compress.techniques.round_to_nearest"]
    assert (recipe.calibration.samples, recipe.calibration.length, recipe.calibration.data) == (
        3,
        9,
        (Source(Path("a.txt")),),
    )
    assert recipe.resolve(SPEC).keys() == LINEARS | {"lm_head"}


ANY = 'match: "*", weight: int8_row'
BAD = {
    "rules: [": "recipe own is not YAML: ",
    "a: 1\na: 2": "key 'a' stands twice, line 1",
    "": "own: expected keys (rules, kv, techniques, calib), got None",
    "[1]": "own: expected keys (rules, kv, techniques, calib), got [1]",
    "rule: []": "own: unknown key 'rule'; did you mean 'rules'?",
    "rules: []": "recipe own has neither rules nor kv: it would change nothing",
    "rules: 3": "own: rules: expected a list, got 3",
    rules("match: a"): "own: rules[0]: needs 'match' (a pattern) and 'weight' (a format, or none)",
    rules("weight: int8"): "own: rules[0]: needs 'match'",
    rules("match: 3, weight: int8"): "own: rules[0]: needs 'match'",
    rules(ANY, "match: a, wieght: int8"): "own: rules[1]: unknown key 'wieght'; did you mean 'weight'?",
    rules(
        "match: a, weight: int8row"
    ): "own: rules[0]: weight: unknown numeric format 'int8row'; did you mean 'int8_row'?",
    rules("match: a, weight: 8"): "own: rules[0]: weight: expected the name of a format or none, got 8",
    rules("match: a, weight: int8, input: int7"): "own: rules[0]: input: unknown numeric format 'int7'",
    rules("match: a, weight: none, input: int8_row"): "own: rules[0]: an input format needs a weight format",
    rules("match: a, weight: fp8, input_scale: static"): "own: rules[0]: input_scale static without an input format",
    rules(
        "match: a, weight: fp8, input: fp8, input_scale: fixed"
    ): "own: rules[0]: input_scale is 'fixed'; known: dynamic",
    rules("match: a, weight: fp8, input: fp8"): "fp8 inputs need input_scale: static (one scale for all tokens)",
    rules("match: a, weight: fp8, input: fp8_row, input_scale: static"): (
        "fp8_row inputs need input_scale: dynamic (a scale for each token)"
    ),
    rules("match: a, weight: nvfp4, input: nvfp4"): "nvfp4 inputs need input_scale: outer",
    rules("match: a, weight: fp8, input: fp8, input_scale: outer"): "fp8 inputs need input_scale: static or dynamic",
    rules("match: a, weight: fp8, input: fp8_block"): "inputs cannot be fp8_block",
    rules("match: a, weight: int8, input: int4_g32_asym"): "inputs cannot be int4_g32_asym",
    "kv: {format: int2}": "own: kv: K and V format 'int2' is unknown; known: fp8, int8, int4, fp8_head",
    "kv: {format: [fp8]}": "own: kv: K and V format ['fp8'] is unknown; known: fp8, int8",
    "kv: fp8": "own: kv: expected keys (format, scale), got 'fp8'",
    "kv: {format: fp8, scale: dynamic}": "own: kv: scale 'dynamic' is unknown; known: static",
    "kv: {formt: fp8}": "own: kv: unknown key 'formt'; did you mean 'format'?",
    rules(ANY, more="techniques: [awk: {}]"): "own: techniques[0]: unknown technique 'awk'; did you mean 'awq'?",
    rules(ANY, more="techniques: [round_to_nearst: {}]"): "did you mean 'round_to_nearest'?",
    rules(ANY, more="techniques: [round_to_nearest]"): "own: techniques[0]: expected one name with its settings",
    rules(ANY, more="techniques: [round_to_nearest: {bits: 4}]"): (
        "own: techniques[0]: round_to_nearest: unknown setting 'bits'; it has none"
    ),
    rules(ANY, more="techniques: [round_to_nearest: 4]"): "round_to_nearest: expected settings as keys, got 4",
    rules(ANY, more="techniques: round_to_nearest"): "expected a list, got 'round_to_nearest'",
    rules(ANY, more="calib: {sample: 3}"): "own: calib: unknown key 'sample'; did you mean 'samples'?",
    rules(ANY, more="calib: {samples: 0}"): "own: calib: samples is 0, expected a whole number of at least 1",
    rules(ANY, more="calib: {length: many}"): "own: calib: length is 'many', expected a whole number of at least 1",
    rules(ANY, more="calib: {samples: true}"): "own: calib: samples is True",
    rules(ANY, more="calib: {data: 'a.txt:0'}"): "own: calib: data: the share of a.txt is 0, expected a number above 0",
    rules(ANY, more="calib: {data: [3]}"): "own: calib: data is 3, expected FILE or FILE:SHARE",
    rules(ANY, more="calib: {seed: -1}"): "own: calib: seed is -1, expected a whole number of at least 0",
    rules(ANY, more="calib: 5"): "own: calib: expected keys (samples, length, data, seed, method, percentile), got 5",
}


def test_data_with_shares():
    text = "rules: [{match: '*', weight: int8_row}]\ncalib: {data: [a.txt:0.7, 'c:/b.txt:3', c.txt], seed: 4}"
    c = parse_recipe("own", text).calibration
    assert c.data == (Source(Path("a.txt"), 0.7), Source(Path("c:/b.txt"), 3.0), Source(Path("c.txt"), 1.0))
    assert c.seed == 4


@pytest.mark.parametrize("text", BAD)
def test_a_recipe_that_is_wrong_names_the_place(text):
    with pytest.raises(RecipeError) as e:
        parse_recipe("own", text)
    assert BAD[text] in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (
            [ANY, 'match: "layers.*", weight: fp8'],
            "rules[1] 'layers.*' decides nothing: earlier rules match all of its",
        ),
        ([ANY, 'match: "layers.9.*", weight: fp8'], "rules[1] 'layers.9.*' matches no layer; "),
        (
            ['match: "layers.0.atn.q", weight: fp8'],
            "rules[0] 'layers.0.atn.q' matches no layer; did you mean 'layers.0.attn.q'?",
        ),
        (['match: "model.layers.*", weight: fp8'], "matches no layer"),
        (['match: "LAYERS.*", weight: fp8'], "matches no layer"),
    ],
)
def test_a_rule_that_decides_nothing_is_an_error(lines, words):
    with pytest.raises(RecipeError) as e:
        parse_recipe("own", rules(*lines)).resolve(SPEC)
    assert words in str(e.value)


def test_a_rule_that_leaves_layers_alone_is_no_idle_rule():
    text = rules('match: "layers.0.*", weight: none', 'match: "layers.*", weight: fp8')
    assert parse_recipe("own", text).resolve(SPEC).keys() == {n for n in LINEARS if n.startswith("layers.1.")}


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("weight: int4_g128", "layers.0.mlp.down: 96 columns do not divide into blocks of 128 (int4_g128)"),
        ("weight: nvfp4", None),
        ("weight: int8_row, input: mxfp8", None),
        ("weight: int8_g64", "layers.0.mlp.down: 96 columns do not divide into blocks of 64 (int8_g64)"),
        (
            "weight: fp8_row, input: int8_g64",
            "layers.0.mlp.down: 96 columns do not divide into blocks of 64 (int8_g64)",
        ),
        ("weight: fp8_block", None),  # float blocks may be ragged at the edge
    ],
)
def test_widths_are_looked_at_before_any_weight(rule, words):
    spec = LLAMA.read(HFConfig({**LLAMA.TINY, "intermediate_size": 96}))
    recipe = parse_recipe("own", rules(f'match: "layers.*", {rule}'))
    if words is None:
        assert recipe.resolve(spec).keys() == LINEARS
        return
    with pytest.raises(UnsupportedError) as e:
        recipe.resolve(spec)
    assert str(e.value).startswith(f"{words}; give this layer a format with smaller groups")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("int44", "unknown recipe 'int44'; did you mean 'int4'? (a file's name ends in .yaml)"),
        ("gone.yaml", "recipe gone.yaml cannot be read: "),
        ("folder/int4", "recipe folder/int4 cannot be read: "),
    ],
)
def test_a_recipe_that_is_not_there(name, words):
    with pytest.raises(RecipeError) as e:
        read_recipe(name)
    assert words in str(e.value)


def test_a_recipe_that_is_no_text(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot be read"):
        read_recipe(str(tmp_path / "a.yaml"))
    with pytest.raises(RecipeError, match="cannot be read"):
        read_recipe(f"{tmp_path}/")
