"""Laws of broken model directories: one clear line or a model that runs; never a crash, a hang, or foreign code."""

from __future__ import annotations

import json
import shutil
import struct
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1]))

from fewbit.checkpoint import export, open_checkpoint
from fewbit.compress import compress, plan, read_recipe
from fewbit.errors import FewbitError
from fewbit.model import load
from helpers import dense_logits, ids, make_model

RECIPES = {"compressed-tensors": ("int4", "fp8", "nvfp4"), "hf": ("nvfp4", "w4a8_awq_static"), "gptq": ("int4_gptq",)}
EXPORTED = {"awq": "int4_awq_asym", "trtllm": "int4_awq"}
WINDOW = [ids(12, 256, 3)]
SUPPRESSED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
EXAMPLES = settings(max_examples=30, suppress_health_check=SUPPRESSED)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, Path]:
    """Directories that open, by what they are: a float model, and every format that is written."""
    root = tmp_path_factory.mktemp("whole")
    found = {"float": make_model(root / "float", num_hidden_layers=1)}
    checkpoint = open_checkpoint(found["float"])

    def make(recipe: str, fmt: str, kv: str | None = None) -> Path:
        chosen = read_recipe(recipe).with_kv(kv)
        chosen = replace(chosen, calibration=replace(chosen.calibration, samples=2, length=32))
        target = root / f"{fmt}-{recipe}"
        compress(checkpoint, plan(checkpoint, chosen, fmt), target)
        return target

    for fmt, recipes in RECIPES.items():
        found |= {f"{fmt} {recipe}": make(recipe, fmt, None if fmt == "gptq" else "fp8") for recipe in recipes}
    for fmt, recipe in EXPORTED.items():
        export(open_checkpoint(make(recipe, "compressed-tensors")), fmt, root / fmt)
        found[fmt] = root / fmt
    return found


@pytest.fixture
def copied(whole, tmp_path):
    """`copied(which)`: a copy that may be broken."""
    count = iter(range(1 << 20))

    def copy(which: int) -> Path:
        names = sorted(whole)
        return Path(shutil.copytree(whole[names[which % len(names)]], tmp_path / str(next(count))))

    return copy


def outcome(path: Path) -> str | None:
    """What opening, reading and running say; None: it is a model."""
    said = None
    try:
        checkpoint = open_checkpoint(path)
        for name in checkpoint.tensors:
            checkpoint.tensors[name]
        dense_logits(load(checkpoint), WINDOW)
    except FewbitError as error:
        said = str(error)
    finally:
        shutil.rmtree(path)
    assert said is None or (said and "\n" not in said)
    return said


def weights_file(path: Path) -> Path:
    return min(path.rglob("*.safetensors"))


def header_of(file: Path) -> tuple[dict, bytes]:
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def put_header(file: Path, header: dict, data: bytes) -> None:
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


which = st.integers(0, 1 << 10)


@EXAMPLES
@given(which, st.floats(0, 0.999))
def test_a_file_that_ends_early(copied, which, share):
    path = copied(which)
    raw = weights_file(path).read_bytes()
    weights_file(path).write_bytes(raw[: int(len(raw) * share)])
    assert outcome(path)


@EXAMPLES
@given(which, st.integers(0, 7), st.integers(0, 255))
def test_a_header_of_any_length(copied, which, at, byte):
    path = copied(which)
    raw = bytearray(weights_file(path).read_bytes())
    changed = raw[at] != byte
    raw[at] = byte
    weights_file(path).write_bytes(raw)
    assert (outcome(path) is not None) == changed


