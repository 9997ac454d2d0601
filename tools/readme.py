"""Write the generated parts of README.md and docs/: between ``<!-- generated: NAME -->`` and ``<!-- end -->``.

python tools/readme.py             rewrite what follows from the code alone
python tools/readme.py --check     say what of that is out of date, and exit with 1 if anything is
python tools/readme.py --capture   also run the README's session (two minutes, port 8000) and put in what it printed

A captured part stands after ``<!-- captured: NAME -->``. Figures in it depend on the machine, so ``--check`` leaves it
alone; tests/e2e/test_docs.py runs its commands.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import typer

from fewbit.cli import app
from fewbit.compress import built_in, read_recipe
from fewbit.engine import check
from fewbit.engine.config import EngineOptions
from fewbit.engine.types import EngineDownError, OverloadedError, QueueFullError, Stats
from fewbit.errors import RequestError
from fewbit.measure import facts
from fewbit.measure import support as kinds
from fewbit.numerics.element import Element
from fewbit.numerics.format import ALL, FORMATS, Format
from fewbit.ops.device import DeviceInfo
from fewbit.serve import body, connection, openai, schema, transport
from fewbit.serve.exchange import RequestTimeoutError
from fewbit.serve.kserve import messages, signatures, tensors
from fewbit.serve.metrics import Metrics
from fewbit.serve.problems import (
    ForbiddenError,
    GenerationError,
    Problem,
    UnimplementedError,
    UnknownModelError,
    problem_of,
)
from fewbit.spec.families import families
from fewbit.text import chat

ROOT = Path(__file__).resolve().parents[1]
GENERATED = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
CAPTURED = re.compile(r"(<!-- captured: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def code(*words: str) -> str:
    return ", ".join(f"`{word}`" for word in words)


# --- models and numbers -----------------------------------------------------------------------------------------------


def support() -> str:
    """Kernel by numeric format: what ``fewbit explain`` prints here, and what it would print on a GPU."""
    cpu = facts.support_table(torch.device("cpu"), torch.float32)
    some_gpu = DeviceInfo("cuda", "any", (9, 0), 1, 1)
    with mock.patch.object(facts, "device_info", return_value=some_gpu):  # to ask the kernels takes no GPU
        gpu = facts.support_table(torch.device("cuda"), torch.bfloat16)
    columns = ["format", "CPU: weights only", "CPU: weights and inputs", "GPU: weights only", "GPU: weights and inputs"]
    return table(columns, [(*row, *other[1:]) for row, other in zip(cpu, gpu, strict=True)])


def recipes() -> str:
    rows = []
    for name, text in built_in().items():
        rules = read_recipe(name).rules
        rows.append((f"`{name}`", str(rules[0].quant) if rules else "measured", text))
    return table(["recipe", "numerics", "in words"], rows)


def numeric_formats() -> str:
    def shared(fmt: Format) -> str:
        rows, columns = fmt.block
        if rows == ALL:
            return "the whole tensor"
        if columns == ALL:
            return "a row"
        return f"{columns} columns of a row" if rows == 1 else f"a block of {rows} x {columns}"

    def stored(fmt: Format) -> str:
        scale = fmt.scale.name if isinstance(fmt.scale, Element) else str(fmt.scale).removeprefix("torch.")
        return scale + (", under one float32 scale" if fmt.outer else "")

    rows = [(f"`{n}`", f.element.name, shared(f), stored(f), "yes" if f.zero else "") for n, f in FORMATS.items()]
    return table(["format", "elements", "a scale for", "scale stored as", "zero points"], rows)


def architectures() -> str:
    rows = [(name, code(*family.ARCHITECTURES)) for name, family in families().items()]
    return table(["family", "`architectures` in config.json"], rows)


def exports() -> str:
    """Which export can say which recipe, for an ordinary decoder."""
    return kinds.by_format().markdown()


def engines() -> str:
    """In which export an engine loads which recipe."""
    return kinds.by_engine().markdown()


def families_and_formats() -> str:
    """How many of the recipes an export can say for a family."""
    return kinds.by_family().markdown()


# --- commands and the server ------------------------------------------------------------------------------------------


def commands() -> str:
    """The help of every command."""
    whole = typer.main.get_command(app)
    with whole.make_context("fewbit", [], resilient_parsing=True) as context:
        return "\n".join(_helps(whole, context))


def _helps(group: Any, context: Any) -> Iterator[str]:
    """A section for each command of a group, and for those of groups in it."""
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        inner = command.make_context(name, [], parent=context, resilient_parsing=True)
        inner.max_content_width = 100
        inner.terminal_width = 100
        yield f"## {inner.command_path}\n\n```text\n{command.get_help(inner)}\n```\n"
        if hasattr(command, "list_commands"):
            yield from _helps(command, inner)


def fields() -> str:
    """The fields of each body: what is honoured, what is taken without effect, what only where it asks for nothing."""
    parts = []
    kinds = {
        "`POST /v1/completions`": (openai.CompletionRequest, openai.CompletionRequest.neutral),
        "`POST /v1/chat/completions`": (openai.ChatRequest, openai.ChatRequest.neutral),
    }
    idle = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
    for route, (model, neutral) in kinds.items():
        honoured = [name for name in model.model_fields if name not in idle]
        parts.append(
            f"{route}\n\n- honoured: {code(*sorted(honoured))}\n"
            f"- taken without effect: {code(*sorted(idle & model.model_fields.keys()))}\n"
            f"- taken only where it asks for nothing (null, or the value that changes nothing), else 400: "
            f"{code(*sorted(neutral))}\n"
        )
    return "\n".join(parts)


def triton() -> str:
    """The models of the v2 protocol: what each input means here, and which outputs there are."""
    ensemble, bls = signatures.TRITON["ensemble"], signatures.TRITON["tensorrt_llm_bls"]
    told = {f"`{n}`": s for n, s in signatures.TRITON.items() if s is not bls}
    parts = []
    for title, one in (told | {"for NeMo's query classes": signatures.NEMO}).items():
        if one is ensemble:
            title += ", a model's own name"
        honoured = [f"`{i.name}` {i.datatype}" + " (required)" * i.required for i in one.honoured()]
        neutral = [f"`{i.name}`" for i in one.inputs if not i.means]
        given = [f"`{o.name}` {o.datatype}" for o in one.outputs if not o.when]
        asked = [f"`{o.name}`" for o in one.outputs if o.when]
        parts.append(f"### {title}\n\n- honoured: {', '.join(honoured)}\n")
        if one is ensemble:
            drafts = code(*(i.name for i in bls.inputs if i not in ensemble.inputs))
            parts[-1] += f"- `tensorrt_llm_bls` is the same; it also takes {drafts} where they ask for nothing\n"
        if neutral:
            parts[-1] += f"- taken only where it asks for nothing, else 400: {', '.join(neutral)}\n"
        parts[-1] += f"- answers {', '.join(given)}" + (f"; on request {', '.join(asked)}" if asked else "") + "\n"
    return "\n".join(parts)


def errors() -> str:
    rows = {
        "the body, a field, a value, a prompt that does not fit": RequestError(""),
        "loading and unloading without `--repository-control`": ForbiddenError(""),
        "a model that is not served": UnknownModelError(""),
        "a body that is too large, packed or unpacked": body.TooLargeError(""),
        "a body packed with anything but gzip or deflate": body.EncodingError(""),
        "no API key, or a wrong one": Problem(401, "AuthenticationError", ""),
        "a name in the header Host that is not this server's": Problem(403, "PermissionDeniedError", ""),
        "as many requests wait as may (`--max-queued`)": QueueFullError(""),
        "the server is shutting down, or models in use leave no room for this one": OverloadedError(""),
        "the request's time limit came first": RequestTimeoutError(""),
        "the engine is gone or does not answer": EngineDownError(""),
        "the engine failed on this request": GenerationError(""),
        "a fault of fewbit's own": ValueError(""),
        "a part of a protocol that is not there": UnimplementedError(""),
    }
    with mock.patch("fewbit.serve.problems.log"):
        told = [(text, e if isinstance(e, Problem) else problem_of(e)) for text, e in rows.items()]
    return table(["what", "status", "`type`"], [(text, str(p.status), f"`{p.kind}`") for text, p in told])


def limits() -> str:
    rows = [
        ("body", f"{body.LIMIT_BYTES >> 20} MiB"),
        ("large bodies that are being read, together", f"{body.MAX_HELD_BYTES >> 20} MiB"),
        ("prompts times `n` of a request", f"{schema.MAX_CHOICES}"),
        ("stop strings", f"{schema.MAX_STOPS}, of {schema.MAX_STOP_CHARS} characters each"),
        ("`stop_token_ids`", f"{check.MAX_STOP_TOKENS}"),
        ("`bad_words`", f"{check.MAX_BAD_WORDS}, of {check.MAX_BAD_WORD_TOKENS} tokens in all"),
        ("`logit_bias`", f"{check.MAX_BIASES} entries, from -{check.MAX_BIAS:g} to {check.MAX_BIAS:g}"),
        ("`allowed_token_ids`", f"{check.MAX_ALLOWED_TOKENS}"),
        ("`logprobs`, `top_logprobs`, `prompt_logprobs`", f"{check.MAX_LOGPROBS}"),
        ("log-probabilities about the prompts of a request", f"{schema.MAX_REPORTED}"),
        ("tools", f"{schema.MAX_TOOLS}"),
        ("a JSON schema", f"{schema.MAX_SCHEMA_CHARS} characters, {schema.MAX_SCHEMA_DEPTH} levels deep"),
        ("a regular expression, a grammar, all choices", f"{schema.MAX_GRAMMAR_CHARS} characters"),
        ("a prompt that `truncate_prompt_tokens` cuts", f"{schema.MAX_CUT_CHARS} characters"),
        ("a chat template in a request", f"{schema.MAX_TEMPLATE_CHARS} characters"),
        ("`request_id`, `cache_salt`", f"128 and {check.MAX_SALT} characters"),
        ("rows of a v2 request", f"{signatures.BATCHES}"),
        ("inputs, and outputs, of a v2 request", f"{messages.MAX_TENSORS}"),
        ("elements of a tensor", f"{tensors.MAX_ELEMENTS}"),
        ("requests that wait", f"{EngineOptions().max_queued}"),
        ("time for the chat template", f"{chat.LIMIT_S:g} s"),
        ("a silent stream says a comment after", f"{connection.SILENCE_S:g} s"),
        ("a reader that takes nothing is dropped after", f"{connection.SLOW_S:g} s"),
        ("head of a request", f"{transport.HEAD_BYTES >> 10} KiB, {transport.HEAD_FIELDS} fields"),
        (
            "a request must arrive within",
            f"{transport.ARRIVE_S:g} s, and a second more for every {transport.SLOWEST_BYTES_PER_S >> 10} KiB",
        ),
        ("connections, after which those that are idle make room", f"{transport.MAX_CONNECTIONS}"),
    ]
    return table(["limit", ""], rows)


def metrics() -> str:
    found = Metrics()
    found.render({"storyteller": Stats(blocks=1)})  # the engine's own figures appear with its answer
    rows = []
    for metric in found.registry.collect():
        suffix = "_total" if metric.type == "counter" else ""
        rows.append((f"`{metric.name}{suffix}`", metric.type, metric.documentation))
    return table(["metric", "type", ""], sorted(rows))


# --- a session --------------------------------------------------------------------------------------------------------

QUESTION = "Tell me a story about a bear."
HOW = '"max_tokens": 60, "temperature": 0.7, "seed": 1'
BODY = f'{{"model": "small", "messages": [{{"role": "user", "content": "{QUESTION}"}}], {HOW}}}'
WORDS = '{"max_tokens":100,"bad_words":[""],"stop_words":[""]}'
SESSION = (
    "fewbit compress models/storyteller --recipe int4 --kv fp8 -o small",
    "fewbit inspect small",
    "fewbit explain small",
    "fewbit eval small --against models/storyteller --data models/storyteller/heldout.txt.gz --windows 24 --length 256",
    f'fewbit run small --prompt "{QUESTION}" --max-tokens 60 --seed 1 -q',
)
SERVE = "fewbit serve small --port 8000"
CALLS = (
    f"curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\\n    -d '{BODY}'",
    "curl http://127.0.0.1:8000/v2/models/ensemble/generate \\\n"
    f'    -d \'{{"text_input":"How do I count to nine in French?","parameters":{WORDS}}}\'',
)


def session() -> str:
    """What the commands print, stdout and stderr together, in a folder with the bundled model."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    blocks = []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "models").symlink_to(ROOT / "models")

        def call(line: str) -> str:
            both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            line = line.replace("curl ", "curl -sS ", 1)  # without its progress
            done = subprocess.run(["bash", "-c", line], cwd=folder, env=environment, check=False, **both)
            assert done.returncode == 0, done.stdout
            return "\n".join(text.rstrip() for text in done.stdout.rstrip().splitlines())

        blocks += [f"$ {line}\n{call(line)}\n" for line in SESSION]
        server = subprocess.Popen(
            SERVE.split(), cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert server.stdout is not None
        said = []
        for line in server.stdout:
            said.append(line.rstrip())
            if line.startswith("serving"):
                break
        try:
            blocks += [f"$ {SERVE}\n" + "\n".join(said) + "\n"]
            blocks += [f"$ {line}\n{call(line)}\n" for line in CALLS]
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)
    return "```text\n" + "\n".join(blocks) + "```\n"


PARTS: dict[str, Callable[[], str]] = {
    "support": support,
    "recipes": recipes,
    "numeric_formats": numeric_formats,
    "architectures": architectures,
    "exports": exports,
    "engines": engines,
    "families_and_formats": families_and_formats,
    "commands": commands,
    "fields": fields,
    "triton": triton,
    "errors": errors,
    "limits": limits,
    "metrics": metrics,
    "session": session,
}


def fill(found: re.Match[str]) -> str:
    return found[1] + "\n" + PARTS[found[2]]().strip() + "\n\n" + found[3]


def main() -> int:
    stale = []
    for path in [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]:
        text = path.read_text("utf8")
        fresh = GENERATED.sub(fill, text)
        if "--capture" in sys.argv:
            fresh = CAPTURED.sub(fill, fresh)
        if fresh != text:
            stale.append(str(path.relative_to(ROOT)))
            if "--check" not in sys.argv:
                path.write_text(fresh, "utf8")
    if stale:
        print(("out of date: " if "--check" in sys.argv else "rewritten: ") + ", ".join(stale))
    return int(bool(stale) and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
