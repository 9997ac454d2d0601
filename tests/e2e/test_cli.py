"""The contract of every command: what goes to stdout, what to stderr, which status it ends with."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fewbit import cli
from fewbit.checkpoint import open_checkpoint
from fewbit.model import DenseAttend, load
from fewbit.ops.cpu.build import library
from fewbit.text.tokenizer import Tokenizer
from fewbit.version import __version__
from helpers import TEMPLATE, VOCAB, Ended, edit_json, ids, make_model
from independent_decoder import decode

LIMIT_S = 300
"""For a command, on a machine that may have others to serve."""
BOOK = "The fox went over the hill and under the oak; the children told each other stories about the sea. " * 60


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """Float32, so that nothing is rounded on the way to K and V; no chat template."""
    return make_model(tmp_path_factory.mktemp("models") / "plain", dtype=torch.float32, chat=False)


@pytest.fixture(scope="module")
def int8(plain, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("models") / "int8"
    assert cli.run(["compress", str(plain), "--recipe", "int8_wo", "-o", str(out), "-q", "--json"]) == 0
    return out


@pytest.fixture
def book(tmp_path) -> Path:
    (tmp_path / "book.txt").write_text(BOOK)
    return tmp_path / "book.txt"


def one_object(ended: Ended) -> dict:
    """Stdout is one line with one JSON object, that any reader of JSON takes."""
    assert ended.status == 0, ended.err
    assert ended.out.count("\n") == 1
    assert ended.out.endswith("\n")

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    found = json.loads(ended.out, parse_constant=refuse)
    assert found["schema"] == 1
    return found


# --- results ----------------------------------------------------------------------------------------------------------


def test_version(fewbit):
    assert fewbit("--version") == (0, f"fewbit {__version__}\n", "")


def test_help_is_a_result(fewbit):
    ended = fewbit("--help")
    assert (ended.status, ended.err) == (0, "")
    for name in ("inspect", "plan", "compress", "run", "serve", "eval", "explain", "doctor", "demo"):
        assert f" {name} " in ended.out
        assert fewbit(name, "--help").status == 0


def test_inspect(fewbit, tiny, int8):
    ended = fewbit("inspect", tiny)
    assert (ended.status, ended.err) == (0, "")
    assert "LlamaForCausalLM" in ended.out
    found = one_object(fewbit("inspect", tiny, "--json"))
    spec = open_checkpoint(tiny).spec
    assert found["command"] == "inspect"
    assert (
        found["parameters"] == spec.parameters == sum(t.numel() for t in load_file(tiny / "model.safetensors").values())
    )
    assert found["bits_per_weight"] == 16
    assert found["kv_bytes_per_token"] == 2 * 2 * 2 * 32 * 2  # K and V, layers, heads, numbers, bytes
    assert found["format"] == "unquantized Hugging Face"
    found = one_object(fewbit("inspect", int8, "--json"))
    assert found["format"] == "compressed-tensors"
    assert found["bits_per_weight"] == pytest.approx(8 + 32 * 1280 / 163840, rel=0.05)
    assert found["quantized_linears"] == 14
    assert any("int8_row weights" in group[1] for group in found["groups"])


def test_inspect_counts_the_bytes_that_are_there(fewbit, int8):
    found = one_object(fewbit("inspect", int8, "--json"))
    tensors = load_file(int8 / "model.safetensors")
    stored = {n: t.numel() * t.itemsize for n, t in tensors.items() if not n.endswith("weight_shape")}
    assert found["file_bytes"] == sum(stored.values())
    quantized = sum(size for n, size in stored.items() if "weight_packed" in n or "weight_scale" in n)
    numbers = sum(t[0] * t[1] for n, t in tensors.items() if n.endswith("weight_shape"))
    assert found["bits_per_weight"] == pytest.approx(float(8 * quantized / numbers))


def test_plan(fewbit, tiny):
    ended = fewbit("plan", tiny)
    assert (ended.status, ended.err) == (0, "")
    assert "fits; up to" in ended.out
    found = one_object(fewbit("plan", tiny, "--json", "--batch", 3, "--context", 100))
    assert found["kv"] == 256 * 2 * 300
    assert found["fits"] is True
    assert found["total"] == found["weights"] + found["kv"] + found["workspace"]
    small = one_object(
        fewbit("plan", tiny, "--recipe", "int4", "--kv", "fp8", "--json", "--batch", 3, "--context", 100)
    )
    assert small["kv"] == found["kv"] // 2
    assert small["files"] < found["files"]
    huge = fewbit("plan", tiny, "--batch", 10**12)
    assert huge.status == 0
    assert "does not fit" in huge.out


@pytest.mark.parametrize("recipe", ["int4", "fp8"])
def test_what_plan_says_of_the_disk_is_what_compress_writes(fewbit, tiny, tmp_path, recipe):
    planned = one_object(fewbit("plan", tiny, "--recipe", recipe, "--json"))
    fewbit("compress", tiny, "--recipe", recipe, "-o", tmp_path / "out", "--samples", 1, "--length", 32)
    written = one_object(fewbit("inspect", tmp_path / "out", "--json"))["file_bytes"]
    assert planned["files"] == pytest.approx(written, rel=0.01)


def test_explain(fewbit, tiny, int8):
    for model, numerics in ((tiny, "as it was"), (int8, "int8_row weights")):
        ended = fewbit("explain", model, "--exact")
        assert (ended.status, ended.err) == (0, "")
        assert f"{numerics} -> dense" in ended.out
    if not isinstance(library(), str):
        assert "not cpu: multiplies inputs as INT8, and exact arithmetic was asked for" in ended.out
        assert (
            "note: rounds inputs to INT8 in groups of 32; --exact leaves them as they are"
            in fewbit("explain", int8).out
        )
    forced = one_object(fewbit("explain", int8, "--json", "--backend", "reference"))
    assert {g["kernel"] for g in forced["groups"]} == {"reference"}
    table = one_object(fewbit("explain", "--json"))
    assert {row[0] for row in table["formats"]} >= {"int8_row", "nvfp4", "mxfp4"}


def test_doctor(fewbit):
    found = one_object(fewbit("doctor", "--json"))
    assert all(f["ok"] for f in found["findings"] if f["needed"])
    assert fewbit("doctor").status == 0
    (kernels,) = (f for f in found["findings"] if f["name"] == "CPU kernels")
    built = library()
    if isinstance(built, str):
        assert (kernels["ok"], kernels["detail"]) == (False, built)
    else:
        assert kernels["detail"].startswith(f"{built.usable[0]}, compiled by {built.compiler}, in {built.path}; inputs")


def test_compress(fewbit, tiny, tmp_path):
    ended = fewbit(
        "compress", tiny, "--recipe", "fp8", "--kv", "int8", "-o", tmp_path / "out", "--samples", 2, "--length", 64
    )
    assert ended.status == 0, ended.err
    plan = ended.err.splitlines()
    assert plan[0] == f"fp8 -> compressed-tensors, for {tiny}:"
    assert (
        "  fp8 weights, fp8 inputs (static): layers.*.attn.q, layers.*.attn.k, layers.*.attn.v, layers.*.attn.o"
        in plan[1]
    )
    assert "  as it was: lm_head" in plan
    assert "  int8: K and V" in plan
    assert plan[-1] == "  calibrated on 2 windows of 64 tokens of public-domain stories shipped with fewbit"
    for words in ("output error", "KL divergence", "bits per weight", "time", "load", "calibrate", "quantize", "write"):
        assert words in ended.out, words
    assert "logits equal bit for bit on 128 tokens" in ended.out
    assert "before: " in ended.out
    assert "after:  " in ended.out


def test_compress_in_json(fewbit, tiny, tmp_path):
    found = one_object(fewbit("compress", tiny, "--recipe", "nvfp4", "-o", tmp_path / "out", "--json", "-q",
                              "--samples", 2, "--length", 64, "--sample-tokens", 5))  # fmt: skip
    assert found["recipe"] == "nvfp4"
    assert found["calibration"].startswith("2 windows of 64 tokens of public-domain stories")
    assert set(found["seconds"]) == {"load", "calibrate", "quantize", "write", "check"}
    assert found["peak_bytes"] > found["grown_bytes"] >= 0
    assert found["verified"]["tokens"] == 128
    assert found["verified"]["bits_per_weight"] == pytest.approx(4.5, abs=0.01)
    assert found["weight_error"].keys() == open_checkpoint(tmp_path / "out").quant.keys()
    assert all(0 < e < 0.2 for e in found["weight_error"].values())
    assert found["kl"] > 0
    assert len(found["output_error"]) == 2
    assert found["sample_before"].startswith("Once upon a time")


def test_compress_with_no_sample(fewbit, tiny, tmp_path):
    found = one_object(
        fewbit("compress", tiny, "--recipe", "int4", "-o", tmp_path / "out", "--json", "--sample-tokens", 0)
    )
    assert found["sample_before"] is found["sample_after"] is None


def test_compress_without_a_tokenizer_where_none_is_needed(fewbit, tmp_path):
    bare = make_model(tmp_path / "bare", with_tokenizer=False)
    found = one_object(fewbit("compress", bare, "--recipe", "int4", "-o", tmp_path / "out", "--json"))
    assert found["verified"]["tokens"] == 128
    ended = fewbit("compress", bare, "--recipe", "fp8", "-o", tmp_path / "fp8", "-q")
    assert ended.status == 2
    assert "no tokenizer.json" in ended.err


def test_calibration_data_of_ones_own(fewbit, tiny, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"ids": ids(40, seed=s)}) for s in range(5)))
    for count in (5, 2):
        found = one_object(fewbit("compress", tiny, "--recipe", "fp8", "-o", tmp_path / f"out{count}", "--json",
                                  "--calib", rows, "--samples", count))  # fmt: skip
        assert found["calibration"] == f"{count} windows of 40 tokens of {rows}"


# --- eval -------------------------------------------------------------------------------------------------------------


def float64_logits(path: Path, windows: list[list[int]]) -> list[torch.Tensor]:
    """By transformers, from the weights as a stranger decodes them."""
    config = transformers.AutoConfig.from_pretrained(path)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    model.load_state_dict({n: t.double() for n, t in decode(path).items()})
    with torch.no_grad():
        return [model.eval()(torch.tensor([w])).logits[0] for w in windows]


def by_hand(base: Path, model: Path, windows: list[list[int]]) -> dict[str, float]:
    kl, agree, losses, base_losses, flips, squares = [], [], [], [], [], []
    for w, b, m in zip(windows, float64_logits(base, windows), float64_logits(model, windows), strict=True):
        b, m = b.log_softmax(-1), m.log_softmax(-1)
        for t in range(len(w)):
            kl.append(sum(b[t].exp() * (b[t] - m[t])).item())
            agree.append(float(b[t].argmax() == m[t].argmax()))
            if t:
                losses.append(-m[t - 1, w[t]].item())
                base_losses.append(-b[t - 1, w[t]].item())
                flips.append(float((b[t - 1].argmax() == w[t]) != (m[t - 1].argmax() == w[t])))
                squares.append((m[t - 1, w[t]].exp() - b[t - 1, w[t]].exp()).item() ** 2)
    mean = lambda x: sum(x) / len(x)  # noqa: E731
    return {
        "tokens": len(kl),
        "kl_mean": mean(kl),
        "kl_median": sorted(kl)[(len(kl) - 1) // 2],
        "kl_p99": torch.tensor(kl, dtype=torch.float64).quantile(0.99).item(),
        "top1_agreement": mean(agree),
        "perplexity": torch.tensor(mean(losses), dtype=torch.float64).exp().item(),
        "perplexity_base": torch.tensor(mean(base_losses), dtype=torch.float64).exp().item(),
        "perplexity_ratio": math.exp(mean(losses) - mean(base_losses)),
        "flips": mean(flips),
        "probability_rms": mean(squares) ** 0.5,
        "kl_max": max(kl),
    }


def agrees(found: dict, expected: dict) -> None:
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-3), name
        if name not in ("tokens", "kl_max"):
            assert found[f"{name}_err"] >= 0
            assert found[f"{name}_low"] <= found[f"{name}_high"]


def test_eval_by_hand(fewbit, plain, int8, tmp_path):
    """KL(base || model) in nats over every position; perplexity without each window's first token. Uneven rows."""
    windows = [ids(n, seed=n) for n in (2, 17, 40, 40, 33)]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"ids": w}) for w in windows))
    found = one_object(fewbit("eval", int8, "--against", plain, "--data", rows, "--json"))
    agrees(found, by_hand(plain, int8, windows))
    assert found["windows"] == 5
    assert 0 < found["kl_mean"] < 0.5
    back = one_object(fewbit("eval", plain, "--against", int8, "--data", rows, "--json"))
    assert back["kl_mean"] != found["kl_mean"]  # it has a direction
    assert back["perplexity"] == found["perplexity_base"]
    alone = one_object(fewbit("eval", int8, "--data", rows, "--json", "--windows", 3))
    assert alone["tokens"] == 59
    assert not any(name.startswith(("kl", "top1", "perplexity_base")) for name in alone)


