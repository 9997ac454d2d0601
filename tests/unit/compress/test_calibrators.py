"""How far calibrated scales reach: histograms against the numbers themselves, searches against trying everything."""

from __future__ import annotations

import pytest
import torch

from fewbit.checkpoint import open_checkpoint
from fewbit.compress import compress, plan
from fewbit.compress.calibrators import Histogram
from fewbit.compress.ranks import Ranks
from fewbit.compress.recipe import parse_recipe, read_recipe
from fewbit.engine.config import EngineOptions
from fewbit.engine.engine import generate, open_engine
from fewbit.engine.types import GenerateRequest, SamplingParams
from fewbit.errors import RecipeError
from fewbit.numerics.format import FORMATS
from fewbit.numerics.reference import amax_scale
from helpers import ids, make_model

CPU = torch.device("cpu")
STATIC = ["fp8", "int8"]


def counted(x: torch.Tensor, rows: int = 1) -> Histogram:
    histogram = Histogram(rows, CPU)
    for piece in x.split(7):
        histogram.see(piece)
    return histogram


def with_outliers(seed: int, count: int = 20_000) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, generator=g)
    x[torch.randperm(count, generator=g)[:5]] *= 30
    return x.bfloat16().float()


@pytest.mark.parametrize("fmt", STATIC)
def test_max_and_percentile_are_those_of_the_numbers(fmt):
    x = with_outliers(0)
    x[:1000] = 0  # zeros do not count
    histogram = counted(x)
    assert int(histogram.counts.sum()) == len(x)
    assert histogram.reach(FORMATS[fmt], "max", 0).item() == x.abs().max()
    nonzero = x[x != 0].abs().sort().values
    for percentile in (50, 99, 99.99, 100):
        expected = nonzero[max(0, -(-len(nonzero) * percentile // 100).__int__() - 1)]
        assert histogram.reach(FORMATS[fmt], "percentile", percentile).item() == pytest.approx(expected.item())


@pytest.mark.parametrize("fmt", STATIC)
def test_mse_is_the_least_of_all_ranges(fmt):
    x, element = with_outliers(1), FORMATS[fmt].element

    def error(reach: torch.Tensor) -> float:
        scale = amax_scale(reach, FORMATS[fmt])
        return (element.decode(element.encode(x / scale)) * scale - x).double().square().sum().item()

    reach = counted(x).reach(FORMATS[fmt], "mse", 0)[0]
    tried = [error(x.abs().max() * f) for f in torch.linspace(1 / 8, 1, 1000)]
    assert error(reach) <= min(tried) * 1.01
    if fmt == "int8":  # whose steps are all alike: outliers are not worth them
        assert error(reach) < 0.95 * error(x.abs().max())
        assert reach < x.abs().max()


def test_entropy_cuts_a_long_tail_and_keeps_a_flat_one():
    flat = torch.rand(200_000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert counted(flat).reach(FORMATS["int8"], "entropy", 0).item() > 0.95
    tail = with_outliers(2, 200_000)
    assert counted(tail).reach(FORMATS["int8"], "entropy", 0).item() < 0.5 * tail.abs().max()


def test_rows_are_heads():
    x = torch.randn(50, 3, 16, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 10, 0])[:, None]
    reach = counted(x, 3).reach(FORMATS["fp8_row"], "max", 0)
    assert torch.equal(reach, x.bfloat16().float().abs().amax((0, 2)))  # nothing was seen of the last: 0


def test_no_order_and_no_cut_matters():
    x = with_outliers(3)
    whole = counted(x).counts
    assert torch.equal(whole, counted(x.flip(0)).counts)
    assert torch.equal(whole, counted(x[:5000]).counts + counted(x[5000:]).counts)


BASE = """
rules: [{match: "layers.*", weight: int8_row, input: int8, input_scale: static}]
kv: {format: KV}
techniques: [TECHNIQUES]
calib: {samples: 4, length: 32, METHOD}
"""


def made(source, target, method: str, kv: str = "int8", techniques: str = ""):
    text = BASE.replace("KV", kv).replace("METHOD", method).replace("TECHNIQUES", techniques)
    checkpoint = open_checkpoint(source)
    report = compress(checkpoint, plan(checkpoint, parse_recipe("own", text)), target)
    return report, open_checkpoint(target)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("source"))


@pytest.mark.parametrize("techniques", ["", "smoothquant: {}"])
def test_a_second_pass_over_what_techniques_made_of_the_layer(source, tmp_path, techniques):
    """At 100 per cent it finds the largest magnitude again, to the width of a bin, folded scales included."""
    _, largest = made(source, tmp_path / "max", "method: max", techniques=techniques)
    _, all_ = made(source, tmp_path / "all", "method: percentile, percentile: 100", techniques=techniques)
    _, cut = made(source, tmp_path / "cut", "method: percentile, percentile: 90", techniques=techniques)
    names = [n for n in largest.tensors if n.endswith(("input_scale", "k_scale", "v_scale"))]
    assert len(names) == 18
    first = [n for n in names if n.startswith("layers.0.")]  # later layers see what the first made
    for name in first:
        a, b, c = (written.tensors.dense(name) for written in (largest, all_, cut))
        assert b.item() == pytest.approx(a.item(), rel=0.006)
        assert c < 0.8 * b


@pytest.mark.parametrize("method", ["mse", "entropy"])
def test_searched_ranges_on_a_model(source, tmp_path, method):
    report, written = made(source, tmp_path / "out", f"method: {method}")
    _, largest = made(source, tmp_path / "max", "method: max")
    assert report.kl < 0.1
    scales = [[w.tensors.dense(f"layers.0.{n}.input_scale").item() for n in ("attn.q", "mlp.down")] for w in
              (written, largest)]  # fmt: skip
    assert scales[0] != scales[1]
    assert all(0.1 * b < a <= 1.001 * b for a, b in zip(*scales, strict=True))


@pytest.mark.parametrize(("kv", "top"), [("fp8_head", 448), ("int8_head", 127.5), ("int4_head", 7.5)])
def test_a_scale_for_each_head_of_k_and_v(source, tmp_path, kv, top):
    _, one = made(source, tmp_path / "one", "method: max", kv.removesuffix("_head"))
    report, heads = made(source, tmp_path / "heads", "method: max", kv)
    count = heads.spec.layers[0].attention.kv_heads
    assert count > 1
    for name in ("layers.0.attn.k_scale", "layers.0.attn.v_scale"):
        each, whole = heads.tensors.dense(name), one.tensors.dense(name)
        assert each.shape == (count,)
        assert each.max() == whole  # the largest head is the layer's largest
        assert (each < whole).any()
    scheme = heads.config["quantization_config"]["kv_cache_scheme"]
    assert (scheme["strategy"], scheme["dynamic"]) == ("attn_head", False)
    assert report.verified is not None
    engine = open_engine(tmp_path / "heads", EngineOptions(num_blocks=16, max_batch=2))
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    (output,) = generate(engine, [GenerateRequest(id="a", prompt=tuple(ids(20)), params=params)])
    assert len(output.tokens) == 8


def test_heads_have_no_word_in_the_other_layout(source):
    checkpoint = open_checkpoint(source)
    with pytest.raises(Exception, match=r"no word for K and V in fp8_row"):
        plan(checkpoint, read_recipe("fp8").with_kv("fp8_head"), "hf")


@pytest.mark.parametrize(
    ("calib", "words"),
    [
        ("method: best", "method is 'best'; known: max, percentile, mse, entropy"),
        ("percentile: 99", "percentile without method: percentile"),
        ("method: percentile, percentile: 0", "percentile is 0, expected a number above 0 and up to 100"),
    ],
)
def test_wrong_settings(calib, words):
    with pytest.raises(RecipeError, match=words):
        parse_recipe("own", BASE.replace("KV", "fp8").replace("METHOD", calib).replace("TECHNIQUES", ""))
    with pytest.raises(RecipeError, match="--method mes: did you mean 'mse'"):
        read_recipe("fp8").with_method("mes")


def test_the_head_is_one_more_linear(source, tmp_path):
    """Its range follows the method, and its statistics are those of all processes."""
    text = BASE.replace("layers.*", "*").replace("KV", "int8").replace("TECHNIQUES", "")
    scales, added = [], []

    class Watched(Ranks):
        def add(self, stats):
            added.append(stats)

    for number, method in enumerate(("method: max", "method: percentile, percentile: 90")):
        checkpoint = open_checkpoint(source)
        planned = plan(checkpoint, parse_recipe("own", text.replace("METHOD", method)))
        compress(checkpoint, planned, tmp_path / str(number), ranks=Watched())
        scales.append(open_checkpoint(tmp_path / str(number)).tensors.dense("lm_head.input_scale").item())
    assert scales[1] < 0.8 * scales[0]
    assert len(added) == 2 * (4 * 2 + 1)


def test_a_method_with_nothing_to_do(source):
    with pytest.raises(RecipeError, match="method mse: no scale here is calibrated"):
        plan(open_checkpoint(source), read_recipe("int4").with_method("mse"))
