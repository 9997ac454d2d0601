"""One engine of the CPU benchmark in a process of its own: asked in lines of JSON on stdin, it answers so on stdout.

Started by `cpu_peers.py` as ``python cpu_worker.py ENGINE MODEL THREADS``; fewbit's in its own environment, llama.cpp's
and transformers' in that of `cpu_peers.txt`. All choose the likeliest token; prompts are drawn alike from the ids.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

LONGEST = 1024  # tokens of a sequence
BATCH = 8  # sequences at the most
PROMPT = 512  # tokens that are computed at once at the most
WARM = 2  # steps that are not timed


class Worker(ABC):
    """One engine with one model."""

    vocab: int
    version: str

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """``weights``: of all linears; ``weight_bytes``: of them as stored; ``kv_bytes``: of a token, all layers."""

    @abstractmethod
    def decode(self, batch: int, context: int, steps: int) -> dict[str, float]:
        """``seconds`` of a step that gives each of `batch` sequences of `context` tokens and more its next token."""

    @abstractmethod
    def prefill(self, tokens: int, seed: int) -> dict[str, float]:
        """``seconds`` until the first token after a prompt that the engine has not seen."""

    @abstractmethod
    def logits(self, tokens: int) -> np.ndarray:
        """Of the last token of a prompt, float32 [vocab]."""

    def ids(self, tokens: int, seed: int | str) -> list[int]:
        """A prompt."""
        return random.Random(str(seed)).choices(range(self.vocab), k=tokens)


# --- fewbit -----------------------------------------------------------------------------------------------------------


class Timed:
    """A decoder that adds up the time inside of its forward."""

    def __init__(self, decoder: Any) -> None:
        self.decoder, self.seconds = decoder, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.decoder, name)

    def hidden(self, *args: Any) -> Any:
        """See `DecoderLike`."""
        return self._add(self.decoder.hidden, *args)

    def logits(self, *args: Any) -> Any:
        """See `DecoderLike`."""
        return self._add(self.decoder.logits, *args)

    def _add(self, call: Callable[..., Any], *args: Any) -> Any:
        start = time.perf_counter()
        found = call(*args)
        self.seconds += time.perf_counter() - start
        return found


class Fewbit(Worker):
    """The engine that `fewbit serve` runs: scheduler, paged K and V, prefix cache, sampler."""

    def __init__(self, model: str, threads: int) -> None:
        import torch

        import fewbit
        from fewbit.engine.config import EngineOptions
        from fewbit.engine.engine import open_engine

        torch.set_num_threads(threads)
        self.checkpoint = fewbit.open_checkpoint(model)
        self.engine = open_engine(
            model, EngineOptions(device="cpu", max_batch=BATCH, max_model_len=LONGEST, num_blocks=512)
        )
        self.forward = self.engine.runner.decoder = Timed(self.engine.runner.decoder)
        self.vocab, self.version = self.engine.config.vocab, fewbit.__version__
        self.asked = 0

    def facts(self) -> dict[str, Any]:
        """See `Worker`."""
        from fewbit.measure.dummy import decode_bytes

        weights = sum(linear.out_features * linear.in_features for linear in self.checkpoint.spec.linears())
        weight_bytes, kv_bytes = decode_bytes(self.checkpoint, 1, 1)
        return {"weights": weights, "weight_bytes": weight_bytes, "kv_bytes": kv_bytes}

    def decode(self, batch: int, context: int, steps: int) -> dict[str, float]:
        """See `Worker`; ``loop``: the share of a step outside of the forward."""
        engine = self.engine
        names = [self._submit(self.ids(context, index), WARM + steps + 2) for index in range(batch)]
        while len(engine.step()) < batch:
            pass
        for _ in range(WARM):
            engine.step()
        self.forward.seconds = 0.0
        start = time.perf_counter()
        for _ in range(steps):
            found = engine.step()
        seconds = time.perf_counter() - start
        assert len(found) == batch
        for name in names:
            engine.abort(name)
        while engine.has_work:
            engine.step()
        return {"seconds": seconds / steps, "loop": 1 - self.forward.seconds / seconds}

    def prefill(self, tokens: int, seed: int) -> dict[str, float]:
        """See `Worker`."""
        prompt = self.ids(tokens, f"prefill {seed}")
        start = time.perf_counter()
        self._submit(prompt, 1)
        while not self.engine.step():
            pass
        return {"seconds": time.perf_counter() - start}

    def logits(self, tokens: int) -> np.ndarray:
        """See `Worker`."""
        import torch

        from fewbit.model import DenseAttend

        decoder = self.forward.decoder
        with torch.inference_mode():
            attend = DenseAttend(decoder.codecs, tokens)
            hidden = decoder.hidden(torch.tensor(self.ids(tokens, "logits")), torch.arange(tokens), attend)
            found: np.ndarray = decoder.logits(hidden[-1:])[0].numpy()
        return found

    def bandwidth(self) -> dict[str, float]:
        """``bytes_per_s`` of a sum over a GiB that was written before, the best of three."""
        import torch

        numbers, found = torch.ones(1 << 28), []
        for _ in range(3):
            start = time.perf_counter()
            numbers.sum()
            found.append(time.perf_counter() - start)
        return {"bytes_per_s": numbers.nbytes / min(found)}

    def _submit(self, prompt: list[int], tokens: int) -> str:
        from fewbit.engine.types import GenerateRequest, SamplingParams

        self.asked += 1
        params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        self.engine.submit(GenerateRequest(id=f"r{self.asked}", prompt=tuple(prompt), params=params))
        return f"r{self.asked}"


# --- llama.cpp --------------------------------------------------------------------------------------------------------


class LlamaCpp(Worker):
    """llama.cpp by its C functions: one `llama_decode` a step or a prompt, scores of last tokens only."""

    def __init__(self, model: str, threads: int) -> None:
        import llama_cpp
        from llama_cpp import llama_cpp as api

        self.api, self.path, self.threads = api, model, threads
        self.version = f"llama-cpp-python {llama_cpp.__version__}, {api.llama_print_system_info().decode().strip(' |')}"
        api.llama_backend_init()
        self.model = api.llama_model_load_from_file(model.encode(), api.llama_model_default_params())
        if not self.model:
            raise SystemExit(f"llama.cpp cannot load {model}")
        self.vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))
        self.batch = api.llama_batch_init(PROMPT, 0, 1)
        self.contexts = {1: self._context(1), BATCH: self._context(BATCH)}
        self.filled: dict[int, int] = {}  # tokens of each sequence that a context holds

    def _context(self, sequences: int) -> Any:
        params = self.api.llama_context_default_params()
        params.n_ctx, params.n_seq_max = LONGEST * sequences, sequences
        params.n_batch = params.n_ubatch = PROMPT
        params.n_threads = params.n_threads_batch = self.threads
        found = self.api.llama_init_from_model(self.model, params)
        if not found:
            raise SystemExit(f"llama.cpp gives no context for {sequences} sequences")
        return found

    def facts(self) -> dict[str, Any]:
        """See `Worker`."""
        from gguf import GGUFReader

        tensors = {tensor.name: tensor for tensor in GGUFReader(self.path).tensors if len(tensor.shape) == 2}
        if "output.weight" in tensors:  # else the embeddings are the head, too
            del tensors["token_embd.weight"]
        api, model = self.api, self.model
        width = api.llama_model_n_embd(model) // api.llama_model_n_head(model) * api.llama_model_n_head_kv(model)
        return {
            "weights": sum(int(tensor.n_elements) for tensor in tensors.values()),
            "weight_bytes": sum(int(tensor.n_bytes) for tensor in tensors.values()),
            "kv_bytes": 2 * 2 * width * api.llama_model_n_layer(model),  # K and V in float16
        }

    def decode(self, batch: int, context: int, steps: int) -> dict[str, float]:
        """See `Worker`."""
        api, own = self.api, self.contexts[batch]
        if self.filled.get(batch) != context:
            api.llama_memory_clear(api.llama_get_memory(own), True)
            for index in range(batch):
                self._run(own, [(token, at, index) for at, token in enumerate(self.ids(context, index))])
            self.filled[batch] = context
        for index in range(batch):
            api.llama_memory_seq_rm(api.llama_get_memory(own), index, context, -1)
        tokens = self.ids(batch, "first")
        start = 0.0
        for step in range(WARM + steps):
            if step == WARM:
                start = time.perf_counter()
            self._run(own, [(token, context + step, index) for index, token in enumerate(tokens)], every=True)
            tokens = [int(self._scores(own, index).argmax()) for index in range(batch)]
        return {"seconds": (time.perf_counter() - start) / steps}

    def prefill(self, tokens: int, seed: int) -> dict[str, float]:
        """See `Worker`."""
        api, own = self.api, self.contexts[1]
        self.filled.pop(1, None)
        api.llama_memory_clear(api.llama_get_memory(own), True)
        prompt = [(token, at, 0) for at, token in enumerate(self.ids(tokens, f"prefill {seed}"))]
        start = time.perf_counter()
        self._run(own, prompt)
        self._scores(own, -1).argmax()
        return {"seconds": time.perf_counter() - start}

    def logits(self, tokens: int) -> np.ndarray:
        """See `Worker`."""
        own = self.contexts[1]
        self.filled.pop(1, None)
        self.api.llama_memory_clear(self.api.llama_get_memory(own), True)
        self._run(own, [(token, at, 0) for at, token in enumerate(self.ids(tokens, "logits"))])
        return self._scores(own, -1).copy()

    def _run(self, own: Any, rows: list[tuple[int, int, int]], every: bool = False) -> None:
        """One `llama_decode` of (token, position, sequence); scores of every row, or of the last."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for row, (token, position, sequence) in enumerate(rows):
            batch.token[row], batch.pos[row] = token, position
            batch.n_seq_id[row], batch.seq_id[row][0] = 1, sequence
            batch.logits[row] = every or row == len(rows) - 1
        if status := self.api.llama_decode(own, batch):
            raise SystemExit(f"llama_decode of {len(rows)} tokens gave {status}")

    def _scores(self, own: Any, row: int) -> np.ndarray:
        """Of a row, which waits for it."""
        pointer = self.api.llama_get_logits_ith(own, row)
        return np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), (self.vocab,))