def test_eval_cuts_text_into_windows(fewbit, plain, int8, tmp_path, book):
    """Documents are joined with BOS before each; --length cuts; the first N are taken."""
    docs = tmp_path / "docs.jsonl"
    docs.write_text("\n".join(json.dumps({"text": t}) for t in ("One fox.", BOOK[:400], "The end.")))
    tokenizer = Tokenizer.load(plain)
    joined = [
        i for t in ("One fox.", BOOK[:400], "The end.") for i in [1, *tokenizer.encode(t, add_special_tokens=False)]
    ]
    windows = [joined[i : i + 32] for i in range(0, 96, 32)]
    found = one_object(
        fewbit("eval", int8, "--against", plain, "--data", docs, "--length", 32, "--windows", 3, "--json")
    )
    agrees(found, by_hand(plain, int8, windows))
    words = fewbit("eval", int8, "--against", plain, "--data", book, "--length", 32, "--windows", 3)
    assert words.status == 0
    assert "tokens" in words.out
    assert "96 in 3 windows" in words.out
    assert "±" in words.out


def test_a_model_against_itself(fewbit, plain, book):
    found = one_object(
        fewbit("eval", plain, "--against", plain, "--data", book, "--length", 64, "--windows", 4, "--json")
    )
    assert found["kl_mean"] == found["kl_p99"] == 0
    assert found["top1_agreement"] == 1


