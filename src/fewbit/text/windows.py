"""A corpus as windows of tokens, for calibration and evaluation.

The rule: each document gets BOS (else EOS) in front; documents are joined in order and cut every `length` tokens.
The last, shorter window is dropped unless it is the only one. A row of token ids is one window, used as it is.
With a stride, windows slide: each but the first begins so many tokens after the one before and repeats the rest of it.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from fewbit.errors import RecipeError, RequestError
from fewbit.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Conversation:
    """Chat messages, to be written out by a model's own template."""

    messages: list[dict[str, Any]]


Document = str | list[int] | Conversation

_SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz")
_MARGIN_TOKENS = 64  # at the end of a cut text, so many tokens may differ from those of the whole text


def read_documents(path: Path) -> Iterator[Document]:
    """The documents of a file, read as they are asked for.

    Args:
        path: A .txt (one document), or a .jsonl with rows {"text": ...}, {"messages": [...]} or {"ids": [...]}; each
            may be gzipped (.gz). Or the folder of a data set that Hugging Face's `datasets` saved to disk, with a
            column of one of those names.

    Raises:
        RecipeError: Missing, empty or broken file; a bad row is named by its line number.
    """
    path = Path(path)
    if path.is_dir():
        from fewbit.text.arrow import saved_rows

        return _documents(path, saved_rows(path))
    if not path.name.endswith(_SUFFIXES):
        raise RecipeError(f"{path}: expected a file ending in {', '.join(_SUFFIXES)}")
    if not path.is_file():
        raise RecipeError(f"{path}: no such file")
    return _read(path)


def windows(
    documents: Iterable[Document],
    tokenizer: Tokenizer | None,
    length: int,
    count: int | None = None,
    stride: int | None = None,
) -> list[list[int]]:
    """Cut documents into windows of tokens by the rule above.

    Only as much text is tokenized as the first `count` windows need.

    Args:
        documents: Texts, conversations, or token ids that are a window already.
        tokenizer: Whose tokens; None: the documents must be ids.
        length: Tokens in a window.
        count: How many windows, the first ones; None: all of them.
        stride: Tokens from the start of a window to that of the next; None: `length`.

    Returns:
        The windows: fewer than `count` where the text is too short for more.

    Raises:
        RecipeError: A length or count below 1, a stride outside 1 to `length` or given for rows of ids, ids outside the
            vocabulary, messages that the model has no template for or whose template refuses them, or no text at all.
    """
    if length < 1 or (count is not None and count < 1):
        raise RecipeError(f"windows need a length and a count of at least 1, got length {length} and count {count}")
    step = length if stride is None else stride
    if not 1 <= step <= length:
        raise RecipeError(f"a stride lies between 1 and the length of a window, {length}; got {step}")
    opening = _opening(tokenizer)
    done: list[list[int]] = []
    rest: list[int] = []
    for document in documents:
        if isinstance(document, list):
            if step != length:
                raise RecipeError("the data hold token ids, which are windows as they are: leave the stride out")
            done.append(_checked(document, tokenizer, len(done)))
        elif tokenizer is None:
            raise RecipeError("the data hold text among token ids, and the model has no tokenizer.json; give ids alone")
        elif isinstance(document, Conversation):
            ids = _conversation(document, tokenizer)
            rest += ids if ids[:1] == opening else opening + ids
        elif document:
            needed = None if count is None else (count - len(done)) * step + length - step - len(rest) - len(opening)
            rest += opening + _encode_start(document, tokenizer, needed)
        starts = range(0, len(rest) - length + 1, step)
        done += [rest[i : i + length] for i in starts]
        rest = rest[len(starts) * step :]
        if count is not None and len(done) >= count:
            return done[:count]
    if not done and not rest:
        raise RecipeError("the data hold no text to cut into windows")
    return done or [rest]


