"""NeMo archives: read from where they lie, nothing unpacked, no pickle executed."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import tarfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from safetensors.torch import load_file

from fewbit.checkpoint import export, open_checkpoint
from fewbit.cli import run
from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.model import load
from helpers import dense_logits, ids, make_model, same_tensors

HASH = "0123456789abcdef0123456789abcdef_"


def megatron(source: Path, prefix: str = "model.", stacked: bool = False) -> dict[str, torch.Tensor]:
    """The tensors of a Hugging Face directory as Megatron core has them, row by row."""
    config = json.loads((source / "config.json").read_text())
    t = load_file(source / "model.safetensors")
    heads, kv, dim = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    found = {"embedding.word_embeddings.weight": t["model.embed_tokens.weight"]}
    for leaf in ("weight", "bias"):
        if f"model.norm.{leaf}" in t:
            found[f"decoder.final_layernorm.{leaf}"] = t[f"model.norm.{leaf}"]
    if "lm_head.weight" in t:
        found["output_layer.weight"] = t["lm_head.weight"]
    for i in range(config["num_hidden_layers"]):
        h, m = f"model.layers.{i}", f"decoder.layers.{i}"
        q, k, v = (t[f"{h}.self_attn.{n}_proj.weight"] for n in "qkv")
        rows = []
        for group in range(kv):
            for head in range(group * heads // kv, (group + 1) * heads // kv):
                rows += [q[head * dim + d] for d in range(dim)]
            rows += [k[group * dim + d] for d in range(dim)]
            rows += [v[group * dim + d] for d in range(dim)]
        found[f"{m}.self_attention.linear_qkv.weight"] = torch.stack(rows)
        found[f"{m}.self_attention.linear_proj.weight"] = t[f"{h}.self_attn.o_proj.weight"]
        up = t[f"{h}.mlp.up_proj.weight"]
        gated = f"{h}.mlp.gate_proj.weight" in t
        found[f"{m}.mlp.linear_fc1.weight"] = torch.cat((t[f"{h}.mlp.gate_proj.weight"], up)) if gated else up
        found[f"{m}.mlp.linear_fc2.weight"] = t[f"{h}.mlp.down_proj.weight"]
        for theirs, ours in (
            ("self_attention.linear_qkv", "input_layernorm"),
            ("mlp.linear_fc1", "post_attention_layernorm"),
        ):
            for leaf in ("weight", "bias"):
                if f"{h}.{ours}.{leaf}" in t:
                    found[f"{m}.{theirs}.layer_norm_{leaf}"] = t[f"{h}.{ours}.{leaf}"]
    if stacked:
        layers = config["num_hidden_layers"]
        alike = {n.replace("layers.0.", "layers.") for n in found if ".layers.0." in n}
        for name in alike:
            found[name] = torch.stack([found.pop(name.replace("layers.", f"layers.{i}.")) for i in range(layers)])
    return {f"{prefix}{name}": tensor.contiguous() for name, tensor in found.items()}


def settings(source: Path, **changes: Any) -> bytes:
    c = json.loads((source / "config.json").read_text())
    llama = c["model_type"] == "llama"
    said = {
        "mcore_gpt": True,
        "hidden_size": c["hidden_size"],
        "num_layers": c["num_hidden_layers"],
        "num_attention_heads": c["num_attention_heads"],
        "num_query_groups": c["num_key_value_heads"],
        "kv_channels": c["head_dim"],
        "ffn_hidden_size": c["intermediate_size"],
        "max_position_embeddings": c["max_position_embeddings"],
        "layernorm_epsilon": c["rms_norm_eps"] if llama else c["norm_eps"],
        "normalization": "rmsnorm" if llama else "layernorm1p",
        "activation": "fast-swiglu" if llama else "squared-relu",
        "position_embedding_type": "rope",
        "rotary_percentage": 1.0 if llama else c["partial_rotary_factor"],
        "rotary_base": c["rope_theta"],
        "share_embeddings_and_output_weights": c["tie_word_embeddings"],
        "bias": False,
        "tokenizer": {"library": "huggingface", "type": f"nemo:{HASH}tokenizer"},
    }
    return yaml.safe_dump({k: v for k, v in (said | changes).items() if v != "absent"}).encode()


def saved(tensors: Any) -> bytes:
    raw = io.BytesIO()
    torch.save(tensors, raw)
    return raw.getvalue()


def archive(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def tokenizer(source: Path) -> dict[str, bytes]:
    return {f"./{HASH}{n}": (source / n).read_bytes() for n in ("tokenizer.json", "tokenizer_config.json")}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("source"), rope_scaling=None)


def packed(source: Path, path: Path, weights: Any = None, **changes: Any) -> Path:
    tensors = megatron(source) if weights is None else weights
    members = {"./model_config.yaml": settings(source, **changes), "./model_weights.ckpt": saved(tensors)}
    return archive(path, members | tokenizer(source))


@pytest.mark.parametrize("family", ["llama", "nemotron"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_torch_archive(family, tied, tmp_path):
    scaling = {"rope_scaling": None} if family == "llama" else {}
    source = make_model(tmp_path / "source", family, tie_word_embeddings=tied, **scaling)
    extra = {"model.decoder.layers.0.self_attention.linear_qkv._extra_state": io.BytesIO(b"x")}
    path = packed(source, tmp_path / "a.nemo", {**megatron(source), **extra})
    first, second = open_checkpoint(source), open_checkpoint(path)
    assert (first.spec, first.dtype) == (second.spec, second.dtype)
    same_tensors(first, second)
    window = [ids(20)]
    assert torch.equal(dense_logits(load(first), window), dense_logits(load(second), window))
    assert set(second.files) == {"tokenizer.json", "tokenizer_config.json"}


def test_positions_of_llama_3_and_interpolated_ones(source, tmp_path):
    def position(**changes: Any):
        return open_checkpoint(packed(source, tmp_path / "a.nemo", **changes)).spec.layers[0].attention.position

    assert (position(scale_positional_embedding=True).scaling.factor, position().scaling) == (8.0, None)
    assert position(seq_len_interpolation_factor=4).scaling.factor == 4
    assert position(rotary_base="absent").theta == 10000.0


def test_an_unpacked_archive_and_norms_of_their_own(source, tmp_path):
    tensors = megatron(source, "")
    for old, new in (("self_attention.linear_qkv.layer_norm", "input_layernorm."),
                     ("mlp.linear_fc1.layer_norm", "pre_mlp_layernorm.")):  # fmt: skip
        tensors = {n.replace(f"{old}_", new): t for n, t in tensors.items()}
    (tmp_path / "model_config.yaml").write_bytes(settings(source))
    torch.save(tensors, tmp_path / "model_weights.ckpt")
    same_tensors(open_checkpoint(source), open_checkpoint(tmp_path))


@pytest.mark.parametrize("stacked", [False, True])
def test_a_distributed_checkpoint(source, stacked, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        writer = dcp.FileSystemWriter(tmp_path / "dist", single_file_per_rank=not stacked)
        dcp.save(megatron(source, stacked=stacked), storage_writer=writer, no_dist=True)
    members = {f"model_weights/{f.name}": f.read_bytes() for f in (tmp_path / "dist").iterdir()}
    path = archive(tmp_path / "a.nemo", {"model_config.yaml": settings(source), **members} | tokenizer(source))
    same_tensors(open_checkpoint(source), open_checkpoint(path))
    shorter = {n: d for n, d in members.items() if n.endswith(".metadata") or stacked}
    if not stacked:
        archive(path, {"model_config.yaml": settings(source), **shorter})
        with pytest.raises(CheckpointError, match=r"'model_weights/__0_0.distcp' is missing, though"):
            open_checkpoint(path)


def test_it_is_served_and_exported_like_any_other(source, tmp_path, capsys):
    path = packed(source, tmp_path / "a.nemo")
    said = []
    for model in (source, path):
        assert (
            run(
                [
                    "run",
                    str(model),
                    *["--prompt", "Once", "--max-tokens", "8", "--temperature", "0", "--device", "cpu", "-q"],
                ]
            )
            == 0
        )
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    export(open_checkpoint(path), "hf", tmp_path / "out")
    same_tensors(open_checkpoint(source), open_checkpoint(tmp_path / "out"))
    assert (
        run(["compress", str(path), "--recipe", "int8_wo", "-o", str(tmp_path / "small"), "--sample-tokens", "0"]) == 0
    )
    assert (tmp_path / "small" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


class Evil:
    """What runs when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def test_no_pickle_is_executed(source, tmp_path):
    mark = tmp_path / "executed"
    path = packed(source, tmp_path / "a.nemo", {**megatron(source), "evil": Evil(mark)})
    with pytest.raises(CheckpointError, match=r"model_weights.ckpt is damaged or would need code to be run"):
        open_checkpoint(path)
    members = {"model_config.yaml": settings(source), "model_weights/.metadata": pickle.dumps(Evil(mark))}
    with pytest.raises(CheckpointError, match=r".metadata asks for posix.mkdir"):
        open_checkpoint(archive(path, members))
    members["model_config.yaml"] = b"!!python/object/apply:os.mkdir [" + str(mark).encode() + b"]"
    members["model_weights.ckpt"] = saved(megatron(source))
    with pytest.raises(CheckpointError, match=r"model_config.yaml cannot be read"):
        open_checkpoint(archive(path, members))
    assert not mark.exists()