# --- run --------------------------------------------------------------------------------------------------------------


def greedy(path: Path, prompt: list[int], count: int) -> list[int]:
    """The slow way: the whole sequence again for each token."""
    decoder, found = load(open_checkpoint(path)), list(prompt)
    while len(found) < len(prompt) + count:
        n = len(found)
        hidden = decoder.hidden(torch.tensor(found), torch.arange(n), DenseAttend(decoder.codecs, n))
        token = int(decoder.logits(hidden[-1:]).argmax())
        if token == 2:
            break
        found.append(token)
    return found[len(prompt) :]


def rendered(messages: list[tuple[str, str]], tokenizer: Tokenizer) -> list[int]:
    assert "<|assistant|>" in TEMPLATE
    text = "<s>" + "".join(f"<|{role}|>{content}\n" for role, content in messages) + "<|assistant|>"
    return tokenizer.encode(text, add_special_tokens=False)


def test_run_answers_through_the_chat_template(fewbit, tiny):
    tokenizer = Tokenizer.load(tiny)
    answer = tokenizer.decode(greedy(tiny, rendered([("user", "Hello fox")], tokenizer), 12))
    ended = fewbit("run", tiny, "--prompt", "Hello fox", "--max-tokens", 12, "--temperature", 0)
    assert ended.status == 0
    assert ended.out == answer + "\n"
    assert "12 generated (length)" in ended.err
    assert ended.err.count("\n") == 1
    assert fewbit("run", tiny, "--prompt", "Hello fox", "--max-tokens", 12, "--temperature", 0, "-q").err == ""


