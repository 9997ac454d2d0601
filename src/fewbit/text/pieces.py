"""A SentencePiece model (``tokenizer.model``) as a tokenizer.json, for directories that have no other.

Needs the ``sentencepiece`` extra. What was made must give the ids that the library gives, or it is refused.
"""

from __future__ import annotations

import logging
from importlib.resources.abc import Traversable
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors

from fewbit.errors import CheckpointError, UnsupportedError
from fewbit.text.settings import read_json

log = logging.getLogger(__name__)
MODEL = "tokenizer.model"
_UNIGRAM, _BPE = 1, 2  # TrainerSpec.ModelType
_CONTROL, _USER_DEFINED = 3, 4  # SentencePiece.Type
_SPACE = "▁"
_SAMPLES = (
    "The quick brown fox, 12 345 times; it's  über-naïve!\n\n\tdef f(x):\n    return x**2  # ok",
    " leading and trailing ",
    "東京は日本の首都です。Привет, мир! 🙂 ﬁne ½",
)


def convert(folder: Traversable) -> str:
    """The text of a tokenizer.json for the ``tokenizer.model`` of a folder.

    Raises:
        UnsupportedError: the extra is not installed, or the model is of a kind that cannot be converted.
        CheckpointError: it is damaged, or the converted tokenizer gives other ids.
    """
    file = folder / MODEL
    try:
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2 as pb
    except ImportError:
        raise UnsupportedError(
            f"{folder} has no tokenizer.json, only {MODEL}: install the extra that converts it, pip install "
            "'fewbit[sentencepiece]'"
        ) from None
    data = file.read_bytes()
    try:
        proto: Any = pb.ModelProto.FromString(data)  # type: ignore[attr-defined]
        processor = sentencepiece.SentencePieceProcessor(model_proto=data)
    except Exception as error:  # the library raises whatever it likes
        raise CheckpointError(f"{file} is no SentencePiece model ({error}); copy or download it again") from error
    if not proto.pieces:
        raise CheckpointError(f"{file} is no SentencePiece model (it has no pieces); copy or download it again")
    made = _tokenizer(proto, file)
    _add_special(made, proto)
    symbols = [f"a{piece.piece} b" for piece in proto.pieces if _of_user(piece)]
    for text in (*_SAMPLES, *symbols[:3]):
        if made.encode(text, add_special_tokens=False).ids != processor.encode(text):
            raise CheckpointError(f"{file} cannot be converted: a tokenizer.json would give other ids for {text!r}")
    made.post_processor = _template(proto, read_json(folder / "tokenizer_config.json"))
    log.info("converted %s", file)
    return str(made.to_str())


def _tokenizer(proto: Any, file: Traversable) -> Tokenizer:
    """The model, what is done to text before it, and the way back."""
    trainer, normal = proto.trainer_spec, proto.normalizer_spec
    model: models.Model
    vocab = [(piece.piece, piece.score) for piece in proto.pieces]
    if trainer.model_type == _BPE:
        ids = {piece: index for index, (piece, _) in enumerate(vocab)}
        model = models.BPE(
            ids, _merges(proto), unk_token=trainer.unk_piece, fuse_unk=True, byte_fallback=trainer.byte_fallback
        )
    elif trainer.model_type == _UNIGRAM:
        model = models.Unigram(vocab, trainer.unk_id, trainer.byte_fallback)
    else:
        raise UnsupportedError(f"{file} is neither a BPE nor a unigram model, which is not supported")
    made = Tokenizer(model)
    steps: list[Any] = [normalizers.Precompiled(normal.precompiled_charsmap)] if normal.precompiled_charsmap else []
    if normal.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if normal.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    made.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    back = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence(back + ([decoders.Strip(" ", 1, 0)] if normal.add_dummy_prefix else []))
    return made


def _merges(proto: Any) -> list[tuple[str, str]]:
    """Every way to put a piece together from two others: the pieces by their scores, best first."""
    ids = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    found = []
    for piece in proto.pieces:
        text = piece.piece
        if piece.type == _CONTROL or _of_user(piece):
            continue
        pairs = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        pairs = sorted((pair for pair in pairs if ids.keys() >= set(pair)), key=lambda p: (ids[p[0]], ids[p[1]]))
        found += [(piece.score, pair) for pair in pairs]
    return [pair for _, pair in sorted(found, key=lambda item: item[0], reverse=True)]


def _add_special(made: Tokenizer, proto: Any) -> None:
    """Pieces that text is searched for before it is cut: those of the user, and control pieces."""
    for piece in proto.pieces:
        if piece.type == _CONTROL or piece.piece == proto.trainer_spec.unk_piece:
            made.add_special_tokens([AddedToken(piece.piece, normalized=False, special=True)])
        elif _of_user(piece):
            made.add_tokens([AddedToken(piece.piece, normalized=False, special=False)])


def _of_user(piece: Any) -> bool:
    """Whether a piece is a symbol that text is searched for; one of spaces is merged like any other."""
    return bool(piece.type == _USER_DEFINED and piece.piece.strip(_SPACE))


def _template(proto: Any, config: dict[str, Any]) -> processors.TemplateProcessing:
    """BOS before a text and EOS after it, as tokenizer_config.json says; where it says nothing, BOS."""
    trainer = proto.trainer_spec
    begin = config.get("add_bos_token", True) and trainer.bos_id >= 0
    end = config.get("add_eos_token", False) and trainer.eos_id >= 0
    one = [trainer.bos_piece] * bool(begin) + ["$A"] + [trainer.eos_piece] * bool(end)
    two = one + [part.replace("$A", "$B") + ":1" for part in one]
    tokens = [(trainer.bos_piece, trainer.bos_id)] * bool(begin) + [(trainer.eos_piece, trainer.eos_id)] * bool(end)
    return processors.TemplateProcessing(single=one, pair=two, special_tokens=tokens)
