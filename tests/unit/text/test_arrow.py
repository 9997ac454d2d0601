"""Data sets as Hugging Face's `datasets` saves them, made here by hand: a list of Arrow streams beside their names."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from fewbit.errors import RecipeError
from fewbit.text.windows import Conversation, read_documents


def saved(path: Path, columns: dict[str, list], files: int = 2) -> Path:
    path.mkdir()
    table = pa.table(columns)
    cut = -(-table.num_rows // files)
    names = [f"data-{i:05}-of-{files:05}.arrow" for i in range(files)]
    for i, name in enumerate(names):
        with pa.OSFile(str(path / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table.slice(i * cut, cut))
    (path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (path / "dataset_info.json").write_text("{}")
    return path


def test_texts_messages_and_ids(tmp_path):
    texts = [f"story {i}" for i in range(5)]
    path = saved(tmp_path / "a", {"title": list("abcde"), "text": texts})
    assert list(read_documents(path)) == texts
    talk = [[{"role": "user", "content": "hi"}], [{"role": "user", "content": "ho"}]]
    assert list(read_documents(saved(tmp_path / "b", {"messages": talk}))) == [Conversation(m) for m in talk]
    assert list(read_documents(saved(tmp_path / "c", {"ids": [[1, 2], [3]]}))) == [[1, 2], [3]]


def test_what_is_wrong_is_said(tmp_path, monkeypatch):
    with pytest.raises(RecipeError, match=r"expected one column of text, messages, ids, got body"):
        list(read_documents(saved(tmp_path / "body", {"body": ["x"]})))
    with pytest.raises(RecipeError, match="got text, ids"):
        list(read_documents(saved(tmp_path / "two", {"text": ["x"], "ids": [[1]]})))
    with pytest.raises(RecipeError, match='row 2: "text" must be a string, got NoneType'):
        list(read_documents(saved(tmp_path / "null", {"text": ["x", None]})))
    with pytest.raises(RecipeError, match="the data set holds no rows"):
        list(read_documents(saved(tmp_path / "none", {"text": pa.array([], pa.string())})))
    broken = saved(tmp_path / "broken", {"text": ["x"] * 100}, files=1)
    file = broken / "data-00000-of-00001.arrow"
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(RecipeError, match=r"arrow: not readable"):
        list(read_documents(broken))
    with pytest.raises(RecipeError, match="expected a file, or the folder of a data set saved by"):
        read_documents(tmp_path)
    saved(tmp_path / "dict", {"text": ["x"]})
    (tmp_path / "dict").rename(tmp_path / "train")
    (tmp_path / "dict").mkdir()
    (tmp_path / "train").rename(tmp_path / "dict" / "train")
    (tmp_path / "dict" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(RecipeError, match=r"holds the splits train; name one of them, as .*dict/SPLIT"):
        read_documents(tmp_path / "dict")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(RecipeError, match=r"pip install 'fewbit\[data\]', or save it as .jsonl"):
        read_documents(tmp_path / "null")