def _opening(tokenizer: Tokenizer | None) -> list[int]:
    """What stands before every document."""
    if tokenizer is None:
        return []
    join = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    return [] if join is None else [join]


def _conversation(document: Conversation, tokenizer: Tokenizer) -> list[int]:
    """The tokens of a conversation as the model's template writes it."""
    if tokenizer.chat_template is None:
        raise RecipeError("the data hold chat messages, but the model has no chat template; give rows with text")
    try:
        text = tokenizer.chat_template.render(document.messages, add_generation_prompt=False)
    except RequestError as e:
        raise RecipeError(f"chat messages of the data: {e}") from e
    return tokenizer.encode(text, add_special_tokens=False)


def _encode_start(text: str, tokenizer: Tokenizer, needed: int | None) -> list[int]:
    """The first `needed` tokens of `text` or more (all for None), without tokenizing much more than that.

    Tokens of a beginning equal those of the whole text but for a few at the cut, which are dropped.
    """
    if needed is not None:
        chars = 6 * max(needed, 1) + 2048
        while chars < len(text):
            ids = tokenizer.encode(text[:chars], add_special_tokens=False)[:-_MARGIN_TOKENS]
            if len(ids) >= needed:
                return ids
            chars *= 2
    return tokenizer.encode(text, add_special_tokens=False)


def _checked(ids: list[int], tokenizer: Tokenizer | None, n: int) -> list[int]:
    known = tokenizer.vocab_size if tokenizer else max(ids, default=0) + 1  # without one the model's own size decides
    for i in ids:
        if not 0 <= i < known:
            raise RecipeError(f"window {n} holds token id {i}, outside the vocabulary of {known}")
    return ids


def _read(path: Path) -> Iterator[Document]:
    rows = 0
    try:
        with _open(path) as file:
            for document in _rows(path, file) if path.name.removesuffix(".gz").endswith(".jsonl") else [file.read()]:
                rows += bool(document)
                yield document
    except UnicodeDecodeError as e:
        raise RecipeError(f"{path}: not UTF-8 text ({e})") from e
    except (OSError, EOFError, zlib.error) as e:
        raise RecipeError(f"{path}: not readable ({e})") from e
    if not rows:
        raise RecipeError(f"{path}: the file holds no text")


def _documents(path: Path, rows: Iterable[dict[str, Any]]) -> Iterator[Document]:
    number = 0
    for number, row in enumerate(rows, 1):
        try:
            yield _document(row)
        except (ValueError, RequestError) as e:
            raise RecipeError(f"{path}, row {number}: {e}") from e
    if not number:
        raise RecipeError(f"{path}: the data set holds no rows")


def _open(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return path.open(encoding="utf-8", newline="")


def _rows(path: Path, file: IO[str]) -> Iterator[Document]:
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                yield _document(json.loads(line))
            except (ValueError, RecursionError, RequestError) as e:
                raise RecipeError(f"{path}, line {number}: {e}") from e


def _document(row: Any) -> Document:
    """One row of JSON Lines; a ValueError says what is wrong with it."""
    if not isinstance(row, dict) or sum(key in row for key in ("text", "messages", "ids")) != 1:
        given = f"keys {sorted(row)}" if isinstance(row, dict) else type(row).__name__
        raise ValueError(f'expected an object with one of "text", "messages" and "ids", got {given}')
    if "messages" in row:
        messages = row["messages"]
        if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
            raise ValueError('"messages" must be a list of one or more objects with "role" and "content"')
        return Conversation(messages)
    if "text" in row:
        if not isinstance(row["text"], str):
            raise ValueError(f'"text" must be a string, got {type(row["text"]).__name__}')
        row["text"].encode()  # a lone surrogate is a ValueError too
        return str(row["text"])
    ids = row["ids"]
    if not isinstance(ids, list) or not ids or not all(type(i) is int for i in ids):
        raise ValueError('"ids" must be a list of one or more integers')
    return list(ids)
