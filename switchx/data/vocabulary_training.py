"""How the embedded vocabularies were trained: SentencePiece unigram on the embedded text."""

import pathlib
import string
import tempfile
from collections.abc import Iterator, Mapping

import sentencepiece

from switchx.data import corpus
from switchx.data.tasks import EMBEDDED

SIZES: Mapping[str, int] = {"spm8k": 8000, "spm32k": 32000}


def training_text() -> Iterator[str]:
    """Training splits only: every piece of the prose, then inputs and targets of every task."""
    yield from corpus.embedded_prose("train")
    for name in sorted(name for name, task in EMBEDDED.items() if task.objective == "supervised"):
        for example in corpus.embedded_rows(name, "train"):
            yield example["inputs"]
            yield example["targets"]


def train(name: str, folder: pathlib.Path, vocab_size: int | None = None) -> pathlib.Path:
    """Train `name` and write it to folder / name.model; minutes of two cores for the real sizes.

    Args:
      name: 'spm8k' or 'spm32k'.
      folder: made if it is not there.
      vocab_size: another number of pieces than the name's, without the 100 sentinels, which
        seqio adds on loading.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        text = pathlib.Path(scratch) / "text.txt"
        text.write_text("".join(f"{line}\n" for line in training_text()), encoding="utf-8")
        sentencepiece.SentencePieceTrainer.train(
            input=str(text),
            model_prefix=str(folder / name),
            model_type="unigram",
            vocab_size=SIZES[name] if vocab_size is None else vocab_size,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            byte_fallback=True,
            split_digits=True,
            # Prose alone would leave brackets and the like to the byte pieces.
            required_chars=string.ascii_letters + string.digits + string.punctuation,
            character_coverage=0.9998,
            max_sentence_length=8192,
            num_threads=2,
            minloglevel=1,
        )
    (folder / f"{name}.vocab").unlink()
    return folder / f"{name}.model"


def agreement(name: str, path: pathlib.Path) -> float:
    """Share of the embedded model's pieces that a model file has too; 1 for the same vocabulary."""
    shipped, other = (
        sentencepiece.SentencePieceProcessor(model_proto=file.read_bytes())
        for file in (corpus.EMBEDDED / f"{name}.model", path)
    )
    pieces, others = (
        {model.id_to_piece(i) for i in range(model.get_piece_size())} for model in (shipped, other)
    )
    return len(pieces & others) / len(pieces)
