"""What the JSON files beside tokenizer.json say: special tokens, ids that end a text, the chat template's source."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from typing import Any

from fewbit.errors import CheckpointError

# The names a tokenizer may give to its special tokens; a chat template sees each one that is set.
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class TokenizerSettings:
    """The facts that tokenizer.json itself leaves out."""

    roles: dict[str, str]  # role name to the token's text
    added: dict[str, dict[str, Any]]  # text of each added token to its flags, in the order in which ids are given
    bos_id: int | None  # from the model's configuration, where the tokenizer names none
    eos_ids: frozenset[int]  # from the model's configuration
    template: str | None


def read_settings(model_dir: Traversable) -> TokenizerSettings:
    """Read tokenizer_config.json, special_tokens_map.json, generation_config.json, config.json and the chat template.

    Args:
        model_dir: A model directory; every one of these files may be missing.

    Returns:
        The settings, with the precedence that transformers gives the files.
    """
    config = read_json(model_dir / "tokenizer_config.json")
    roles = {role: text for role in ROLES if (text := _token_text(config.get(role)))}
    flags = config.get("added_tokens_decoder")
    if flags is None:  # older directories say it in a second file, which then wins
        legacy = read_json(model_dir / "special_tokens_map.json")
        roles |= {role: text for role in ROLES if (text := _token_text(legacy.get(role)))}
    by_id = sorted((flags or {}).items(), key=lambda item: int(item[0]))
    added = {text: token for _, token in by_id if (text := _token_text(token))}
    added |= {text: {"special": True} for text in roles.values() if text not in added}
    extra = config.get("extra_special_tokens", config.get("additional_special_tokens")) or []
    for token in extra.values() if isinstance(extra, dict) else extra:
        if text := _token_text(token):
            added.setdefault(text, {"special": True})

    model = [read_json(model_dir / "generation_config.json"), read_json(model_dir / "config.json")]
    model += [inner for part in model if isinstance(inner := part.get("text_config"), dict)]
    bos = [i for part in model for i in _ids(part.get("bos_token_id"))]
    return TokenizerSettings(
        roles=roles,
        added=added,
        bos_id=bos[0] if bos else None,
        eos_ids=frozenset(i for part in model for i in _ids(part.get("eos_token_id"))),
        template=_template(model_dir, config),
    )


def read_json(path: Traversable) -> dict[str, Any]:
    """The JSON object in `path`, or {} where there is no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, OSError) as e:
        raise CheckpointError(f"{path}: not readable as JSON ({e})") from e
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _token_text(token: Any) -> str | None:
    """A token is stored as its text or as an object whose `content` is the text."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) and text else None


def _ids(value: Any) -> list[int]:
    """`eos_token_id` may be missing, null, one id or a list."""
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool) and v >= 0]


def _template(model_dir: Traversable, config: dict[str, Any]) -> str | None:
    """chat_template.jinja wins over tokenizer_config.json; of several named templates `default` is taken."""
    file = model_dir / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise CheckpointError(f"{file}: not readable ({e})") from e
    value = config.get("chat_template")
    if isinstance(value, list):
        value = {t.get("name"): t.get("template") for t in value if isinstance(t, dict)}
    if isinstance(value, dict):
        value = value.get("default")
    return value if isinstance(value, str) else None
