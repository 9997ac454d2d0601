"""``python -m fewbit.measure.tune.worker``: one measurement of one candidate, in a process of its own.

The request is a line of JSON on standard input, which stays open: when it ends, so does this process. On standard
output come lines of JSON: ``progress``, and last either ``found`` or ``error``, what a user can be told.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fewbit.checkpoint import Checkpoint, open_checkpoint
from fewbit.compress import compress, decide, layer_bits, plan
from fewbit.compress.recipe import parse_recipe
from fewbit.engine.engine import open_engine
from fewbit.errors import CheckpointError, FewbitError
from fewbit.measure import facts
from fewbit.measure.quality import Forward
from fewbit.measure.speed import batch_options, static_batch
from fewbit.measure.tasks.source import Source
from fewbit.measure.tune.questions import Questions, answers
from fewbit.ops.device import device_named, make_current

Progress = Callable[[str, int, int], None]


def make(request: dict[str, Any], device: torch.device, progress: Progress) -> dict[str, Any]:
    """Compress a model by a recipe; its facts, and the text that makes it again."""
    checkpoint = open_checkpoint(request["model"])
    recipe = parse_recipe(request["name"], request["recipe"])
    if recipe.auto is not None:
        recipe = decide(checkpoint, recipe, device, progress).recipe
    target = Path(request["target"])
    compress(checkpoint, plan(checkpoint, recipe), target, device=str(device), force=True, progress=progress)
    return {"figures": facts_of(open_checkpoint(target), request, device), "recipe": recipe.text}


def speed(request: dict[str, Any], device: torch.device, progress: Progress) -> dict[str, Any]:
    """Time a model in the engine; with its facts where they are asked for."""
    batch, prompt, tokens = request["batch"], request["prompt"], request["tokens"]
    engine = open_engine(request["target"], batch_options(device, batch, prompt + tokens))
    found = static_batch(engine, batch, prompt, tokens, request["runs"], progress)
    figures = {
        "ttft_ms": found.first_token_s * 1e3,
        "time_per_token_ms": found.per_token_s * 1e3,
        "tokens_per_s": found.tokens_per_s,
        "slowest_tokens_per_s": found.slowest,
        "fastest_tokens_per_s": found.fastest,
    }
    if request["facts"]:
        figures |= facts_of(open_checkpoint(request["target"]), request, device)
    return {"figures": figures}


@torch.inference_mode()
def windows(request: dict[str, Any], device: torch.device, progress: Progress) -> dict[str, Any]:
    """What a model, and the one it was made from, make of some windows: the fields of `evidence.Window` of each."""
    cut = json.loads(Path(request["windows"]).read_text("utf8"))[request["start"] : request["stop"]]
    model, base = (Forward(open_checkpoint(request[name]), cut, device, progress, name) for name in ("target", "model"))
    found, start = [], 0
    for window in cut:
        ids = torch.tensor(window, device=model.states.device)
        log_p, log_b = (which.log_probs(start, start + len(window)) for which in (model, base))
        losses = (-log[:-1].gather(1, ids[1:, None]).mean() for log in (log_p, log_b))
        divergence = (log_b.exp() * (log_b - log_p)).sum(-1).mean()
        agreement = (log_b.argmax(-1) == log_p.argmax(-1)).double().mean()
        found.append([mean.item() for mean in (*losses, divergence, agreement)])
        start += len(window)
    if not all(map(math.isfinite, itertools.chain(*found))):
        raise CheckpointError("its logits are no numbers")
    return {"windows": found}


def tasks(request: dict[str, Any], device: torch.device, progress: Progress) -> dict[str, Any]:
    """Whether a model has some questions right."""
    asked, source = Questions.read(Path(request["questions"])), Source(request["target"], str(device))
    return {"scores": answers(asked, request["start"], request["stop"], source, progress)}


STAGES = {"make": make, "speed": speed, "quality": windows, "tasks": tasks}


def facts_of(checkpoint: Checkpoint, request: dict[str, Any], device: torch.device) -> dict[str, float]:
    """What follows from a model's files alone."""
    memory = facts.memory(checkpoint, None, device, request["batch"], request["prompt"] + request["tokens"])
    return {"bits_per_weight": layer_bits(checkpoint), "memory_gb": memory.total / 1e9}


def _watch(stdin: int) -> None:
    while os.read(stdin, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    """Do what the line on standard input asks for."""
    # what a library prints, here or in a process that it starts, goes where its complaints go
    answers = os.fdopen(os.dup(1), "w", encoding="utf8")
    os.dup2(2, 1)

    def say(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_watch, args=(sys.stdin.fileno(),), daemon=True).start()
    torch.manual_seed(0)
    try:
        device = device_named(request["device"])
        make_current(device)
        found = STAGES[request["stage"]](
            request, device, lambda stage, done, total: say({"progress": [stage, done, total]})
        )
    except FewbitError as error:
        say({"error": str(error)})
    else:
        say({"found": found})


if __name__ == "__main__":
    main()