def test_members_that_point_outside_are_refused(source, tmp_path):
    good = {"model_config.yaml": settings(source), "model_weights.ckpt": saved(megatron(source))}
    for name in ("../escaped", "/etc/escaped", "a/../../escaped"):
        with pytest.raises(CheckpointError, match="points outside of the archive"):
            open_checkpoint(archive(tmp_path / "a.nemo", good | {name: b"x"}))
    with tarfile.open(tmp_path / "b.nemo", "w") as tar:
        link = tarfile.TarInfo("model_config.yaml")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(CheckpointError, match="is a link or a device"):
        open_checkpoint(tmp_path / "b.nemo")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "model_config.yaml").write_bytes(settings(source))
    (tmp_path / "c" / "model_weights.ckpt").symlink_to("/etc/passwd")
    with pytest.raises(CheckpointError, match="is a link"):
        open_checkpoint(tmp_path / "c")
    with tarfile.open(tmp_path / "d.nemo", "w") as tar:
        for _ in range(2):
            tar.addfile(tarfile.TarInfo("model_config.yaml"))
    with pytest.raises(CheckpointError, match="is there twice"):
        open_checkpoint(tmp_path / "d.nemo")


def test_broken_archives(source, tmp_path):
    path = packed(source, tmp_path / "a.nemo")
    whole = path.read_bytes()

    def refused(said: str, error: type[Exception] = CheckpointError) -> None:
        with pytest.raises(error, match=said):
            dict(open_checkpoint(path).tensors)

    path.write_bytes(gzip.compress(whole))
    refused("is compressed; unpack it once")
    path.write_bytes(b"not a tar at all" * 100)
    refused("is damaged or no .nemo archive")
    path.write_bytes(whole[: len(whole) // 2])
    refused("damaged|ends early|no file of torch.save")
    config, weights = settings(source), saved(megatron(source))
    archive(path, {"model_weights.ckpt": weights})
    refused("holds no model_config.yaml")
    archive(path, {"model_config.yaml": config})
    refused("holds no weights")
    archive(path, {"model_config.yaml": config, "model_weights.ckpt": b"\x80\x02}q\x00."})
    refused("is no file of torch.save")
    ranks = {f"tp_rank_0{i}/model_weights.ckpt": weights for i in range(2)}
    archive(path, {"model_config.yaml": config, **ranks})
    refused("is split over 2 ranks", UnsupportedError)
    archive(path, {"model_config.yaml": config, "model_weights/model.x/.zarray": b"{}"})
    refused("distributed checkpoint of the zarr kind; only torch_dist is read", UnsupportedError)
    old = {"model.language_model.embedding.word_embeddings.weight": torch.zeros(4, 4)}
    packed(source, path, old)
    refused("before Megatron core", UnsupportedError)
    tensors = megatron(source)
    packed(source, path, {n: t for n, t in tensors.items() if "layers.1.mlp.linear_fc2" not in n})
    refused("'model.layers.1.mlp.down_proj.weight' .* is missing")
    packed(source, path, tensors | {"model.decoder.surprise": torch.zeros(2)})
    refused("'a.nemo: model.decoder.surprise' .* belongs to nothing")
    packed(source, path, tensors | {"model.decoder.layers.0.mlp.linear_fc1.weight": torch.zeros(3, 128)})
    refused("expected \\[512, 128\\]")
    for changes, said in (
        ({"activation": "gelu"}, "normalization rmsnorm with activation gelu is not supported"),
        ({"position_embedding_type": "learned_absolute"}, "position_embedding_type: 'learned_absolute' is not"),
        ({"num_moe_experts": 8}, "num_moe_experts: 8 is not supported"),
        ({"bias": True}, "bias: True is not supported"),
        ({"rotary_percentage": 0.5}, "rotary_percentage other than 1"),
    ):
        packed(source, path, **changes)
        refused(said, UnsupportedError)
    packed(source, path, hidden_size="absent")
    refused("lacks 'hidden_size'")
