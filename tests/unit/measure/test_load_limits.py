"""MBU and MFU of a run whose figures are known, against the arithmetic by hand."""

from __future__ import annotations

import pytest
import torch

from fewbit import open_checkpoint
from fewbit.compress.recipe import read_recipe
from fewbit.demo import demo_model
from fewbit.errors import CheckpointError, RequestError
from fewbit.measure.dummy import dummy_checkpoint, shape_named
from fewbit.measure.load import Sample
from fewbit.measure.load.answer import Record
from fewbit.measure.load.drive import Run
from fewbit.measure.load.limits import utilization
from fewbit.measure.load.report import result_of
from fewbit.measure.peaks import Peak, peak_named, peak_of


def test_by_hand():
    """Two answers of 11 tokens, 10 ms each, one streaming from 0.1 s to 0.2 s, the other from 0.15 s to 0.25 s."""
    try:
        model = open_checkpoint(demo_model())
    except CheckpointError as error:
        pytest.skip(f"NO STORYTELLER, so nothing was computed: {error}")
    records = [
        Record(
            index, sent=0.0, ended=0.3, first_chunk=start, arrivals=[start + 0.01 * i for i in range(11)],
            texts=["x"] * 11, usage={"prompt_tokens": 100, "completion_tokens": 11},
        )
        for index, start in enumerate((0.1, 0.15))
    ]  # fmt: skip
    result = result_of(Run(records, []), [Sample("p")] * 2)
    found = utilization(result, model, Peak(1e9, 1e12, 2e12))
    assert found["batch"] == pytest.approx(0.2 / 0.15)
    assert found["context"] == pytest.approx(105.5)
    weights = 2 * (6_881_280 + 4096 * 256)  # bfloat16; of the linears and the head
    kv = 105.5 * 10 * 2 * 2 * 64 * 2  # layers, K and V, heads, head size, bytes
    assert found["bytes_per_step"] == pytest.approx(weights + found["batch"] * kv)
    assert found["bytes_per_s"] == pytest.approx(found["bytes_per_step"] / 0.01)
    assert found["mbu"] == pytest.approx(found["bytes_per_s"] / 1e9)
    attention = 4 * 10 * 4 * 64 * 111 * 112 / 2  # multiply and add, of scores and of values
    each = 2 * (6_881_280 * 111 + 11 * 4096 * 256) + attention  # the head for each token of the answer
    assert found["flops_per_s"] == pytest.approx(2 * each / 0.25)
    assert found["mfu"] == pytest.approx(2 * each / 0.25 / 1e12)
    assert utilization(result, model, None)["mbu"] is None


def test_a_model_with_8_bit_inputs_is_held_against_the_8_bit_peak():
    model = dummy_checkpoint(shape_named("llama3.2-1b"), read_recipe("fp8"), torch.device("cpu"), layers=1)
    record = Record(
        0, sent=0.0, ended=0.3, first_chunk=0.1, arrivals=[0.1, 0.2], texts=["x", "y"],
        usage={"prompt_tokens": 100, "completion_tokens": 2},
    )  # fmt: skip
    found = utilization(result_of(Run([record], []), [Sample("p")]), model, Peak(1e9, 1e12, 2e12))
    assert found["mfu"] == pytest.approx(found["flops_per_s"] / 2e12)


def test_peaks_by_name():
    assert peak_named("H100").bytes_per_s == 3.35e12
    with pytest.raises(RequestError, match="did you mean 'h100'"):
        peak_named("h101")


def test_the_peaks_of_a_device_are_those_of_its_own_card():
    assert peak_of("NVIDIA H100 80GB HBM3") == ("h100", peak_named("h100"))
    assert peak_of("NVIDIA A100-SXM4-80GB") == ("a100", peak_named("a100"))
    assert peak_of("NVIDIA L40S") == ("l40s", peak_named("l40s"))
    for other in ("NVIDIA H100 PCIe", "NVIDIA A100-SXM4-40GB", "AMD EPYC 9575F", "NVIDIA GeForce RTX 4090"):
        assert peak_of(other) is None
    assert peak_of("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None


def test_a_peak_of_products_some_of_which_have_8_bit_inputs():
    peak = Peak(1.0, 100.0, 200.0)
    assert (peak.mixed(0.0), peak.mixed(1.0)) == pytest.approx((100.0, 200.0))
    assert peak.mixed(0.5) == pytest.approx(1 / (0.5 / 100 + 0.5 / 200))
