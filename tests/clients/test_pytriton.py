"""PyTriton's ModelClient, in its own environment, sends the tensors of NeMo's query classes and reads the answers."""

from __future__ import annotations

import json

import pytest
from client_server import run, serving
from tokenizers import Tokenizer

pytestmark = pytest.mark.slow

PROMPTS = ["Once upon a time", "Lily had a cat."]
# Each query class as it fills its tensors: (N, 1) for N prompts, words as a column of their own length.
SCRIPT = """
import json, sys
import numpy as np
from pytriton.client import ModelClient

url, prompts = sys.argv[1], json.loads(sys.argv[2])

def words(texts):
    return np.char.encode(np.array(texts)[..., np.newaxis], "utf-8")

rows = words(prompts)

def all_of(value, kind):
    return np.full(rows.shape, value, dtype=kind)

queries = {
    "tensorrt_llm": {
        "max_output_len": all_of(16, np.int_), "min_output_len": all_of(16, np.int_), "top_k": all_of(1, np.int_),
        "top_p": all_of(0.0, np.single), "temperature": all_of(1.0, np.single), "random_seed": all_of(7, np.int_),
        "stop_words_list": words(["zebra", "quark", "!?"]), "bad_words_list": words(["dog"]),
        "repetition_penalty": all_of(1.0, np.single), "use_greedy": all_of(True, np.bool_),
        "output_context_logits": all_of(False, np.bool_), "output_generation_logits": all_of(False, np.bool_),
    },
    "pytorch": {
        "max_length": all_of(16, np.int_), "min_length": all_of(1, np.int_), "top_k": all_of(1, np.int_),
        "top_p": all_of(0.0, np.single), "temperature": all_of(1.0, np.single), "end_strings": words(["zebra"]),
        "compute_logprob": all_of(True, np.bool_), "n_top_logprobs": all_of(2, np.int_),
        "echo": all_of(True, np.bool_), "apply_chat_template": all_of(False, np.bool_),
    },
    "huggingface": {
        "max_length": all_of(16, np.int_), "use_greedy": all_of(True, np.bool_), "all_probs": all_of(False, np.bool_),
        "output_logits": all_of(False, np.bool_), "output_scores": all_of(False, np.bool_),
    },
    "vllm": {
        "max_tokens": all_of(16, np.int_), "min_tokens": all_of(1, np.int_), "n_log_probs": all_of(1, np.int_),
        "n_prompt_log_probs": all_of(1, np.int_), "seed": all_of(1, np.int_), "top_k": all_of(1, np.int_),
        "top_p": all_of(1.0, np.single), "temperature": all_of(1.0, np.single),
    },
}
said = {}
with ModelClient(url, "storyteller", init_timeout_s=60.0, inference_timeout_s=60) as client:
    first = client.model_config.outputs[0]
    said["config"] = [client.model_config.max_batch_size, first.name, first.dtype is np.bytes_]
    for name, tensors in queries.items():
        found = client.infer_batch(prompts=rows, **tensors)
        said[name] = {
            key: np.char.decode(value.astype("bytes"), "utf-8").tolist() if value.dtype == object else value.tolist()
            for key, value in found.items()
        }
    try:
        client.infer_batch(prompts=rows, lora_uids=np.full((len(prompts), 1), b"7"))
    except Exception as error:
        said["error"] = str(error)
print("SAID " + json.dumps(said))
"""


@pytest.fixture(scope="module")
def said(storyteller, program, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("pytriton")
    (folder / "query.py").write_text(SCRIPT)
    python = program("pytriton", "python")
    with serving(storyteller, "--name", "storyteller", "--device", "cpu", "--triton-flavor", "nemo") as url:
        printed = run([python, "query.py", url, json.dumps(PROMPTS)], folder)
    return json.loads(printed[printed.index("SAID ") :].removeprefix("SAID "))


def test_the_config_is_read(said):
    assert said["config"] == [1024, "outputs", True]


def test_the_texts_are_the_same_through_each_class(said, storyteller):
    texts = said["huggingface"]["sentences"]
    assert [len(row) for row in texts] == [1, 1]
    assert texts == said["huggingface"]["outputs"] == said["vllm"]["sentences"] == said["tensorrt_llm"]["outputs"]
    assert said["pytorch"]["sentences"] == [[p + t] for p, (t,) in zip(PROMPTS, texts, strict=True)]
    tokenizer = Tokenizer.from_file(str(storyteller / "tokenizer.json"))
    counts = [
        len(tokenizer.encode(p + t).ids) - len(tokenizer.encode(p).ids) for p, (t,) in zip(PROMPTS, texts, strict=True)
    ]
    assert all(abs(count - 16) <= 1 for count in counts)  # a text may be told in other tokens than it was made of


def test_the_log_probabilities_come_where_they_were_asked_for(said):
    assert set(said["tensorrt_llm"]) == {"outputs", "sentences"}
    assert set(said["pytorch"]) == {"outputs", "sentences", "log_probs", "top_logprobs"}
    assert set(said["vllm"]) == {"outputs", "sentences", "top_logprobs", "prompt_log_probs"}
    assert [len(row) for row in said["pytorch"]["log_probs"]] == [16, 16]
    for row, (told,) in zip(said["pytorch"]["log_probs"], said["pytorch"]["top_logprobs"], strict=True):
        best = [max(step.values()) for step in json.loads(told)]
        assert best == pytest.approx(row, abs=1e-6)  # greedy: the chosen token is the likeliest
    first = json.loads(said["vllm"]["prompt_log_probs"][0][0])
    assert first[0] is None
    assert all(value < 0 for step in first[1:] for value in step.values())


def test_what_cannot_be_done_is_an_error(said):
    assert "'lora_uids': 7 is not supported" in said["error"]