# --- transformers -----------------------------------------------------------------------------------------------------


class Transformers(Worker):
    """transformers in eager mode with its default attention and cache."""

    def __init__(self, model: str, threads: int) -> None:
        import torch
        import transformers

        path, _, dtype = model.rpartition(":")
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.torch, self.make_cache = torch, transformers.DynamicCache
        self.model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
        self.vocab = self.model.config.vocab_size
        self.version = f"transformers {transformers.__version__}, torch {torch.__version__}"
        self.caches: dict[tuple[int, int], Any] = {}

    def facts(self) -> dict[str, Any]:
        """See `Worker`."""
        matrices, config = [p for p in self.model.parameters() if p.ndim == 2], self.model.config
        if not config.tie_word_embeddings:
            matrices.remove(self.model.get_input_embeddings().weight)
        width = config.num_key_value_heads * config.head_dim * self.model.dtype.itemsize
        return {
            "weights": sum(p.numel() for p in matrices),
            "weight_bytes": sum(p.nbytes for p in matrices),
            "kv_bytes": 2 * width * config.num_hidden_layers,
        }

    def decode(self, batch: int, context: int, steps: int) -> dict[str, float]:
        """See `Worker`."""
        if (batch, context) not in self.caches:
            cache = self.caches[batch, context] = self.make_cache(config=self.model.config)
            self._run([self.ids(context, index) for index in range(batch)], cache)
        cache = self.caches[batch, context]
        if more := cache.get_seq_length() - context:
            cache.crop(-more)
        tokens = self.torch.tensor(self.ids(batch, "first"))[:, None]
        start = 0.0
        for step in range(WARM + steps):
            if step == WARM:
                start = time.perf_counter()
            tokens = self._run(tokens, cache).argmax(-1, keepdim=True)
        return {"seconds": (time.perf_counter() - start) / steps}

    def prefill(self, tokens: int, seed: int) -> dict[str, float]:
        """See `Worker`."""
        prompt = [self.ids(tokens, f"prefill {seed}")]
        start = time.perf_counter()
        self._run(prompt, self.make_cache(config=self.model.config)).argmax(-1)
        return {"seconds": time.perf_counter() - start}

    def logits(self, tokens: int) -> np.ndarray:
        """See `Worker`."""
        found: np.ndarray = self._run([self.ids(tokens, "logits")], None)[0].float().numpy()
        return found

    def _run(self, tokens: Any, cache: Any) -> Any:
        """Scores after the last tokens [sequences, vocab]."""
        asked = self.torch.as_tensor(tokens)
        return self.model(asked, past_key_values=cache, use_cache=cache is not None, logits_to_keep=1).logits[:, -1]


ENGINES: dict[str, Callable[[str, int], Worker]] = {
    "fewbit": Fewbit, "llama.cpp": LlamaCpp, "transformers": Transformers,
}  # fmt: skip


def main() -> None:
    """Answer until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")  # whatever else is printed goes to the log
    os.dup2(2, 1)
    name, model, threads = sys.argv[1:]
    worker = ENGINES[name](model, int(threads))
    for line in sys.stdin:
        asked = json.loads(line)
        what = asked.pop("do")
        if what == "logits":
            path = Path(asked.pop("file"))
            with path.open("wb") as file:
                np.save(file, worker.logits(**asked))
            found: dict[str, Any] = {}
        elif what == "facts":
            found = worker.facts() | {"version": worker.version}
        else:
            found = getattr(worker, what)(**asked)
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main()
