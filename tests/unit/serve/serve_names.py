"""Names that several test files use."""

import json

COMPLETION = "/v1/completions"
CHAT = "/v1/chat/completions"
GENERATE = "/v2/models/ensemble/generate"
SAYS = "un, deux, trois 🙂 quatre\ncinq"


def sse(text: str) -> list:
    """The objects of a stream; the last is "[DONE]"."""
    blocks = text.split("\n\n")
    assert blocks.pop() == ""
    assert all(b.startswith("data: ") and "\n" not in b for b in blocks)
    return [b if b == "[DONE]" else json.loads(b) for b in (b.removeprefix("data: ") for b in blocks)]
