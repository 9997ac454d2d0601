"""Which kind of source lies at a path: a Hugging Face directory, or what presents itself as one."""

from __future__ import annotations

from importlib.resources.abc import Traversable
from pathlib import Path

from fewbit.checkpoint.bitmask import without_bitmasks
from fewbit.checkpoint.files import Files, ModelFiles
from fewbit.checkpoint.gguf.source import GGUFFiles, gguf_file
from fewbit.checkpoint.mxfp4 import without_stacks
from fewbit.checkpoint.nemo.archive import TokenizerFolder, is_archive, members_of
from fewbit.checkpoint.nemo.files import NemoFiles, tokenizer_files
from fewbit.checkpoint.trtllm.files import TrtFiles, is_checkpoint


def open_files(path: Path) -> Files:
    """The model at a path, by what lies there. Headers only.

    Raises:
        CheckpointError: nothing that can be opened.
    """
    if file := gguf_file(path):
        return GGUFFiles(file)
    if is_archive(path):
        return NemoFiles(path)
    return TrtFiles(path) if is_checkpoint(path) else without_stacks(without_bitmasks(ModelFiles(path)))


def text_folder(path: Path) -> Traversable:
    """Where the tokenizer of the model at a path lies: the directory itself, or what looks like one.

    Raises:
        CheckpointError: a source that is no directory and cannot be opened.
    """
    if is_archive(path):
        return TokenizerFolder(path, tokenizer_files(members_of(path)))
    return path if gguf_file(path) is None else open_files(path).folder
