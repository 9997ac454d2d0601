"""On a GPU beside the fused path: mixtures of experts, INT4 K and V, compressing, and the times of a step."""

from __future__ import annotations

import gzip
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import fewbit
from fewbit import cli
from fewbit.checkpoint import open_checkpoint
from fewbit.compress import compress, plan, read_recipe
from fewbit.compress.recipe import parse_recipe
from fewbit.engine.config import EngineOptions
from fewbit.engine.engine import generate, open_engine
from fewbit.engine.gpu import GpuRunner
from fewbit.engine.types import GenerateRequest, SamplingParams
from fewbit.errors import UnsupportedError
from fewbit.measure.quality import evaluate
from fewbit.measure.steptimes import measure
from fewbit.model import DenseAttend, Loader
from fewbit.text.tokenizer import Tokenizer
from helpers import ids, make_model

STORY = fewbit.demo_model()
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
FAMILIES = ("mixtral", "qwen3_moe")


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory):
    """A bfloat16 model of each family."""
    root = tmp_path_factory.mktemp("moe")
    return {f: make_model(root / f, f, torch.bfloat16) for f in FAMILIES}


def logits_of(path, tokens, device):
    decoder = Loader(open_checkpoint(path), device).decoder()
    given = torch.tensor(tokens, device=device)
    hidden = decoder.hidden(given, torch.arange(len(tokens), device=device), DenseAttend(decoder.codecs, len(tokens)))
    return decoder.logits(hidden).cpu().double()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixture_says_what_it_says_on_a_cpu(mixtures, family):
    tokens = ids(96, 256, 5)
    expected, found = (logits_of(mixtures[family], tokens, device) for device in (CPU, GPU))
    log_p, log_q = expected.log_softmax(-1), found.log_softmax(-1)
    # a token whose experts are nearly even may take another
    assert float((log_p.exp() * (log_p - log_q)).sum(-1).median()) < 1e-3
    engine = open_engine(mixtures[family], EngineOptions(device="cuda:0", max_model_len=128, kv_bytes=1 << 24))
    assert not isinstance(engine.runner, GpuRunner)
    asked = [
        GenerateRequest(
            id=f"r{n}", prompt=tuple(tokens[: 10 + n]), params=SamplingParams(max_tokens=8, ignore_eos=True)
        )
        for n in range(3)
    ]
    assert [len(output.tokens) for output in generate(engine, asked)] == [8, 8, 8]


@pytest.mark.parametrize("recipe", ["fp8", "int4_awq", "int4_gptq"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixture_is_compressed_as_on_a_cpu(mixtures, tmp_path, family, recipe):
    checkpoint = open_checkpoint(mixtures[family])
    text = read_recipe(recipe).text.replace("int4_g128", "int4_g64")
    lines = [line for line in text.splitlines() if not line.startswith("calib")]
    chosen = parse_recipe("own", "\n".join([*lines, "calib: {samples: 16, length: 128}"]))
    reports = [
        compress(checkpoint, plan(checkpoint, chosen), tmp_path / device.replace(":", ""), device=device)
        for device in ("cpu", "cuda:0")
    ]
    counts = [report.experts for report in reports]
    assert counts[0].keys() == counts[1].keys()
    for name, seen in counts[0].items():
        assert counts[1][name] == pytest.approx(seen, rel=0.05, abs=8)
    kls = [
        evaluate(open_checkpoint(tmp_path / where), checkpoint, [ids(96, 256, seed) for seed in range(8)], CPU).kl_mean
        for where in ("cpu", "cuda0")
    ]
    assert kls[1].value == pytest.approx(kls[0].value, rel=0.15)


@pytest.mark.parametrize("kv", ["int4", "int4_head"])
def test_int4_k_and_v(tmp_path, kv):
    line = ["compress", str(STORY), "--recipe", "int8_wo", "--kv", kv, "-o", str(tmp_path / "m"), "-q"]
    assert cli.run([*line, "--sample-tokens", "0", "--samples", "8", "--length", "256"]) == 0
    text = Tokenizer.load(STORY).encode(gzip.decompress((STORY / "heldout.txt.gz").read_bytes()).decode()[:60000])
    windows = [text[i : i + 192] for i in range(0, 24 * 192, 192)]
    there, here = (
        evaluate(open_checkpoint(tmp_path / "m"), None, windows, device).perplexity.value for device in (CPU, GPU)
    )
    assert here == pytest.approx(there, rel=2e-2)  # steps of 4 bits: what is noise elsewhere moves whole codes
    engine = open_engine(tmp_path / "m", EngineOptions(device="cuda:0", max_model_len=256, kv_bytes=1 << 26))
    assert not isinstance(engine.runner, GpuRunner)
    (output,) = generate(
        engine,
        [GenerateRequest(id="r", prompt=tuple(windows[0][:50]), params=SamplingParams(max_tokens=20, ignore_eos=True))],
    )
    assert len(output.tokens) == 20


def test_the_times_of_a_step(tmp_path):
    shape = {
        **open_checkpoint(STORY).config, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 8,
        "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128, "max_position_embeddings": 4096,
    }  # fmt: skip
    for last in (False, False, True):  # other guests of the machine may upset a clock, and the tool then says so
        try:
            times = measure(shape, ["none", "int4"], GPU, context=256, layers=2)
            break
        except UnsupportedError as error:
            if last or "keeps this machine busy" not in str(error):
                raise
    assert times.layer > 0
    assert math.isfinite(times.fixed)
    assert sum(by["int4"] for by in times.more.values()) < -0.2 * times.layer  # a quarter of the bytes