@EXAMPLES
@given(which, which, st.sampled_from(["drop", "rename", "dtype", "shape", "overlap", "swap"]), st.data())
def test_a_header_that_says_something_else(copied, which, tensor, change, data):
    path = copied(which)
    header, raw = header_of(file := weights_file(path))
    names = sorted(name for name in header if name != "__metadata__")
    name = names[tensor % len(names)]
    entry, start = header[name], header[name]["data_offsets"][0]
    if change == "drop":
        del header[name]
    elif change == "rename":
        header[f"{name}_"] = header.pop(name)
    elif change == "dtype":
        known = ["F32", "F16", "BF16", "F8_E4M3", "U8", "I8", "I32", "F64", "Q4", 7]
        entry["dtype"] = data.draw(st.sampled_from([kind for kind in known if kind != entry["dtype"]]))
    elif change == "shape":
        entry["shape"] = [*entry["shape"], 2] if data.draw(st.booleans()) else [-1]
    else:
        other = header[names[(tensor + 1) % len(names)]]
        if change == "overlap":
            other["data_offsets"] = [start, start + other["data_offsets"][1] - other["data_offsets"][0]]
        else:
            entry["data_offsets"], other["data_offsets"] = other["data_offsets"], entry["data_offsets"]
        if len(names) == 1 or entry == other:
            return
    put_header(file, header, raw)
    said = outcome(path)
    same_kind = change == "swap"  # two tensors of one shape change places: another model, not a broken one
    # sizes of one width and another type are told apart by the config, floats of scales may be any
    allowed = same_kind or (change == "dtype" and {entry["dtype"]} & {"F16", "BF16", "F32"})
    assert said or allowed, (change, name, entry)


@EXAMPLES
@given(which, which, st.sampled_from([float("nan"), float("inf"), float("-inf")]), st.data())
def test_scales_that_are_no_numbers(copied, which, tensor, value, data):
    path = copied(which)
    header, raw = header_of(file := weights_file(path))
    kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    scales = sorted(n for n, e in header.items() if "scal" in n and n != "__metadata__" and e["dtype"] in kinds)
    if not scales:
        shutil.rmtree(path)
        return
    entry = header[scales[tensor % len(scales)]]
    start, stop = entry["data_offsets"]
    stored = torch.tensor([value], dtype=kinds[entry["dtype"]]).view(torch.uint8).numpy().tobytes()
    at = start + data.draw(st.integers(0, (stop - start) // len(stored) - 1)) * len(stored)
    put_header(file, header, raw[:at] + stored + raw[at + len(stored) :])
    assert outcome(path)


values = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=5), st.just([]), st.just({}),
    st.just([[]]), st.sampled_from([0, 1, 2, 3, 7, 64, 10**12]),
)  # fmt: skip


@settings(max_examples=150, suppress_health_check=SUPPRESSED)
@given(which, which, which, values)
def test_configs_with_any_value(copied, which, file, key, value):
    path = copied(which)
    files = sorted(f for f in path.rglob("*.json") if "token" not in f.name)
    chosen = files[file % len(files)]
    config = json.loads(chosen.read_text())
    places = [(config, k) for k in config]
    for outer in list(config.values()):
        if isinstance(outer, dict):
            places += [(outer, k) for k in outer]
            places += [(inner, k) for inner in outer.values() if isinstance(inner, dict) for k in inner]
    holder, name = places[key % len(places)]
    holder[name] = value
    chosen.write_text(json.dumps(config))
    outcome(path)


@EXAMPLES
@given(which, st.sampled_from(["../x.safetensors", "/etc/passwd", "a/b.safetensors", "", ".", "..", 3, None]))
def test_an_index_that_names_any_place(copied, which, place):
    path = copied(which)
    if (path / "config.json").exists() and (path / "model.safetensors").exists():
        header, _ = header_of(path / "model.safetensors")
        weight_map = dict.fromkeys((n for n in header if n != "__metadata__"), "model.safetensors")
        weight_map[min(weight_map)] = place
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        assert outcome(path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.ckpt", "model.pkl"])
def test_no_code_of_a_model_runs(copied, whole, name):
    path = copied(sorted(whole).index("float"))
    marker = path.parent / "ran"
    code = f"open({str(marker)!r}, 'w')"
    config = json.loads((path / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration.Config", "AutoModelForCausalLM": "modeling.Model"}
    (path / "config.json").write_text(json.dumps(config))
    for module in ("configuration", "modeling", "tokenization", "conftest"):
        (path / f"{module}.py").write_text(code)
    # a pickle that opens a file when it is loaded
    (path / name).write_bytes(b"cbuiltins\nexec\n(V" + code.encode() + b"\ntR.")
    assert outcome(path) is None
    assert not marker.exists()
    path = copied(sorted(whole).index("float"))
    weights_file(path).unlink()
    (path / name).write_bytes(b"cbuiltins\nexec\n(V" + code.encode() + b"\ntR.")
    assert outcome(path)
    assert not marker.exists()