@pytest.mark.parametrize("raw", [True, False])
def test_run_completes_text(fewbit, tiny, plain, raw):
    """With --raw, and where there is no template."""
    model = tiny if raw else plain
    tokenizer = Tokenizer.load(model)
    answer = tokenizer.decode(greedy(model, tokenizer.encode("Once upon"), 10))
    ended = fewbit("run", model, "--prompt", "Once upon", "--max-tokens", 10, "--temperature", 0, *["--raw"] * raw)
    assert ended.out == answer + "\n"


def test_run_in_json(fewbit, plain):
    found = one_object(fewbit("run", plain, "--prompt", "Once upon", "--max-tokens", 9, "--temperature", 0, "--json"))
    assert (
        found["text"] == fewbit("run", plain, "--prompt", "Once upon", "--max-tokens", 9, "--temperature", 0).out[:-1]
    )
    assert found["finish_reason"] == "length"
    assert found["output_tokens"] == 9
    assert found["prompt_tokens"] == len(Tokenizer.load(plain).encode("Once upon"))
    assert 0 < found["first_token_s"] <= found["total_s"]


def test_run_stops(fewbit, plain):
    whole = fewbit("run", plain, "--prompt", "fox", "--max-tokens", 40, "--temperature", 0).out[:-1]
    for piece in (whole[len(whole) // 3 :][:2], whole[len(whole) // 2 :][:4]):
        found = one_object(
            fewbit("run", plain, "--prompt", "fox", "--max-tokens", 40, "--temperature", 0, "--stop", piece,
                   "--stop", "never to be found", "--json")
        )  # fmt: skip
        assert found["text"] == whole[: whole.index(piece)]
        assert found["finish_reason"] == "stop"


def test_run_draws_by_its_seed(fewbit, plain):
    def draw(*more: object) -> str:
        return fewbit("run", plain, "--prompt", "fox", "--max-tokens", 20, "--temperature", 1.5, *more).out

    assert draw("--seed", 5) == draw("--seed", 5) != draw("--seed", 6)
    assert draw() == draw("--seed", 0)
    least = fewbit("run", plain, "--prompt", "fox", "--max-tokens", 20, "--temperature", 1.5, "--top-p", 1e-6).out
    assert least == fewbit("run", plain, "--prompt", "fox", "--max-tokens", 20, "--temperature", 0).out


def test_a_chat_on_stdin(fewbit, tiny, monkeypatch):
    tokenizer = Tokenizer.load(tiny)
    first = tokenizer.decode(greedy(tiny, rendered([("user", "Hi")], tokenizer), 6))
    history = [("user", "Hi"), ("assistant", first), ("user", "More")]
    second = tokenizer.decode(greedy(tiny, rendered(history, tokenizer), 6))
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n\n  \nMore\n"))
    ended = fewbit("run", tiny, "--max-tokens", 6, "--temperature", 0)
    assert ended == (0, f"{first}\n{second}\n", "")


def test_every_backend_says_the_same(fewbit, int8):
    answers = {
        fewbit("run", int8, "--prompt", "fox", "--max-tokens", 8, "--temperature", 0, "--backend", b).out
        for b in ("exact", "dense", "reference")
    }
    assert len(answers) == 1


# --- wrong inputs -----------------------------------------------------------------------------------------------------

SLIM = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}


@pytest.fixture(scope="module")
def bench(tiny, plain, int8, tmp_path_factory) -> dict[str, Path]:
    """What the wrong inputs need, by the names that stand in braces below."""
    d = tmp_path_factory.mktemp("bench")
    for name in ("cut", "nan", "shardless", "foreign", "broken", "wordy"):
        shutil.copytree(tiny, d / name)
    raw = (tiny / "model.safetensors").read_bytes()
    (d / "cut" / "model.safetensors").write_bytes(raw[:-100])
    tensors = load_file(tiny / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, d / "nan" / "model.safetensors")
    (d / "shardless" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "b.safetensors"}}))
    edit_json(d / "foreign" / "config.json", architectures=["MambaForCausalLM"])
    (d / "broken" / "tokenizer.json").write_text("{}")
    words = json.loads((tiny / "tokenizer.json").read_text())
    words["added_tokens"].append(
        {"id": VOCAB, "content": "d ", "special": False, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False}
    )  # fmt: skip
    (d / "wordy" / "tokenizer.json").write_text(json.dumps(words))
    make_model(d / "slim", **SLIM)
    make_model(d / "other", vocab_size=300)
    (d / "full").mkdir()
    (d / "full" / "x").write_text("x")
    for name, text in {
        "file": "x",
        "empty.txt": "",
        "table.csv": "a,b",
        "short.txt": "fox",
        "book.txt": BOOK,
        "bad.jsonl": '{"text": "a"}\n{"txt": "b"}\n',
        "beyond.jsonl": '{"ids": [1, 500]}\n',
        "lonely.jsonl": '{"ids": [5]}\n',
        "key.yaml": "rules: [{mach: a, weight: int8}]",
        "format.yaml": 'rules: [{match: "layers.*", weight: int44}]',
        "idle.yaml": 'rules: [{match: "layers.*", weight: int8_row}, {match: "layer.*", weight: int8}]',
        "not.yaml": "rules: [",
    }.items():
        (d / name).write_text(text)
    return {
        "tiny": tiny,
        "plain": plain,
        "int8": int8,
        **{p.name: p for p in d.iterdir()},
        "gone": d / "gone",
        "out": d / "out",
    }


