"""What several test files use."""

import json
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from fewbit.serve import Models
from fewbit.serve.metrics import Metrics
from fewbit.serve.service import Service

COMPLETION = "/v1/completions"
CHAT = "/v1/chat/completions"
GENERATE = "/v2/models/ensemble/generate"
SAYS = "un, deux, trois 🙂 quatre\ncinq"


def models_of(tokenizer, **engines) -> Models:
    """Clients of engines by the names that requests call them, as the models of one server."""
    metrics = Metrics()
    return Models([Service(engine, tokenizer, name, metrics.of(name)) for name, engine in engines.items()], metrics)


@asynccontextmanager
async def client_of(app):
    """An HTTP client of an application, without a socket."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


def sse(text: str) -> list:
    """The objects of a stream; the last is "[DONE]"."""
    blocks = text.split("\n\n")
    assert blocks.pop() == ""
    assert all(b.startswith("data: ") and "\n" not in b for b in blocks)
    return [b if b == "[DONE]" else json.loads(b) for b in (b.removeprefix("data: ") for b in blocks)]


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('system must come first') }}{% endif %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_model(directory: Path) -> Path:
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    t.train_from_iterator(
        ["un deux trois quatre cinq six sept huit neuf", "How do I count to nine in French?"],
        trainers.BpeTrainer(
            vocab_size=330,
            special_tokens=["<unk>", "<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    t.save(str(directory / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory
