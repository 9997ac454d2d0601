"""Model directories to serve: one, or those of a folder; what each will take, and an engine for it.

What a model takes is asked of `fewbit plan` in a process of its own, since this one imports no torch: weights as the
kernels hold them, workspace, and K and V. Where several models share the memory, and nothing is said about K and V, a
model gets what all its sequences can use, at most a quarter of the budget.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from fewbit.engine.config import EngineOptions, limits
from fewbit.errors import CheckpointError, FewbitError
from fewbit.serve.loading import Tell
from fewbit.serve.metrics import Metrics
from fewbit.serve.service import Service
from fewbit.serve.supervisor import start_process, supervise
from fewbit.text import Tokenizer

log = logging.getLogger(__name__)

PROCESS_BYTES = 512 << 20
"""What an engine process takes beside its model: libraries, and on a GPU its context."""
_KV_PART = 4
_FREE_PART = 0.9
_LOOK_S = 1.0
_SIGNS = ("config.json", "trtllm_ckpt/config.json", "model_config.yaml")

Find = Callable[[], Mapping[str, Path]]


class ModelFolder:
    """The models of a folder, by the names of their folders. It is looked at again when that was a second ago.

    Args:
        root: The folder.
        first: Names that come first, so that one of them is the default; the others by the alphabet.

    Raises:
        CheckpointError: There is no such folder.
    """

    def __init__(self, root: Path, first: Sequence[str] = ()) -> None:
        if not root.is_dir():
            raise CheckpointError(f"{root} is no folder; expected one that holds a folder for each model")
        self._root, self._first = root.resolve(), first
        self._found: dict[str, Path] = {}
        self._looked = -_LOOK_S
        self._told: set[str] = set()

    def __call__(self) -> Mapping[str, Path]:
        """Those there are now."""
        if time.monotonic() - self._looked >= _LOOK_S:
            self._looked = time.monotonic()
            found = {path.name: path for path in sorted(self._root.iterdir()) if self._is_model(path)}
            self._found = {name: found.pop(name) for name in self._first if name in found} | found
        return self._found

    def _is_model(self, path: Path) -> bool:
        why = _why_not(path, self._root)
        if why is not None and path.name not in self._told:
            self._told.add(path.name)
            log.warning("%s is not served: %s", path, why)
        return why is None


def _why_not(path: Path, root: Path) -> str | None:
    """Why an entry of a folder is no model that may be served; None: it is one."""
    if path.name.startswith((".", "_")):
        return "its name begins with a dot or an underscore"
    if not path.is_dir():
        return "it is no folder"
    if not path.resolve().is_relative_to(root):
        return f"it is a link that leads out of {root}"
    if not any((path / sign).is_file() for sign in _SIGNS) and not any(path.glob("*.gguf")):
        return "it holds no model (no config.json, no model_config.yaml, no GGUF file)"
    return None


class ModelDirs:
    """A `Source` of model directories.

    Args:
        find: Says which there are, by name.
        options: Of their engines.
        shared: Whether several share the memory, so that it is said beforehand what each may take.
        budget: Bytes that all of them may take; None, if shared: most of what is free when the first is opened.
        drain_s: How long a SIGTERM to an engine process waits for running requests.
        tell: Told in words what is going on.
    """

    def __init__(
        self, find: Find, options: EngineOptions, *, shared: bool, budget: int | None, drain_s: float, tell: Tell
    ) -> None:
        self._find, self._options, self._shared = find, options, shared
        self._drain_s, self._tell = drain_s, tell
        self._plans: dict[Path, tuple[float, dict[str, Any]]] = {}
        self._planning = asyncio.Lock()  # one process at a time
        self.budget = budget

    def names(self) -> Sequence[str]:
        """See `Source`."""
        return list(self._find())

    async def cost(self, name: str) -> int:
        """See `Source`."""
        if not self._shared:
            return 0
        path = self._path(name)
        with _named(name, path):
            plan = await self._plan(path)
        if self.budget is None:
            self.budget = int(plan["available"] * _FREE_PART)
            log.info("models may take %.1f GiB", self.budget / 2**30)
        return PROCESS_BYTES + int(plan["weights"]) + int(plan["workspace"]) + self._kv_bytes(plan)

    async def open(self, name: str, metrics: Metrics, tell: Tell, lost: Tell) -> Service:
        """See `Source`."""
        path = self._path(name)
        with _named(name, path) if self._shared else contextlib.nullcontext():
            return await self._open(name, path, metrics, tell, lost)

    async def _open(self, name: str, path: Path, metrics: Metrics, tell: Tell, lost: Tell) -> Service:
        tokenizer = await asyncio.to_thread(lambda: Tokenizer.load(text_folder(path)))
        options = self._options
        if self._shared and _says_nothing_of_kv(options):
            options = dataclasses.replace(options, kv_bytes=self._kv_bytes(await self._plan(path)))

        def say(text: str) -> None:
            tell(text)
            self._tell(f"{name}: {text}" if self._shared else text)

        counted = metrics.of(name)
        client = await supervise(lambda: start_process(path, options, say, self._drain_s), counted.restarted, lost)
        return Service(client, tokenizer, name, counted)

    async def close(self, service: Service) -> None:
        """See `Source`."""
        await service.client.close()

    def _path(self, name: str) -> Path:
        try:
            return self._find()[name]
        except KeyError:
            raise CheckpointError("its folder is gone") from None

    def _kv_bytes(self, plan: Mapping[str, Any]) -> int:
        options, per_token = self._options, int(plan["kv_per_token"])
        if options.kv_bytes is not None:
            return options.kv_bytes
        if options.num_blocks is not None:
            return options.num_blocks * (options.block_size or 64) * per_token
        assert self.budget is not None
        device = "cpu" if str(plan["device"]).startswith("CPU") else "cuda"
        batch, _ = limits(dataclasses.replace(options, device=device))
        return max(min(batch * int(plan["context"]) * per_token, self.budget // _KV_PART), per_token)

    async def _plan(self, path: Path) -> dict[str, Any]:
        """What `fewbit plan` says of it, asked anew when the folder has changed."""
        async with self._planning:
            changed = path.stat().st_mtime
            known = self._plans.get(path)
            if known is None or known[0] != changed:
                known = self._plans[path] = changed, await _planned(path, self._options)
            return known[1]


async def _planned(path: Path, options: EngineOptions) -> dict[str, Any]:
    words = ["plan", str(path), "--json"]
    if options.max_model_len is not None:
        words += ["--context", str(options.max_model_len)]
    if options.device != "auto":
        words += ["--device", options.device]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "fewbit.cli", *words, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    if process.returncode != 0:
        said = err.decode(errors="replace").strip().rpartition("\n")[2].removeprefix("fewbit: ")
        raise CheckpointError(said or f"fewbit plan ended with status {process.returncode}")
    plan: dict[str, Any] = json.loads(out)
    return plan


@contextlib.contextmanager
def _named(name: str, path: Path) -> Iterator[None]:
    """What is wrong with a model is told to clients by its name; where it lies stands in the log."""
    try:
        yield
    except FewbitError as error:
        if str(path) not in str(error):
            raise
        log.error("the model '%s': %s", name, error)
        raise type(error)(str(error).replace(str(path), name)) from error


def _says_nothing_of_kv(options: EngineOptions) -> bool:
    return options.kv_bytes is None and options.num_blocks is None and options.kv_fraction is None


def text_folder(path: Path) -> Traversable:
    """Where the tokenizer of a model lies. Only for what holds it in a file of another kind torch is imported."""
    if path.is_dir() and not (path / "model_config.yaml").is_file() and not any(path.glob("*.gguf")):
        return path
    from fewbit.checkpoint import text_folder as inside

    return inside(path)
