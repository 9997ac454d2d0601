"""A model directory that is not as it must be: one clear error that names what is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewbit.checkpoint import locate, open_checkpoint
from fewbit.checkpoint.files import MAPPED_BYTES, read_tensor
from fewbit.checkpoint.layout import Stored
from fewbit.compress import compress, plan, read_recipe
from fewbit.errors import CheckpointError, FewbitError, UnsupportedError
from helpers import edit_json, make_model

Q = "model.layers.1.self_attn.q_proj.weight"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def model(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


@pytest.fixture
def sharded(model) -> Path:
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = sorted(tensors)
    places = {n: SHARDS[i >= len(names) // 2] for i, n in enumerate(names)}
    for shard in SHARDS:
        save_file({n: t for n, t in tensors.items() if places[n] == shard}, model / shard)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return model


def refused(path: Path) -> str:
    """The one line that opening it ends with."""
    with pytest.raises(FewbitError) as e:
        open_checkpoint(path)
    assert "\n" not in str(e.value)
    return str(e.value)


def change(path: Path, file: str = "model.safetensors", **tensors: torch.Tensor | None) -> None:
    """Replace tensors by name; None takes one away."""
    old = load_file(path / file) | {n.replace("__", "."): t for n, t in tensors.items()}
    save_file({n: t for n, t in old.items() if t is not None}, path / file)


def test_opening_reads_no_weight(model, monkeypatch):
    monkeypatch.setattr("fewbit.checkpoint.files.ModelFiles.read", lambda *_: pytest.fail("read a weight"))
    checkpoint = open_checkpoint(model)
    assert checkpoint.dtype == torch.bfloat16
    assert checkpoint.format == "hf"
    assert {"tokenizer.json", "tokenizer_config.json"} == set(checkpoint.files)


def test_tensors_come_as_stored_and_are_not_kept(model):
    tensors = load_file(model / "model.safetensors")
    checkpoint = open_checkpoint(model)
    for name, tensor in checkpoint.tensors.items():
        assert torch.equal(tensor, tensors[_source(checkpoint, name)]), name
    assert checkpoint.tensors["embed.weight"] is not checkpoint.tensors["embed.weight"]


def _source(checkpoint, name: str) -> str:
    from fewbit.checkpoint.names import Names

    return Names(checkpoint.family, checkpoint.spec).tensor(name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("said", ["dtype", "torch_dtype", None])
def test_each_dtype(tmp_path, dtype, said):
    path = make_model(tmp_path, dtype=dtype)
    name = str(dtype).removeprefix("torch.")
    edit_json(path / "config.json", dtype=name if said == "dtype" else None, torch_dtype=name if said else None)
    assert open_checkpoint(path).dtype == dtype


def test_no_directory(tmp_path):
    assert (
        refused(tmp_path / "gone") == f"{tmp_path / 'gone'} is not a directory; expected a Hugging Face model directory"
    )


def test_no_config(model):
    (model / "config.json").unlink()
    assert refused(model) == f"{model} has no config.json; expected a Hugging Face model directory"


@pytest.mark.parametrize("text", ["{", "", "[1]", '"a"', "[" * 100_000, "\xff\xfe{}"])
def test_bad_json(model, text):
    (model / "config.json").write_bytes(text.encode("latin-1"))
    assert refused(model).startswith(f"{model / 'config.json'} ")


def test_a_missing_tensor(model):
    change(model, **{Q.replace(".", "__"): None})
    assert refused(model) == f"tensor '{Q}' [128, 128] is missing from {model}"


def test_an_extra_tensor(model):
    change(model, model__layers__0__self_attn__q_proj__bias=torch.zeros(128))
    assert refused(model) == (
        f"tensor 'model.layers.0.self_attn.q_proj.bias' in {model} belongs to nothing in config.json"
    )
    change(model, model__layers__9__x=torch.zeros(1), a=torch.zeros(1))
    assert "tensor 'a' (and 2 more)" in refused(model)


def test_tensors_that_are_knowingly_dropped(model):
    change(model, model__layers__0__self_attn__rotary_emb__inv_freq=torch.zeros(16))
    open_checkpoint(model)


def test_a_misshapen_tensor(model):
    change(model, **{Q.replace(".", "__"): torch.zeros(128, 64)})
    assert refused(model) == f"tensor '{Q}' has shape [128, 64], expected [128, 128] by config.json"


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.int64, torch.uint8])
def test_a_dtype_that_is_no_weight(model, dtype):
    change(model, **{Q.replace(".", "__"): torch.zeros(128, 128).to(dtype)})
    assert refused(model) == f"tensor '{Q}' is {dtype}, though the config does not call it quantized"


def test_a_dtype_that_is_not_read(model):
    change(model, **{Q.replace(".", "__"): torch.zeros(128, 128, dtype=torch.float64)})
    assert refused(model) == f"model.safetensors: tensor '{Q}' has dtype F64, which fewbit does not read"


def test_a_dtype_that_config_names_and_nobody_knows(model):
    edit_json(model / "config.json", dtype="float64")
    assert refused(model) == "config.json: dtype 'float64' is not supported; known: float32, float16, bfloat16"


@pytest.mark.parametrize("keep", [0, 4, 100, -1, -1000])
def test_a_truncated_file(model, keep):
    file = model / "model.safetensors"
    raw = file.read_bytes()
    file.write_bytes(raw[:keep])
    assert refused(model).startswith("model.safetensors is damaged or truncated (")


def test_a_file_cut_while_it_is_read(model):
    checkpoint = open_checkpoint(model)
    raw = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(CheckpointError, match=r"model.safetensors ends inside tensor '.*': the file is truncated"):
        list(checkpoint.tensors.values())


@pytest.mark.parametrize("start", [8, 9])  # whole numbers of the dtype from the beginning are mapped, others read
def test_a_large_tensor_is_its_users_own(start, tmp_path):
    values = torch.randn(1024, 512, generator=torch.Generator().manual_seed(0))
    file, stored = tmp_path / "file", Stored(torch.float32, (1024, 512))
    assert stored.nbytes >= MAPPED_BYTES
    file.write_bytes(raw := bytes(start) + values.numpy().tobytes())
    held, other = (read_tensor(file, start, stored, "t") for _ in range(2))
    maps = Path("/proc/self/maps")
    assert not maps.exists() or (str(file) in maps.read_text()) == (start == 8)
    held.zero_()
    assert torch.equal(other, values)
    assert file.read_bytes() == raw
    file.unlink()
    assert torch.equal(other, values)
    del held, other
    assert not maps.exists() or str(file) not in maps.read_text()


def test_a_large_tensor_of_a_file_that_is_cut(tmp_path):
    (file := tmp_path / "file").write_bytes(bytes(MAPPED_BYTES + 7))
    with pytest.raises(CheckpointError, match="file ends inside tensor 't': the file is truncated"):
        read_tensor(file, 8, Stored(torch.uint8, (MAPPED_BYTES,)), "t")


def test_shards(sharded, whole):
    checkpoint, before = open_checkpoint(sharded), open_checkpoint(whole)
    assert set(checkpoint.tensors) == set(before.tensors)
    assert all(torch.equal(checkpoint.tensors[n], before.tensors[n]) for n in before.tensors)


def test_a_missing_shard(sharded):
    (sharded / SHARDS[1]).unlink()
    assert refused(sharded) == (f"{SHARDS[1]} is missing from {sharded}, though model.safetensors.index.json names it")


def test_a_shard_without_what_the_index_promises(sharded):
    change(sharded, SHARDS[0], **{next(iter(sorted(load_file(sharded / SHARDS[0])))).replace(".", "__"): None})
    assert refused(sharded).startswith(f"{SHARDS[0]} lacks tensor '")


@pytest.mark.parametrize("place", ["../other.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "a\\b", 7])
def test_an_index_that_leaves_the_directory(sharded, place):
    file = sharded / "model.safetensors.index.json"
    places = json.loads(file.read_text())["weight_map"]
    edit_json(file, weight_map=places | {Q: place})
    assert refused(sharded) == (
        f"model.safetensors.index.json places '{Q}' in {place!r}, outside of the model directory"
    )


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": ["a"]}])
def test_an_index_that_is_none(sharded, index):
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    assert refused(sharded).endswith("expected an object 'weight_map'")


def test_a_tensor_in_two_files(sharded):
    name = min(load_file(sharded / SHARDS[1]))
    change(sharded, SHARDS[0], **{name.replace(".", "__"): torch.zeros(1)})
    assert refused(sharded) == f"tensor '{name}' is in {SHARDS[1]} and in {SHARDS[0]}"


def test_shards_without_an_index(sharded):
    (sharded / "model.safetensors.index.json").unlink()
    assert refused(sharded) == (
        f"{sharded} holds 2 safetensors files but no model.safetensors.index.json that orders them"
    )


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickle_alone_is_refused_and_told_how_to_convert(model, name):
    (model / "model.safetensors").rename(model / name)
    assert refused(model) == (
        f"{model} holds its weights as pickle ({name}), which can run code when opened; convert it once with "
        "transformers: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OUT)"
    )


def test_pickle_beside_safetensors_is_not_looked_at(model):
    (model / "pytorch_model.bin").write_bytes(b"not even a pickle")
    open_checkpoint(model)


def test_no_weights(model):
    (model / "model.safetensors").unlink()
    assert refused(model) == f"{model} holds no weights; expected model.safetensors or model.safetensors.index.json"


@pytest.mark.parametrize("value", [None, [], "LlamaForCausalLM", [3]])
def test_no_architecture(model, value):
    raw = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(raw | {"architectures": value}))
    assert refused(model) == f"config.json: 'architectures' is {value!r}, expected a list with one name"


def test_an_unknown_architecture(model):
    edit_json(model / "config.json", architectures=["LamaForCausalLM"])
    assert refused(model) == "architecture 'LamaForCausalLM' is not supported; did you mean 'LlamaForCausalLM'?"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ({"quant_method": "hqq"}, "is quantized as 'hqq', which fewbit does not read; known: awq, "),
        (
            {"quant_method": "modelopt", "quant_algo": "NVFP4_SVD"},
            "quant_algo 'NVFP4_SVD' is not supported; known: FP8",
        ),
        (
            {"quant_method": "modelopt", "quant_algo": None, "kv_cache_scheme": "NVFP4_AFFINE"},
            "kv_cache_quant_algo 'NVFP4_AFFINE' is not supported",
        ),
        (
            {"quant_method": "compressed-tensors", "sparsity_config": {"format": "marlin-24"}},
            "sparse storage 'marlin-24' is not read; known: sparse-24-bitmask, sparse-bitmask",
        ),
        (
            {"quant_method": "compressed-tensors", "transform_config": {"config_groups": {"u": {}}}},
            "transforms are not supported",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {
                    "group_0": {
                        "targets": ["Linear"],
                        "weights": {"num_bits": 3, "strategy": "channel", "type": "float"},
                    }
                },
            },
            "group_0: compressed-tensors arguments",
        ),
        ({"quant_method": "compressed-tensors", "config_groups": {"g": {"targets": ["Linear"]}}}, "g: quantizes no"),
        (
            {"quant_method": "compressed-tensors", "config_groups": "all"},
            "calls itself compressed-tensors, is not put together as it should be",
        ),
        ({"quant_method": "compressed-tensors", "config_groups": {"g": 4}}, "is not put together as it should be"),
        ("int4", "'quantization_config' is 'int4', expected an object"),
    ],
)
def test_an_unknown_quantization(model, words, sentence):
    edit_json(model / "config.json", quantization_config=words)
    assert sentence in refused(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.0.input_layernorm.weight",
        "lm_head.weight",
        "model.embed_tokens.weight",
    ],
)
def test_nan_in_the_weights_names_the_tensor(tmp_path, dtype, bad, name):
    path = make_model(tmp_path / "model", dtype=dtype)
    tensors = load_file(path / "model.safetensors")
    tensors[name].view(-1)[3] = bad
    save_file(tensors, path / "model.safetensors")
    checkpoint = open_checkpoint(path)
    with pytest.raises(CheckpointError, match="holds NaN or infinity; repair the weights first") as e:
        compress(checkpoint, plan(checkpoint, read_recipe("int8_wo")), tmp_path / "out")
    assert str(e.value).startswith(f"tensor '{name}' ")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_tied_head_may_lie_in_the_file_too(tmp_path):
    path = make_model(tmp_path, tie_word_embeddings=True)
    change(path, lm_head__weight=torch.zeros(384, 128, dtype=torch.bfloat16))
    checkpoint = open_checkpoint(path)
    assert "lm_head.weight" not in checkpoint.tensors


def test_a_damaged_quantized_model(tmp_path):
    path = make_model(tmp_path / "model")
    checkpoint = open_checkpoint(path)
    out = tmp_path / "out"
    compress(checkpoint, plan(checkpoint, read_recipe("int4")), out)
    module = "model.layers.0.mlp.up_proj"
    whole = load_file(out / "model.safetensors")
    for name, tensor, words in (
        (f"{module}.weight_scale", None, f"tensor '{module}.weight_scale' [256, 1] is missing from {out}"),
        (
            f"{module}.weight_packed",
            torch.zeros(256, 16),
            f"tensor '{module}.weight_packed' is torch.float32, expected torch.int32",
        ),
        (f"{module}.weight_zero_point", torch.zeros(1), f"tensor '{module}.weight_zero_point' in {out} belongs to no"),
        (f"{module}.weight", torch.zeros(1), f"tensor '{module}.weight' in {out} belongs to nothing"),
    ):
        save_file({n: t for n, t in (whole | {name: tensor}).items() if t is not None}, out / "model.safetensors")
        assert words in refused(out)
    save_file(whole | {f"{module}.weight_shape": torch.tensor([256, 127])}, out / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"weight_shape says \[256, 127\], the model's config \[256, 128\]") as e:
        open_checkpoint(out).tensors["layers.0.mlp.up.weight"]
    assert module in str(e.value)


def test_two_configs_that_disagree(tmp_path):
    checkpoint = open_checkpoint(make_model(tmp_path / "model"))
    compress(checkpoint, plan(checkpoint, read_recipe("fp8_dynamic"), "hf"), tmp_path / "out")
    file = tmp_path / "out" / "hf_quant_config.json"
    nested = json.loads(file.read_text())
    nested["quantization"]["quant_algo"] = "FP8"
    file.write_text(json.dumps(nested))
    assert refused(tmp_path / "out") == (
        "hf_quant_config.json says quant_algo 'FP8' and config.json 'FP8_PER_CHANNEL_PER_TOKEN'"
    )


def test_a_hub_id_offline_says_which_command_would_fetch_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(CheckpointError, match="where there is a network: hf download nobody/nothing-at-all"):
        locate("nobody/nothing-at-all")
    with pytest.raises(CheckpointError, match=r"^a/b/c is not a directory; expected a Hugging Face model directory$"):
        locate("a/b/c")
    (tmp_path / "here").mkdir()
    assert locate(tmp_path / "here") == tmp_path / "here"


def test_an_unknown_format_to_write(tmp_path):
    checkpoint = open_checkpoint(make_model(tmp_path / "model"))
    with pytest.raises(UnsupportedError, match="unknown checkpoint format 'hff'; did you mean 'hf'"):
        plan(checkpoint, read_recipe("fp8"), "hff")
