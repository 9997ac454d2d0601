"""Text to tokens and back: tokenizers, chat templates, streaming text, windows of a corpus. No torch in here."""

from __future__ import annotations

from fewbit.text.chat import ChatTemplate
from fewbit.text.stream import TextStream
from fewbit.text.tokenizer import Detokenizer, Tokenizer
from fewbit.text.windows import read_documents, windows

__all__ = ["ChatTemplate", "Detokenizer", "TextStream", "Tokenizer", "read_documents", "windows"]
