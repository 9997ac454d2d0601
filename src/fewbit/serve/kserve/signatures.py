"""The names that clients of Triton know: models, their inputs and outputs, and what each of them means here.

Everything that depends on a name is a row of these tables: what a request may hold (`asks` reads it), what an answer
holds (`answers` makes it), metadata and configs (`describe`), and the documentation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

Does = Literal["texts", "ids", "encode", "decode"]

BATCHES = 1024
"""Most rows of one request."""


class Input(NamedTuple):
    """An input.

    Attributes:
        name: The protocol's.
        datatype: The protocol's.
        means: The field of `asks.Ask` that it fills; "" if it is not honoured.
        dims: Of one row; -1: any number.
        neutral: Where `means` is "": the values that ask for nothing, and so are taken.
        required: Whether every request has it.
    """

    name: str
    datatype: str
    means: str = ""
    dims: tuple[int, ...] = (1,)
    neutral: tuple[Any, ...] = ()
    required: bool = False


class Output(NamedTuple):
    """An output.

    Attributes:
        name: The protocol's.
        datatype: The protocol's.
        means: What it holds: a key of `answers.MAKERS`.
        dims: Of one row; -1: any number.
        when: The field of `asks.Ask` that asks for it; "": it is always given.
    """

    name: str
    datatype: str
    means: str
    dims: tuple[int, ...] = (1,)
    when: str = ""


@dataclass(frozen=True)
class Signature:
    """A model as the protocol sees it.

    Attributes:
        does: What it makes of its inputs: texts of texts, ids of ids, ids of texts, texts of ids.
        inputs: In the order in which they are told.
        outputs: The same.
        streams: Whether a request may have many responses (Triton: decoupled).
        max_tokens: Tokens generated where a request does not say how many.
        repeats_prompt: Whether the answer begins with the prompt where a request does not say.
        only_if_asked: Whether an output whose input was not set is left out even if it is listed; else to list it is
            to ask for it. PyTriton's client lists every output always.
    """

    does: Does
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    streams: bool = False
    max_tokens: int = 20
    repeats_prompt: bool = True
    only_if_asked: bool = False

    def input(self, name: str) -> Input | None:
        """The input of this name."""
        return next((i for i in self.inputs if i.name == name), None)

    def honoured(self) -> Iterator[Input]:
        """The inputs that change the answer."""
        return (i for i in self.inputs if i.means)


_SAMPLING = (
    Input("temperature", "FP32", "temperature"),
    Input("repetition_penalty", "FP32", "repetition_penalty"),
    Input("presence_penalty", "FP32", "presence_penalty"),
    Input("frequency_penalty", "FP32", "frequency_penalty"),
    Input("random_seed", "UINT64", "seed"),
)
_NO_LORA = (
    Input("lora_task_id", "UINT64", neutral=(0,)),
    Input("lora_weights", "FP16", dims=(-1, -1)),
    Input("lora_config", "INT32", dims=(-1, -1)),
)
_NO_LOGITS = (
    Input("return_context_logits", "BOOL", neutral=(False,)),
    Input("return_generation_logits", "BOOL", neutral=(False,)),
    Input("beam_width", "INT32", neutral=(1,)),
)
_REPORTS = (
    Input("return_log_probs", "BOOL", "log_probs"),
    Input("return_perf_metrics", "BOOL", "perf"),
)
_PERF = (
    Output("kv_cache_alloc_new_blocks", "INT32", "new_blocks", when="perf"),
    Output("kv_cache_reused_blocks", "INT32", "reused_blocks", when="perf"),
    Output("arrival_time_ns", "INT64", "arrival", when="perf"),
    Output("first_token_time_ns", "INT64", "first_token", when="perf"),
    Output("last_token_time_ns", "INT64", "last_token", when="perf"),
)
_LOG_PROBS = (
    Output("cum_log_probs", "FP32", "cum_log_probs", (-1,), "log_probs"),
    Output("output_log_probs", "FP32", "log_probs_of_beams", (-1, -1), "log_probs"),
)

ENSEMBLE = Signature(
    "texts",
    (
        Input("text_input", "BYTES", "prompt", required=True),
        Input("max_tokens", "INT32", "max_tokens"),
        Input("min_tokens", "INT32", "min_tokens"),
        Input("num_return_sequences", "INT32", "choices"),
        Input("bad_words", "BYTES", "bad_words", (-1,)),
        Input("stop_words", "BYTES", "stop", (-1,)),
        Input("stop", "BYTES", "stop", (-1,)),  # the Open Inference Protocol's name
        Input("exclude_input_in_output", "BOOL", "exclude_prompt"),
        Input("end_id", "INT32", "end_id"),
        Input("pad_id", "INT32", "pad_id"),
        Input("top_k", "INT32", "top_k"),
        Input("top_p", "FP32", "top_p"),
        *_SAMPLING,
        Input("seed", "UINT64", "seed"),
        Input("stream", "BOOL", "stream"),
        Input("embedding_bias_words", "BYTES", "bias_words", (-1,)),
        Input("embedding_bias_weights", "FP32", "bias_weights", (-1,)),
        Input("guided_decoding_guide_type", "BYTES", "guide_type"),
        Input("guided_decoding_guide", "BYTES", "guide"),
        *_REPORTS,
        Input("return_num_input_tokens", "BOOL", "count_input"),
        Input("return_num_output_tokens", "BOOL", "count_output"),
        Input("details", "BOOL", "details"),  # the Open Inference Protocol's
        *_NO_LOGITS,
        Input("length_penalty", "FP32", neutral=(0.0, 1.0)),  # of beams, and there is one
        Input("decoder_text_input", "BYTES", neutral=(b"",)),
        Input("prompt_embedding_table", "FP16", dims=(-1, -1)),
        *_NO_LORA,
    ),
    (
        Output("text_output", "BYTES", "text", (-1,)),
        *_LOG_PROBS,
        Output("batch_index", "INT32", "batch_index", when="choices"),
        Output("sequence_index", "INT32", "sequence_index", when="choices"),
        *_PERF,
        Output("num_input_tokens", "INT32", "input_tokens", when="count_input"),
        Output("num_output_tokens", "INT32", "output_tokens", when="count_output"),
        Output("details", "BYTES", "details", when="details"),
    ),
    streams=True,
)
BLS = Signature(
    "texts",
    (
        *ENSEMBLE.inputs,
        Input("num_draft_tokens", "INT32", neutral=(0,)),
        Input("use_draft_logits", "BOOL", neutral=(False,)),
    ),
    ENSEMBLE.outputs,
    streams=True,
)
PREPROCESSING = Signature(
    "encode",
    (
        Input("QUERY", "BYTES", "prompt", required=True),
        Input("REQUEST_OUTPUT_LEN", "INT32", "max_tokens"),
        Input("BAD_WORDS_DICT", "BYTES", "bad_words", (-1,)),
        Input("STOP_WORDS_DICT", "BYTES", "stop", (-1,)),
        Input("EMBEDDING_BIAS_WORDS", "BYTES", "bias_words", (-1,)),
        Input("EMBEDDING_BIAS_WEIGHTS", "FP32", "bias_weights", (-1,)),
        Input("END_ID", "INT32", "end_id"),
        Input("PAD_ID", "INT32", "pad_id"),
        Input("DECODER_QUERY", "BYTES", neutral=(b"",)),
    ),
    (
        Output("INPUT_ID", "INT32", "", (-1,)),
        Output("REQUEST_INPUT_LEN", "INT32", ""),
        Output("BAD_WORDS_IDS", "INT32", "", (2, -1)),
        Output("STOP_WORDS_IDS", "INT32", "", (2, -1)),
        Output("OUT_END_ID", "INT32", ""),
        Output("OUT_PAD_ID", "INT32", ""),
        Output("REQUEST_OUTPUT_LEN", "INT32", "", when="max_tokens"),
        Output("EMBEDDING_BIAS", "FP32", "", (-1,), "bias_words"),
    ),
)
TENSORRT_LLM = Signature(
    "ids",
    (
        Input("input_ids", "INT32", "prompt", (-1,), required=True),
        Input("input_lengths", "INT32", "prompt_tokens"),
        Input("request_output_len", "INT32", "max_tokens"),
        Input("min_length", "INT32", "min_tokens"),
        Input("num_return_sequences", "INT32", "choices"),
        Input("end_id", "INT32", "end_id"),
        Input("pad_id", "INT32", "pad_id"),
        Input("runtime_top_k", "INT32", "top_k"),
        Input("runtime_top_p", "FP32", "top_p"),
        *_SAMPLING,
        Input("stop_words_list", "INT32", "stop_ids", (2, -1)),
        Input("bad_words_list", "INT32", "bad_ids", (2, -1)),
        Input("embedding_bias", "FP32", "bias", (-1,)),
        Input("streaming", "BOOL", "stream"),
        Input("exclude_input_in_output", "BOOL", "exclude_prompt"),
        *_REPORTS,
        *_NO_LOGITS,
        Input("stop", "BOOL", neutral=(False,)),  # to end a request: leave, or cancel the call
        Input("len_penalty", "FP32", neutral=(0.0, 1.0)),
        *_NO_LORA,
    ),
    (
        Output("output_ids", "INT32", "ids", (-1, -1)),
        Output("sequence_length", "INT32", "length", (-1,)),
        *_LOG_PROBS,
        Output("sequence_index", "INT32", "sequence_index", when="choices"),
        *_PERF,
    ),
    streams=True,
)
POSTPROCESSING = Signature(
    "decode",
    (
        Input("TOKENS_BATCH", "INT32", "tokens", (-1, -1), required=True),
        Input("SEQUENCE_LENGTH", "INT32", "lengths", (-1,), required=True),
        Input("SKIP_SPECIAL_TOKENS", "BOOL", "skip_special"),
    ),
    (Output("OUTPUT", "BYTES", "", (-1,)),),
)
# The union of what NeMo's query classes send (TensorRT-LLM, PyTorch, Hugging Face, vLLM).
NEMO = Signature(
    "texts",
    (
        Input("prompts", "BYTES", "prompt", required=True),
        Input("max_output_len", "INT64", "max_tokens"),
        Input("max_length", "INT64", "max_tokens"),
        Input("max_tokens", "INT64", "max_tokens"),
        Input("min_output_len", "INT64", "min_tokens"),
        Input("min_length", "INT64", "min_tokens"),
        Input("min_tokens", "INT64", "min_tokens"),
        Input("top_k", "INT64", "top_k"),
        Input("top_p", "FP32", "top_p_or_zero"),
        Input("temperature", "FP32", "temperature"),
        Input("random_seed", "INT64", "seed"),
        Input("seed", "INT64", "seed"),
        Input("repetition_penalty", "FP32", "repetition_penalty"),
        Input("stop_words_list", "BYTES", "stop", (-1,)),
        Input("end_strings", "BYTES", "stop", (-1,)),
        Input("bad_words_list", "BYTES", "bad_words", (-1,)),
        Input("use_greedy", "BOOL", "greedy"),
        Input("add_BOS", "BOOL", "begin"),
        Input("apply_chat_template", "BOOL", "chat"),
        Input("echo", "BOOL", "echo"),
        Input("compute_logprob", "BOOL", "log_probs"),
        Input("n_top_logprobs", "INT64", "top_log_probs"),
        Input("n_log_probs", "INT64", "top_log_probs"),
        Input("n_prompt_log_probs", "INT64", "prompt_log_probs"),
        Input("no_repeat_ngram_size", "FP32", neutral=(0.0,)),
        Input("all_probs", "BOOL", neutral=(False,)),
        Input("lora_uids", "BYTES", dims=(-1,), neutral=(b"",)),
        Input("output_context_logits", "BOOL", neutral=(False,)),
        Input("output_generation_logits", "BOOL", neutral=(False,)),
        Input("output_logits", "BOOL", neutral=(False,)),
        Input("output_scores", "BOOL", neutral=(False,)),
    ),
    (
        Output("outputs", "BYTES", "text_column"),
        Output("sentences", "BYTES", "text_column"),
        Output("log_probs", "FP32", "log_probs", (-1,), "log_probs"),
        Output("top_logprobs", "BYTES", "top_log_probs", when="top_log_probs"),
        Output("prompt_log_probs", "BYTES", "prompt_log_probs", when="prompt_log_probs"),
    ),
    max_tokens=128,
    repeats_prompt=False,
    only_if_asked=True,
)

TRITON = MappingProxyType(
    {
        "ensemble": ENSEMBLE,
        "tensorrt_llm_bls": BLS,
        "preprocessing": PREPROCESSING,
        "tensorrt_llm": TENSORRT_LLM,
        "postprocessing": POSTPROCESSING,
    }
)
"""The names of Triton's TensorRT-LLM repository. They mean the default model; a model of the same name goes first."""
