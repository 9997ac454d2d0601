"""The CPU benchmark: every engine's files hold the same model, a worker answers, and ratios are those of the rounds."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from cpu_models import write_dense, write_gguf
from cpu_peers import Process
from cpu_table import Comparison, Contestant, Row, ratios
from cpu_worker import Fewbit

import fewbit
from fewbit.measure.dummy import shape_named

SMALL = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 32,
    "num_key_value_heads": 2, "vocab_size": 512, "dtype": "bfloat16",
}  # fmt: skip


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    target = tmp_path_factory.mktemp("models") / "dense"
    write_dense(shape_named("llama3.2-1b") | SMALL, target)  # with its scaled positions and its tied head
    return target


def worker(model):
    return Fewbit(str(model), torch.get_num_threads())


def test_a_gguf_file_is_the_dense_model(dense, tmp_path):
    file = tmp_path / "Q8_0.gguf"
    write_gguf(fewbit.open_checkpoint(dense), "Q8_0", file)
    assert fewbit.open_checkpoint(file).quant["lm_head"].weight is not None  # the head is in blocks, too
    rounded = worker(file)
    assert np.corrcoef(worker(dense).logits(40), rounded.logits(40))[0, 1] > 0.999
    assert rounded.facts()["weight_bytes"] / rounded.facts()["weights"] == 34 / 32


def test_a_step_of_several_sequences_and_the_loops_share_of_it(dense):
    found = worker(dense).decode(batch=3, context=8, steps=2)
    assert found["seconds"] > 0
    assert 0 < found["loop"] < 1


def test_a_worker_that_ends_is_named(tmp_path):
    process = Process(Path(sys.executable), Contestant("fewbit", "x"), "nowhere", 1, tmp_path / "log")
    with process, pytest.raises(fewbit.FewbitError, match="fewbit x ended early"):
        process.ask(do="facts")
    assert "nowhere" in (tmp_path / "log").read_text()


def test_ratios_are_of_rounds_and_the_best_peer_changes():
    def row(name, *seconds):
        return Row("llama3.2-1b", name, "decode 1", 1, 4.0, 8e9, list(seconds), [4e9] * len(seconds))

    comparison = Comparison(("int4_g128+int8_row",), "transformers", ("float32", "bfloat16"))
    made = (
        row("fewbit int4_g128+int8_row", 1, 2, 4),
        row("transformers float32", 4, 4, 4),
        row("transformers bfloat16", 3, 8, 12),
    )
    found = ratios(comparison, {(r.contestant, r.work): r for r in made}, "llama3.2-1b")
    by_peer = {r.theirs: (r.ratio, r.slowest, r.fastest, r.target) for r in found}
    assert by_peer == {
        "transformers float32": (2, 1, 4, None),
        "transformers bfloat16": (3, 3, 4, None),
        "transformers' best": (2, 1, 3, 4.0),
    }
    assert made[0].share() == 1.0  # shares 2, 1 and a half
