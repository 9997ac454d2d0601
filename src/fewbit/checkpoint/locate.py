"""From what a user typed to a directory: a path, or a Hub id through the local cache."""

from __future__ import annotations

import re
from pathlib import Path

from fewbit.errors import CheckpointError

WANTED = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt", "LICENSE"]


def locate(model: str | Path) -> Path:
    """The directory of `model`: itself if it is one, else the Hub snapshot of that id, downloaded where a network is.

    Raises:
        CheckpointError: neither; the message says which command would fetch it.
    """
    path = Path(model).expanduser()
    if path.exists():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)):
        raise CheckpointError(f"{path} is not a directory; expected a Hugging Face model directory")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
    except ImportError:
        raise CheckpointError(
            f"{model} is no directory here; as a Hub id it needs the 'hub' extra: pip install 'fewbit[hub]'"
        ) from None
    try:
        return Path(snapshot_download(str(model), local_files_only=True, allow_patterns=WANTED))
    except LocalEntryNotFoundError:
        pass
    try:
        return Path(snapshot_download(str(model), allow_patterns=WANTED))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{model} is neither a directory nor in the local Hub cache, and it could not be fetched ({reason}); "
            f"where there is a network: hf download {model}"
        ) from None
