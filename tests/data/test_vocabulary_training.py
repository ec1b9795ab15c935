"""Training a vocabulary: the law of special ids and pieces, on a small model."""

import string

import sentencepiece

from switchx.data import vocabulary, vocabulary_training


def test_training_text_is_the_training_splits():
    lines = list(vocabulary_training.training_text())
    # 8,540 pieces of prose; 10 tasks of 6,000 rows and one of 4,303, inputs and targets.
    assert len(lines) == 8540 + 2 * (10 * 6000 + 4303)
    assert not any("\n" in line for line in lines)


def test_a_small_vocabulary(tmp_path, monkeypatch):
    lines = list(vocabulary_training.training_text())[:8000:20]
    monkeypatch.setattr(vocabulary_training, "training_text", lambda: iter(lines))
    path = vocabulary_training.train("spm8k", tmp_path / "new", vocab_size=1000)
    assert [file.name for file in path.parent.iterdir()] == ["spm8k.model"]
    assert vocabulary.size(str(path)) == 1100
    model = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    assert [model.pad_id(), model.eos_id(), model.unk_id(), model.bos_id()] == [0, 1, 2, -1]
    printable = string.ascii_letters + string.digits + string.punctuation
    assert all(model.piece_to_id(character) > 2 for character in printable)
    assert all(model.is_byte(model.piece_to_id(f"<0x{byte:02X}>")) for byte in range(256))
    assert model.encode("1790", out_type=str)[-4:] == ["1", "7", "9", "0"]
    shared = vocabulary_training.agreement("spm8k", path)
    assert 0.05 < shared < 0.2
    shipped = vocabulary._FOLDER / "spm8k.model"
    assert vocabulary_training.agreement("spm8k", shipped) == 1.0
