"""Vocabularies: sizes, special ids, sentinels, decoding, user mistakes."""

import hashlib

import numpy as np
import pytest
import sentencepiece

from switchx.data import corpus, vocabulary
from switchx.errors import UserError


@pytest.mark.parametrize(("name", "size"), [("spm8k", 8100), ("spm32k", 32100), ("bytes", 359)])
def test_sizes_and_special_ids(name, size):
    loaded = vocabulary.load(name)
    assert loaded.vocab_size == vocabulary.size(name) == size
    assert (loaded.pad_id, loaded.eos_id) == (0, 1)
    assert vocabulary.sentinel_id(loaded, 0) == size - 1
    assert vocabulary.sentinel_id(loaded, 99) == size - 100
    with pytest.raises(ValueError, match="sentinel 100"):
        vocabulary.sentinel_id(loaded, 100)
    assert vocabulary.load(name) is loaded


@pytest.mark.parametrize("name", ["spm8k", "spm32k", "bytes"])
def test_every_id_has_a_piece(name):
    pieces = vocabulary.pieces(name)
    assert len(pieces) == vocabulary.size(name)
    assert pieces[:3] == ("<pad>", "</s>", "<unk>")
    assert (pieces[-1], pieces[-100]) == ("<extra_id_0>", "<extra_id_99>")
    ids, _ = vocabulary.encode(name, ["the Whale"])
    text = "".join(pieces[token] for token in ids)
    assert text == ("the<0x20>Whale" if name == "bytes" else "\u2581the\u2581Whale")


@pytest.mark.parametrize("name", ["spm8k", "spm32k", "bytes"])
def test_text_survives_encoding(name):
    loaded = vocabulary.load(name)
    # Digits are split, ASCII is covered, other scripts fall back to bytes: nothing is unknown.
    text = "In 1941, [Mr. Darcy] spent $3.50 & said: ~{hello}~ \u6771\u4eac!"
    ids = loaded.encode(text)
    assert 2 not in ids
    assert vocabulary.decode(name, ids) == text
    assert loaded.encode_tf(text).numpy().tolist() == ids


@pytest.mark.parametrize("name", ["spm8k", "spm32k", "bytes"])
def test_encoding_without_tensorflow_gives_the_ids_of_seqio(name):
    loaded = vocabulary.load(name)
    texts = [
        "",
        "a <extra_id_3> and <extra_id_99>ly, jel<extra_id_2> <extra_id_100>",
        "  two  spaces \n\n a line\tend ",
        "\u6771\u4eac h\u00e9llo \u2581 ~{}",
        *corpus.embedded_prose("validation")[:20],
    ]
    tokens, lengths = vocabulary.encode(name, texts)
    assert tokens.dtype == np.int32 and lengths.sum() == len(tokens)
    for text, found in zip(texts, np.split(tokens, np.cumsum(lengths)[:-1]), strict=True):
        assert found.tolist() == loaded.encode(text) == loaded.encode_tf(text).numpy().tolist()
    tokens, lengths = vocabulary.encode(name, [])
    assert len(tokens) == len(lengths) == 0


def test_fingerprints_follow_the_content(tmp_path):
    model = (vocabulary._FOLDER / "spm8k.model").read_bytes()
    (tmp_path / "own.model").write_bytes(model)
    own = vocabulary.fingerprint(str(tmp_path / "own.model"))
    assert own == vocabulary.fingerprint("spm8k") == hashlib.sha256(model).hexdigest()
    assert vocabulary.fingerprint("spm32k") != own
    assert vocabulary.fingerprint("bytes") == "bytes"


def test_sentinels_are_the_pieces_seqio_adds():
    loaded = vocabulary.load("spm8k")
    for index in (0, 1, 57, 99):
        piece = loaded.tokenizer.id_to_piece(vocabulary.sentinel_id(loaded, index))
        assert f"<extra_id_{index}>" in piece


@pytest.mark.parametrize("name", ["spm8k", "bytes"])
def test_decode_names_sentinels_and_stops_at_eos(name):
    loaded = vocabulary.load(name)
    first, second = (vocabulary.sentinel_id(loaded, i) for i in (0, 1))
    ids = [first, *loaded.encode("a ship"), second, *loaded.encode("at sea"), 0, 1, 5, 5]
    assert vocabulary.decode(name, ids) == "<extra_id_0> a ship <extra_id_1> at sea"
    # An embedding padded to a round size makes ids that no piece has.
    assert vocabulary.decode(name, [loaded.vocab_size + 5, 1]) == ""


def test_a_model_file_of_the_users_own(tmp_path):
    path = tmp_path / "own.model"
    path.write_bytes((vocabulary._FOLDER / "spm8k.model").read_bytes())
    assert vocabulary.size(str(path)) == 8100
    assert vocabulary.load(str(path)).encode("hello") == vocabulary.load("spm8k").encode("hello")


def train(folder, **kwargs):
    text = folder / "text.txt"
    text.write_text("the cat sat on the mat\nthe dog sat on the log\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "bad"), vocab_size=19, minloglevel=2, **kwargs
    )
    return str(folder / "bad.model")


def test_user_mistakes(tmp_path):
    broken = tmp_path / "broken.model"
    broken.write_bytes(b"not a model")
    for name, message in (
        ("spm8", "vocabulary 'spm8' is neither.*did you mean 'spm8k'"),
        ("c4", "valid: bytes, spm32k, spm8k"),
        (str(tmp_path / "none.model"), "none.model' does not exist"),
        (str(broken), "broken.model' is not a SentencePiece model"),
        (train(tmp_path), "bad.model' has pad id -1 and eos id 2; train it with --pad_id=0"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            vocabulary.size(name)
        assert "\n" not in str(caught.value)
        with pytest.raises(UserError):
            vocabulary.load(name)
