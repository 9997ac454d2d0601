"""A server in a process of its own, over the fake engine. Prints its URL when it answers.

usage: python serve_child.py MODEL_DIR HOLD_AFTER DRAIN_S

Each text is held after HOLD_AFTER tokens until a line comes on standard input; -1: none is.
"""

import asyncio
import sys
import threading
from functools import partial
from pathlib import Path

from fake_engine import FakeEngine
from serve_names import SAYS, models_of

from fewbit.serve import bind, create_app, serve_app
from fewbit.text import Tokenizer


async def main() -> None:
    tokenizer = Tokenizer.load(Path(sys.argv[1]))
    engine = FakeEngine(tokenizer.vocab_size)
    engine.says = tokenizer.encode(SAYS, add_special_tokens=False)
    engine.hold_after = int(sys.argv[2])
    release = partial(setattr, engine, "hold_after", None)
    reader = threading.Thread(target=lambda: sys.stdin.readline() and loop.call_soon_threadsafe(release), daemon=True)
    loop = asyncio.get_running_loop()
    reader.start()
    app = create_app(models_of(tokenizer, storyteller=engine))
    await serve_app(app, bind(port=0), drain_s=float(sys.argv[3]), on_ready=lambda url: print(url, flush=True))


try:
    asyncio.run(main())
except KeyboardInterrupt:
    sys.exit(130)
