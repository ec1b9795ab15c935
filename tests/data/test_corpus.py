"""The embedded text, and reading and checking files."""

import gzip
import hashlib
import json
import lzma
import re

import pytest

from switchx.data import corpus
from switchx.errors import UserError


def test_every_embedded_file_is_recorded_and_as_recorded():
    recorded = corpus.checksums()
    files = [
        path
        for path in corpus.EMBEDDED.rglob("*")
        if path.is_file() and path.name not in ("SHA256SUMS", "PROVENANCE.md")
    ]
    assert len(files) == 38
    assert {str(path.relative_to(corpus.EMBEDDED)) for path in files} == set(recorded)
    for path in files:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert recorded[str(path.relative_to(corpus.EMBEDDED))] == digest
    provenance = (corpus.EMBEDDED / "PROVENANCE.md").read_text()
    for name, digest in recorded.items():
        assert f"{digest}  {name}\n" in provenance


def test_embedded_prose():
    train, validation = (corpus.embedded_prose(split) for split in ("train", "validation"))
    assert (len(train), len(validation)) == (8540, 190)
    assert not set(train) & set(validation)
    assert min(map(len, train + validation)) > 100


def test_embedded_task():
    examples = corpus.embedded_task("wn_reverse_dictionary", "validation")
    assert len(examples) == 500
    assert examples[0]["targets"] == "motorcycle"
    assert examples[0]["references"] == "motorcycle\nbike"
    (first, *_) = corpus.embedded_task("date_iso", "test")
    assert first["references"] == first["targets"]


def test_a_damaged_embedded_file_is_named(tmp_path, monkeypatch):
    (tmp_path / "SHA256SUMS").write_text("00  prose.train.txt.xz\n")
    (tmp_path / "prose.train.txt.xz").write_bytes(lzma.compress(b"hello"))
    monkeypatch.setattr(corpus, "EMBEDDED", tmp_path)
    monkeypatch.setattr(corpus, "checksums", corpus.checksums.__wrapped__)
    with pytest.raises(UserError, match="'prose.train.txt.xz' is damaged"):
        corpus.read_embedded("prose.train.txt.xz")
    with pytest.raises(UserError, match="'prose.test.txt.xz' is missing"):
        corpus.read_embedded("prose.test.txt.xz")


def test_expand_sorts_and_takes_each_file_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.txt", "a.txt", "c.md", "[x].txt"):
        (tmp_path / name).write_text("x")
    found = corpus.expand(("*.txt", "a.txt", "c.md", "[x].txt"))
    assert [str(path) for path in found] == ["[x].txt", "a.txt", "b.txt", "c.md"]


def test_formats_by_extension(tmp_path):
    names = {"a.jsonl": "jsonl", "a.tsv.gz": "tsv", "a.b.txt.xz": "text", "a.md": "text"}
    for name, kind in names.items():
        assert corpus.file_format(tmp_path / name) == kind
    with pytest.raises(UserError, match="format of .*a.parquet.*jsonl, tsv, csv, text"):
        corpus.file_format(tmp_path / "a.parquet")


def test_the_same_rows_in_every_format_and_compression(tmp_path):
    rows = [{"inputs": "a\u2028b", "targets": "1"}, {"inputs": "caf\u00e9", "targets": "2.5"}]
    lines = [json.dumps({"inputs": "a\u2028b", "targets": 1, "more": [1]}, ensure_ascii=False), ""]
    lines += ["  ", json.dumps({"targets": 2.5, "inputs": "caf\u00e9"})]
    jsonl = "\n".join(lines)
    tsv = "targets\tid\tinputs\r\n1\t0\ta\u2028b\r\n2.5\t1\tcaf\u00e9\r\n"
    (tmp_path / "a.jsonl").write_text(jsonl, encoding="utf-8")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl.encode()))
    (tmp_path / "a.tsv").write_bytes(b"\xef\xbb\xbf" + tsv.encode())
    (tmp_path / "a.tsv.xz").write_bytes(lzma.compress(tsv.encode()))
    fields = {"inputs": "inputs", "targets": "targets"}
    quoted = 'targets,id,inputs\r\n1,0,"a\u2028b"\r\n\r\n2.5,1,caf\u00e9'
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + quoted.encode()))
    for name in ("a.jsonl", "a.jsonl.gz", "a.tsv", "a.tsv.xz", "a.csv.gz"):
        assert corpus.read_files([tmp_path / name], fields) == rows, name
    renamed = corpus.read_files([tmp_path / "a.tsv"], {"text": "id"})
    assert renamed == [{"text": "0"}, {"text": "1"}]


def test_csv_quotes(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'inputs,targets\n"one, two","say ""hi"""\n"two\r\nlines",\n')
    assert corpus.read_files([path], {"inputs": "inputs", "targets": "targets"}) == [
        {"inputs": "one, two", "targets": 'say "hi"'},
        {"inputs": "two\r\nlines", "targets": ""},
    ]