COMPRESS = "compress {tiny} -o {out} --recipe"
WRONG = [
    ("inspect {gone}", "gone is not a directory; expected a Hugging Face model directory"),
    ("inspect {full}", "has no config.json"),
    ("inspect {cut}", "model.safetensors is damaged or truncated"),
    ("inspect {shardless}", "b.safetensors is missing from"),
    ("inspect {foreign}", "architecture 'MambaForCausalLM' is not supported"),
    ("inspect nobody/nothing", "where there is a network: hf download nobody/nothing"),
    ("inspect {tiny} --device tpu", "unknown device 'tpu'; expected cpu, cuda or cuda:N"),
    ("explain {tiny} --device cuda:64", "no device 'cuda:64' here"),
    ("explain {tiny} --backend marlin", "known: auto, cpu, dense, exact, fp4, int4, reference, wide"),
    ("inspect", "Missing argument 'DIR'"),
    ("inspect {tiny} --jsn", "No such option: --jsn"),
    ("inspct {tiny}", "No such command 'inspct'"),
    ("plan {tiny} --recipe int5", "unknown recipe 'int5'; did you mean"),
    ("plan {tiny} --kv fp8", "--kv needs --recipe"),
    ("plan {tiny} --context 1000000", "--context 1000000 exceeds the 256 positions"),
    ("plan {tiny} --batch 0", "'--batch'"),
    ("compress {tiny} -o {out}", "Missing option '--recipe'"),
    (f"{COMPRESS} {{gone}}.yaml", "gone.yaml cannot be read: "),
    (f"{COMPRESS} {{key.yaml}}", "key: rules[0]: unknown key 'mach'; did you mean 'match'?"),
    (f"{COMPRESS} {{format.yaml}}", "format: rules[0]: weight: unknown numeric format 'int44'; did you mean"),
    (f"{COMPRESS} {{idle.yaml}}", "rules[1] 'layer.*' matches no layer"),
    (f"{COMPRESS} {{not.yaml}}", "recipe not is not YAML: "),
    (f"{COMPRESS} fp8 --kv int2", "--kv: K and V format 'int2' is unknown; known: fp8, int8"),
    (f"{COMPRESS} fp8 --export onnx", "unknown checkpoint format 'onnx'; known: awq, compressed-tensors, gptq, hf"),
    (f"{COMPRESS} fp8 --export gguf", "checkpoint format 'gguf' is only read; known: awq, compressed-tensors, gptq"),
    (f"{COMPRESS} int8 --export hf", "layers.0.attn.q: Model Optimizer's layout has no word for int8_row weights"),
    (f"{COMPRESS} w4a8 --export hf", "use --export compressed-tensors, which can"),
    (f"{COMPRESS} fp8 --kv int8 --export hf", "no word for K and V in int8; use --export compressed-tensors"),
    ("compress {tiny} --recipe int8 -o {full}", "full is not empty; choose another folder or pass --force"),
    ("compress {tiny} --recipe int8 -o {file} --force", "file is a file; expected a folder to write to"),
    ("compress {tiny} --recipe int8 -o {tiny} --force", "holds the model that is read"),
    ("compress {int8} --recipe int4 -o {out}", "is already quantized (compressed-tensors); start from the original"),
    ("compress {slim} --recipe int4 -o {out}", "layers.0.attn.q: 64 columns do not divide into blocks of 128"),
    ("compress {nan} --recipe int4 -o {out}", "tensor 'model.layers.1.mlp.up_proj.weight' holds NaN or infinity"),
    ("compress {broken} --recipe fp8 -o {out}", "tokenizer.json: not a tokenizer"),
    ("compress {wordy} --recipe int8 -o {out}", "the data hold token 384, the model's vocabulary has 384"),
    (f"{COMPRESS} fp8 --calib {{gone}}.txt", "gone.txt: no such file"),
    (f"{COMPRESS} fp8 --calib {{table.csv}}", "table.csv: expected a file ending in .txt"),
    (f"{COMPRESS} fp8 --calib {{empty.txt}}", "empty.txt: the file holds no text"),
    (f"{COMPRESS} fp8 --calib {{short.txt}} --length 8", "holds 1 windows of 8 tokens, asked for 32; give more text"),
    (f"{COMPRESS} fp8 --calib {{bad.jsonl}}", "bad.jsonl, line 2: expected an object with one of \"text\", "),
    (f"{COMPRESS} fp8 --calib {{beyond.jsonl}} --samples 1", "window 0 holds token id 500, outside the vocabulary"),
    (f"{COMPRESS} fp8 --samples 0", "'--samples'"),
    (f"{COMPRESS} fp8 --length 512 --samples 1", "windows of 512 tokens exceed the model's 256; see --length"),
    (f"{COMPRESS} fp8 --samples 1000000 --length 200", "the shipped text holds"),
    ("run {tiny} --prompt a --top-p 2", "top_p"),
    ("run {tiny} --prompt a --top-p nan", "top_p"),
    ("run {tiny} --prompt a --temperature -1", "'--temperature'"),
    ("run {tiny} --prompt a --temperature nan", "temperature"),
    ("run {tiny} --prompt a --max-tokens 0", "'--max-tokens'"),
    ("run {tiny} --prompt a --stop ''", "--stop needs a text that is not empty"),
    ("run {tiny} --json", "--json needs --prompt: a chat has no single result"),
    ("run {tiny} --prompt a --backend dense --exact", "--exact chooses among kernels and --backend dense names one"),
    ("run {tiny} --prompt a --backend fast", "unknown backend 'fast'"),
    ("run {tiny} --prompt a --max-model-len 100000", "max_model_len 100000 exceeds the 256 positions"),
    ("run {tiny} --prompt LONG", "256"),
    ("run {tiny} --prompt a --seed -1", "'--seed'"),
    ("run {tiny} --prompt a --seed 99999999999999999999999", "'--seed'"),
    ("run {broken} --prompt a", "tokenizer.json: not a tokenizer"),
    ("eval {tiny} --data {gone}.txt", "gone.txt: no such file"),
    ("eval {tiny} --data {bad.jsonl}", "line 2"),
    ("eval {tiny} --data {beyond.jsonl}", "token id 500"),
    ("eval {tiny} --data {lonely.jsonl}", "no window holds two tokens"),
    ("eval {tiny} --data {book.txt} --length 1", "'--length'"),
    ("eval {tiny} --data {book.txt} --length 300", "a window of 300 tokens exceeds the context of"),
    ("eval {tiny} --data {book.txt} --windows 0", "'--windows'"),
    ("eval {tiny} --against {other} --data {book.txt} --length 32", "vocabular"),
    ("serve {gone} --port 0", "gone"),
    ("serve {tiny} --port 99999", "'--port'"),
    ("serve {tiny} --port 0 --policy greedy", "'greedy' is not one of 'max_utilization', 'guaranteed_no_evict'"),
    ("serve {tiny} --port 0 --kv-blocks 0", "'--kv-blocks'"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "words"), WRONG, ids=[line for line, _ in WRONG])
