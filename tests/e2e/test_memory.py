"""Memory: what compressing and loading a large model may take, and a cache as large as `inspect` says."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from fewbit import cli
from fewbit.checkpoint import open_checkpoint
from fewbit.checkpoint.formats import hf
from fewbit.checkpoint.layout import Quantization
from fewbit.checkpoint.names import Names
from fewbit.checkpoint.writer import CheckpointWriter
from fewbit.compress.recipe import read_recipe
from fewbit.engine.config import EngineOptions
from fewbit.engine.engine import open_engine
from fewbit.engine.fit import need
from fewbit.measure.dummy import dummy_checkpoint
from fewbit.ops.cpu.build import library
from fewbit.spec.families import families
from fewbit.spec.hfconfig import HFConfig
from helpers import ids, make_model, write_tokenizer

LIMIT = 300 * 10**6
SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 6656,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 384,
    "max_position_embeddings": 2048,
}


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """1.5 GB in bfloat16, 32 layers: written piece by piece, so that this process stays small too."""
    folder = tmp_path_factory.mktemp("large") / "model"
    folder.mkdir()
    llama = families()["llama"]
    config = {**llama.TINY, **SIZES, "bos_token_id": 1, "eos_token_id": 2, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    spec = llama.read(HFConfig(config))
    names, header, offset = Names(llama, spec), {}, 0
    for name, shape in spec.tensors().items():
        size = 2 * torch.Size(shape).numel()
        header[names.tensor(name)] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    assert offset > 1.4e9
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for number, (name, shape) in enumerate(spec.tensors().items()):
            value = torch.randn(shape, generator=torch.Generator().manual_seed(number))
            value = value * 1.2 * shape[-1] ** -0.5 if len(shape) == 2 and name != "embed.weight" else value * 0.1 + 1
            file.write(value.bfloat16().view(torch.uint8).numpy())
    return folder


def resident(pid: int) -> int:
    """Bytes of a process that are in memory now."""
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def most_resident(pid: int) -> int:
    """Bytes of a process that were in memory at its largest: the kernel knows, however seldom it is asked."""
    return int(Path(f"/proc/{pid}/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024


START = """
import sys, torch, fewbit.cli, fewbit.compress, fewbit.engine.engine, fewbit.text.tokenizer
torch.randn(64, 64) @ torch.randn(64, 64)
print("ready", flush=True)
sys.stdin.readline()
sys.exit(fewbit.cli.run(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("recipe", ["int4", "fp8"])
def test_compressing_takes_the_memory_of_a_block(recipe, large, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"ids": ids(128, seed=s)}) for s in range(8)))
    line = ["compress", large, "--recipe", recipe, "-o", tmp_path / "out", "--json", "-q"]
    line += ["--kv", "fp8", "--calib", rows, "--samples", "8", "--length", "128"] if recipe != "int4" else []
    process = subprocess.Popen(
        [sys.executable, "-c", START, *map(str, line)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == "ready\n"
    before = resident(process.pid)
    peak = most_resident(process.pid)
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.append(process.stdout.read()))
    reader.start()
    process.stdin.write("\n")
    process.stdin.flush()
    started = time.monotonic()
    while process.poll() is None:
        try:
            peak = most_resident(process.pid)
        except (OSError, IndexError):  # it has ended
            break
        time.sleep(0.02)
    reader.join()
    assert process.wait() == 0
    report = json.loads(said[0])
    print(
        f"{recipe}: grew by {(peak - before) / 1e6:.0f} MB (it says {report['grown_bytes'] / 1e6:.0f}) "
        f"in {time.monotonic() - started:.0f} s; {report['seconds']}"
    )
    assert peak - before < LIMIT
    assert report["grown_bytes"] < LIMIT
    assert report["grown_bytes"] == pytest.approx(peak - before, abs=60e6)
    assert open_checkpoint(tmp_path / "out").quant


def private(pid: int | str) -> int:
    """Bytes of a process that are in memory now and no file's."""
    return int(Path(f"/proc/{pid}/status").read_text().partition("RssAnon:")[2].split()[0]) * 1024


@pytest.fixture(scope="module")
def quantized(tmp_path_factory) -> Path:
    """360 MB, three quarters of them the embedding and the head in bfloat16; random, nothing was compressed."""
    folder = tmp_path_factory.mktemp("quantized") / "model"
    sizes = {**SIZES, "intermediate_size": 4096, "num_hidden_layers": 12, "vocab_size": 65536}
    config = {**families()["llama"].TINY, **sizes, "bos_token_id": 1, "eos_token_id": 2, "dtype": "bfloat16"}
    made = dummy_checkpoint(config, read_recipe("int4"), torch.device("cpu"))
    dtypes = {name: made.tensors.dtype(name) for name in made.tensors}
    quantization = Quantization(made.quant, made.kv)
    with CheckpointWriter(folder, hf, made.family, made.spec, quantization, dtypes, config, {}, {}) as writer:
        for name, tensor in made.tensors.items():
            writer.add(name, tensor)
        writer.finish()
        writer.commit()
    write_tokenizer(folder)
    return folder


LOAD = """
import sys
from fewbit.engine.config import EngineOptions
from fewbit.engine.engine import generate, open_engine
from fewbit.engine.types import GenerateRequest, SamplingParams
from fewbit.ops.cpu.build import library
library()
print("ready", flush=True)
sys.stdin.readline()
engine = open_engine(sys.argv[1], EngineOptions(backend="auto", max_batch=1, max_model_len=64, num_blocks=4))
params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
generate(engine, [GenerateRequest(id="a", prompt=(5, 6, 7), params=params)])
print("answered", flush=True)
sys.stdin.readline()
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_loading_holds_weights_once(quantized):
    """Private memory while loading: the prepared weights and what one layer takes beside them; no embedding."""
    if isinstance(built := library(), str):
        pytest.skip(f"NO CPU KERNELS: {built}")
    checkpoint = open_checkpoint(quantized)
    spec, cpu = checkpoint.spec, torch.device("cpu")
    embedding = spec.vocab * spec.hidden * 2
    prepared = need(spec, checkpoint.quant, {}, torch.bfloat16, cpu, 1, 0).weights - embedding
    layer = sum(x.out_features * x.in_features for x in spec.layer_linears(0))  # a byte for each of its codes
    allowed = 4 * layer
    assert allowed < embedding / 2
    process = subprocess.Popen(
        [sys.executable, "-c", LOAD, str(quantized)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == "ready\n"
    before = peak = private(process.pid)
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.append(process.stdout.readline()))
    reader.start()
    process.stdin.write("\n")
    process.stdin.flush()
    while reader.is_alive():
        peak = max(peak, private(process.pid))
        reader.join(0.002)
    assert said == ["answered\n"]
    after = private(process.pid)
    process.communicate("\n")
    assert process.returncode == 0
    mb = [round(size / 1e6) for size in (prepared, after - before, peak - before, allowed)]
    print("prepared {} MB, private memory grew by {}, at most by {}; {} beside the weights allowed".format(*mb))
    assert prepared < after - before < peak - before + 1 < prepared + allowed


@pytest.mark.parametrize("kv", [None, "fp8", "int8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_cache_is_as_large_as_inspect_says(kv, dtype, tmp_path, capsys):
    """An FP8 cache kept in bfloat16 would fail here."""
    model = make_model(tmp_path / "model", dtype=dtype)
    if kv:
        line = ["compress", str(model), "--recipe", "int8_wo", "--kv", kv, "-o", str(tmp_path / "out"), "-q", "--json"]
        assert cli.run([*line, "--samples", "2", "--length", "64"]) == 0
        model = tmp_path / "out"
    capsys.readouterr()
    assert cli.run(["inspect", str(model), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["kv_bytes_per_token"]
    engine = open_engine(model, EngineOptions(num_blocks=11, block_size=16))
    tensors = engine.runner.cache.k + engine.runner.cache.v
    allocated = sum(t.untyped_storage().nbytes() for t in tensors)
    assert allocated / (11 * 16) == said == 2 * 2 * 64 * (1 if kv else dtype.itemsize)
    assert engine.stats().kv_bytes == allocated
    assert engine.config.token_bytes == said