def test_a_label_that_is_no_option_is_named_with_its_line(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('inputs,label\n"two\nlines",yes\nb,noo\n')
    fields = {"inputs": "inputs", "targets": "label"}
    message = f"{path}:4: label 'noo' is none of the options; did you mean 'no'?"
    with pytest.raises(UserError, match=re.escape(message)):
        corpus.read_files([path], fields, options=("yes", "no"))


def test_pieces_by_hand():
    assert corpus.pieces("one\n\n two \nlines\n \n\nthree\n") == ["one\n\ntwo\nlines\n\nthree"]
    assert corpus.pieces(" \n\n") == []
    long = "word " * 900
    found = corpus.pieces("start\n\n" + long + "\n\nend")
    assert found[0] == "start"
    assert [len(piece) for piece in found[1:3]] == [1999, 1999]
    assert found[3].endswith("word\n\nend")
    assert " ".join(found).split() == ["start", *["word"] * 900, "end"]
    assert corpus.pieces("x" * 4500) == ["x" * 2000, "x" * 2000, "x" * 500]


def test_hold_out_goes_by_content():
    examples = [{"text": f"text {i}", "n": str(i)} for i in range(2000)]
    train, validation = corpus.hold_out(examples, "text", 0.1)
    assert sorted(train + validation, key=lambda e: int(e["n"])) == examples
    assert 150 < len(validation) < 250
    # Order, and what else there is, make no difference to an example's side.
    again = corpus.hold_out(examples[::-2], "text", 0.1)[1]
    assert {e["n"] for e in again} == {e["n"] for e in validation if int(e["n"]) % 2}
    copies = corpus.hold_out(examples + examples, "text", 0.1)[1]
    assert len(copies) == 2 * len(validation)


def test_hold_out_of_little_leaves_neither_side_empty():
    examples = [{"text": "a"}, {"text": "b"}, {"text": "a"}]
    for fraction in (0.001, 0.999):
        train, validation = corpus.hold_out(examples, "text", fraction)
        assert {e["text"] for e in train} | {e["text"] for e in validation} == {"a", "b"}
        assert train and validation
    with pytest.raises(UserError, match="cannot be split"):
        corpus.hold_out([{"text": "a"}, {"text": "a"}], "text", 0.5)


MISTAKES = [
    # (file name, content, fields, message)
    ("a.txt", "", {"text": "text"}, "'{}' holds no example; it is empty"),
    ("a.jsonl", "\n\n", {"text": "text"}, "'{}' holds no example"),
    ("a.tsv", "text\n", {"text": "text"}, "'{}' holds no example"),
    ("a.jsonl", '{"text": "x"}\n{"text": ', {"text": "text"}, "{}:2: not valid JSON"),
    ("a.jsonl", '["x"]', {"text": "text"}, "{}:1: expected a JSON object, found list"),
    ("a.jsonl", '{"texts": "x"}', {"text": "text"}, "{}:1: no column 'text'; found 'texts'; did"),
    ("a.jsonl", '{"q": 1, "a": 2}', {"text": "text"}, "{}:1: no column 'text'; found 'q', 'a'"),
    ("a.jsonl", "{}", {"text": "text"}, "{}:1: no column 'text'; found none"),
    ("a.csv", "", {"text": "text"}, "'{}' holds no example; it is empty"),
    ("a.csv", "q,a\n1,2\n", {"text": "text"}, "{}:2: no column 'text'; found 'q', 'a'"),
    ("a.csv", 'text,b\n"x\ny",1\n"z,1\n', {"text": "text"}, "{}:4: not valid CSV (unexpected end"),
    ("a.csv", "text,b\nx\n", {"text": "text"}, "{}:2: 1 columns where the header has 2"),
    (
        "a.csv",
        "text,b,text\nx,1,y\n",
        {"text": "text"},
        "{}:1: the header names column 'text' twice",
    ),
    ("a.jsonl", '{"text": "x"}\n{"text": null}', {"text": "text"}, "{}:2: field 'text' is None"),
    ("a.tsv", "a\tb\n1\t2\n1\t2\t3\n", {"text": "a"}, "{}:3: 3 columns where the header has 2"),
    ("a.tsv", "txt\nx\n", {"text": "text"}, "{}:2: no column 'text'; found 'txt'; did you mean"),
    ("a.txt", b"good\n\nbad \xff\n", {"text": "text"}, "{}:3: not UTF-8"),
    ("a.txt.gz", b"not gzip", {"text": "text"}, "'{}' cannot be read"),
    ("a.txt.xz", b"not xz", {"text": "text"}, "'{}' cannot be read"),
    ("a.txt.gz", gzip.compress(b"x" * 999, mtime=0)[:20], {"text": "text"}, "'{}' cannot be read"),
]


@pytest.mark.parametrize(("name", "content", "fields", "message"), MISTAKES)
def test_broken_files(tmp_path, name, content, fields, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=re.escape(message.format(path))) as caught:
        corpus.read_files([path], fields)
    assert "\n" not in str(caught.value)


def test_missing_files(tmp_path):
    for pattern, message in (
        (str(tmp_path / "none.txt"), "does not exist"),
        (str(tmp_path / "*.txt"), "no file matches"),
        (str(tmp_path), "is a folder; name its files"),
    ):
        with pytest.raises(UserError, match=message):
            corpus.expand([pattern])


def test_lines_of_a_text(tmp_path):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress("one\r\n\nthree\u2028x\n".encode()))
    assert corpus.read_lines(path) == ["one", "", "three\u2028x"]