def test_a_wrong_input_is_one_line_and_status_2(fewbit, bench, line, words):
    shutil.rmtree(bench["out"], ignore_errors=True)
    arguments = [
        {"LONG": "fox " * 300, "''": ""}.get(word) or ("" if word == "''" else _filled(word, bench))
        for word in line.split()
    ]
    ended = fewbit(*arguments, *["-q"] * (len(arguments) > 1 and arguments[0] in NAMES))
    assert ended.status == 2
    assert ended.out == ""
    assert ended.err.startswith("fewbit: ")
    assert ended.err.count("\n") == 1, ended.err
    assert words in ended.err
    assert "Traceback" not in ended.err
    assert not list(bench["out"].parent.glob(".*"))
    assert not bench["out"].exists()


NAMES = ("inspect", "plan", "explain", "compress", "run", "eval", "serve")


def _filled(word: str, bench: dict[str, Path]) -> str:
    for name, path in bench.items():
        word = word.replace(f"{{{name}}}", str(path))
    return word


def test_what_hf_cannot_say_is_known_before_a_weight_is_read(fewbit, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("fewbit.checkpoint.files.ModelFiles.read", lambda *_: pytest.fail("read a weight"))
    ended = fewbit("compress", tiny, "--recipe", "int8", "--export", "hf", "-o", tmp_path / "out", "-q")
    assert ended.status == 2


def test_a_port_that_is_taken(fewbit, tiny):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ended = fewbit("serve", tiny, "--port", taken.getsockname()[1], "-q")
    assert ended.status == 2
    assert "Traceback" not in ended.err
    assert "in use" in ended.err


def test_verbose_shows_the_traceback(fewbit, tmp_path):
    ended = fewbit("inspect", tmp_path, "-v")
    assert ended.status == 2
    assert ended.err.startswith("Traceback (most recent call last):")
    assert (
        ended.err.splitlines()[-1] == f"fewbit: {tmp_path} has no config.json; expected a Hugging Face model directory"
    )


def test_a_fault_of_ours_is_status_1(fewbit, tiny, monkeypatch):
    monkeypatch.setattr("fewbit.measure.facts.inspect", lambda *_: 1 / 0)
    ended = fewbit("inspect", tiny)
    assert (ended.status, ended.out) == (1, "")
    assert ended.err.startswith("fewbit: internal error: ZeroDivisionError: division by zero (run again with -v")
    assert ended.err.count("\n") == 1
    assert "Traceback" in fewbit("inspect", tiny, "-v").err


def test_ctrl_c_is_status_130(fewbit, tiny, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("fewbit.measure.facts.inspect", interrupted)
    assert fewbit("inspect", tiny) == (130, "", "fewbit: interrupted\n")


# --- as a process -----------------------------------------------------------------------------------------------------


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "fewbit.cli", *map(str, arguments)]


def test_a_process_ends_with_the_status(tiny, tmp_path):
    done = subprocess.run(
        command("inspect", tiny, "--json"), capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert one_object(Ended(done.returncode, done.stdout, done.stderr))["command"] == "inspect"
    done = subprocess.run(command("inspect", tmp_path), capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"fewbit: {tmp_path} has no config.json; expected a Hugging Face model directory\n"


def test_a_reader_that_has_had_enough_is_no_fault(tiny):
    done = subprocess.run(
        f"{' '.join(command('explain', tiny))} | true; echo ${{PIPESTATUS[0]}}",
        shell=True, executable="/bin/bash", capture_output=True, text=True, timeout=LIMIT_S, check=True,
    )  # fmt: skip
    assert done.stdout == "0\n"
    assert done.stderr == ""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_compressing_that_was_stopped_goes_on_and_leaves_no_half_directory(how, tmp_path):
    source = make_model(tmp_path / "big", hidden_size=256, intermediate_size=1024, num_hidden_layers=40)
    line = ["compress", source, "--recipe", "int4", "--sample-tokens", 0, "-o"]
    running = subprocess.Popen(
        command(*line, tmp_path / "out"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a shell's background jobs ignore
    )  # fmt: skip
    end = time.monotonic() + LIMIT_S
    while not (tmp_path / ".out.unfinished" / "unfinished.json").exists():
        assert time.monotonic() < end
        assert running.poll() is None
        time.sleep(0.01)
    running.send_signal(how)
    out, err = running.communicate(timeout=LIMIT_S)
    assert out == ""
    if how == signal.SIGINT:
        assert running.returncode == 130
        assert err.splitlines()[-1] == "fewbit: interrupted"
        assert "the same command goes on with it" in err
        assert "Traceback" not in err
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.unfinished", "big"]
    done = subprocess.run(command(*line, tmp_path / "out"), capture_output=True, text=True, check=True)
    assert re.search(r"time .*, after \d+ of 40 layers that an earlier run had finished", done.stdout)
    subprocess.run(command(*line, tmp_path / "whole"), capture_output=True, check=True)
    files = [{f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in ("out", "whole")]
    assert files[0] == files[1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["big", "out", "whole"]
