"""Vocabularies: two embedded SentencePiece models, raw bytes, or a model file of the user's own."""

import functools
import hashlib
import itertools
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import sentencepiece
from jaxtyping import Int

from switchx.data.span_corruption import EOS, NUM_SENTINELS
from switchx.errors import UserError, closest

if TYPE_CHECKING:
    import seqio

EMBEDDED = {"spm8k": "spm8k.model", "spm32k": "spm32k.model"}
NAMES = (*EMBEDDED, "bytes")
PAD = 0
# pad, eos, unk and the 256 byte values, as seqio.ByteVocabulary lays them out.
NUM_BYTE_IDS = 3 + 256

_FOLDER = pathlib.Path(__file__).parent / "embedded"


@functools.lru_cache(maxsize=8)
def load(name: str) -> "seqio.Vocabulary":
    """The vocabulary called `name`: 'spm8k', 'spm32k', 'bytes', or the path of a .model file.

    Each has 100 sentinels on top: `vocab_size` is 8100, 32100 and 359 for the named ones. Pad is
    0, EOS is 1. The same object every time, so mixtures of tasks agree on it.

    Raises:
      UserError: unknown name, missing file, or a model whose pad or EOS is elsewhere.
    """
    from switchx.data.backend import seqio

    if name == "bytes":
        return seqio.ByteVocabulary(extra_ids=NUM_SENTINELS)
    _pieces(name)
    return seqio.SentencePieceVocabulary(str(_model_path(name)), extra_ids=NUM_SENTINELS)


def size(name: str) -> int:
    """Number of ids of the vocabulary called `name`, sentinels included; needs no TensorFlow."""
    base = NUM_BYTE_IDS if name == "bytes" else _pieces(name).get_piece_size()
    return base + NUM_SENTINELS


def sentinel_id(vocabulary: "seqio.Vocabulary", index: int) -> int:
    """Id of <extra_id_index>: sentinels count down from the last id."""
    if not 0 <= index < NUM_SENTINELS:
        raise ValueError(f"sentinel {index} is not in 0..{NUM_SENTINELS - 1}")
    return vocabulary.vocab_size - 1 - index


def fingerprint(name: str) -> str:
    """SHA-256 of the model file of the vocabulary called `name`, or 'bytes'."""
    if name == "bytes":
        return name
    _pieces(name)
    return hashlib.sha256(_model_path(name).read_bytes()).hexdigest()


def encode(
    name: str, texts: Sequence[str]
) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " texts"]]:
    """Ids of many texts one after the other (int32), and how many each text has (int64).

    No EOS. The ids are those of the seqio vocabulary that `load` returns, sentinels written as
    <extra_id_i> included, made without TensorFlow.
    """
    if name == "bytes":
        raw = [text.encode("utf-8") for text in texts]
        lengths = np.fromiter(map(len, raw), np.int64, len(raw))
        return np.frombuffer(b"".join(raw), np.uint8).astype(np.int32) + 3, lengths
    rows = _encoder(name).encode(list(texts))
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    return np.fromiter(itertools.chain.from_iterable(rows), np.int32, lengths.sum()), lengths


def decode(name: str, ids: Sequence[int] | np.ndarray) -> str:
    """Text of `ids` up to the first EOS. Padding is dropped; sentinels read <extra_id_i>."""
    vocab_size = size(name)
    parts: list[str] = []
    pending: list[int] = []
    for token in (int(i) for i in ids):
        if token == EOS:
            break
        if vocab_size - NUM_SENTINELS <= token < vocab_size:
            parts += [_decode_pieces(name, pending), f"<extra_id_{vocab_size - 1 - token}>"]
            pending = []
        # A model's embedding may be padded past the vocabulary; such ids have no text.
        elif PAD < token < vocab_size:
            pending.append(token)
    parts.append(_decode_pieces(name, pending))
    return " ".join(part for part in parts if part)


@functools.lru_cache(maxsize=8)
def pieces(name: str) -> tuple[str, ...]:
    """What every id stands for, as a SentencePiece model writes it: '▁the', '</s>', '<extra_id_0>'.

    Bytes are the ASCII character they are, or '<0xE2>'.
    """
    if name == "bytes":
        characters = (chr(byte) if 32 < byte < 127 else f"<0x{byte:02X}>" for byte in range(256))
        found = ["<pad>", "</s>", "<unk>", *characters]
    else:
        model = _pieces(name)
        found = [model.id_to_piece(i) for i in range(model.get_piece_size())]
    return (*found, *(f"<extra_id_{i}>" for i in reversed(range(NUM_SENTINELS))))


def _decode_pieces(name: str, ids: list[int]) -> str:
    if name == "bytes":
        return bytes(i - 3 for i in ids if i >= 3).decode("utf-8", errors="replace")
    return _pieces(name).decode(ids)


def _model_path(name: str) -> pathlib.Path:
    if name in EMBEDDED:
        return _FOLDER / EMBEDDED[name]
    path = pathlib.Path(name)
    if path.suffix == ".model":
        return path
    raise UserError(
        f"vocabulary {name!r} is neither a known name nor the path of a .model file"
        f"{closest(name, NAMES)}"
    )


@functools.lru_cache(maxsize=8)
def _pieces(name: str) -> sentencepiece.SentencePieceProcessor:
    path = _model_path(name)
    if not path.is_file():
        raise UserError(f"vocabulary file {str(path)!r} does not exist")
    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    except RuntimeError as error:
        raise UserError(f"vocabulary file {str(path)!r} is not a SentencePiece model") from error
    if (model.pad_id(), model.eos_id()) != (PAD, EOS):
        raise UserError(
            f"vocabulary file {str(path)!r} has pad id {model.pad_id()} and eos id "
            f"{model.eos_id()}; train it with --pad_id=0 --eos_id=1 --unk_id=2 --bos_id=-1"
        )
    return model


@functools.lru_cache(maxsize=8)
def _encoder(name: str) -> sentencepiece.SentencePieceProcessor:
    from sentencepiece import sentencepiece_model_pb2

    _pieces(name)
    model = sentencepiece_model_pb2.ModelProto.FromString(  # type: ignore[attr-defined]
        _model_path(name).read_bytes()
    )
    # As seqio adds them, so that sentinels written in a text become their ids.
    for index in reversed(range(NUM_SENTINELS)):
        model.pieces.add(
            piece=f"\u2581<extra_id_{index}>", score=0.0, type=model.SentencePiece.USER_DEFINED
        )
    return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
