import io
import json
import shutil

import pytest

from switchx import predictions
from switchx.errors import UserError
from switchx.inference.config import DecodingConfig
from switchx.trained import find_checkpoints
from tests.test_trained import finished  # noqa: F401  (a fixture)

TEXTS = ["the cat", "a fat <extra_id_0> rat", "", "and saw one", *["a mat on one rat"] * 7]
GREEDY = DecodingConfig(max_new_tokens=6)


@pytest.fixture(scope="module")
def checkpoint(finished):  # noqa: F811
    return find_checkpoints(finished.model_dir)[0]


@pytest.fixture
def infer(finished, monkeypatch):  # noqa: F811
    def run(*flags):
        parser = predictions.flag_parser("")
        predictions.run(parser.parse_args([finished.model_dir, "--max_new_tokens=6", *flags]))

    return run


def numbered(texts):
    return [(number, {"inputs": text}) for number, text in enumerate(texts)]


def test_a_prediction_does_not_depend_on_the_texts_around(finished, checkpoint):  # noqa: F811
    drawn = DecodingConfig(max_new_tokens=6, do_sample=True, num_return_sequences=2)
    for decoding, key in ((GREEDY, "prediction"), (drawn, "predictions")):
        together = list(predictions.predict(finished, checkpoint, decoding, numbered(TEXTS)))
        assert [row["inputs"] for row in together] == TEXTS
        alone = list(predictions.predict(finished, checkpoint, decoding, numbered(TEXTS)[1:3]))
        assert [row[key] for row in alone] == [row[key] for row in together[1:3]]
    assert len({tuple(row["predictions"]) for row in together[-7:]}) > 1


def test_what_is_too_long_is_cut_aloud(finished, checkpoint, capsys):  # noqa: F811
    texts = numbered(["the cat", "the cat " * 20])
    short, long = predictions.predict(finished, checkpoint, GREEDY, texts)
    assert "truncated" not in short and long["truncated"] == 160 + 1 - 40
    assert "1 input(s) were longer than TASK_FEATURE_LENGTHS" in capsys.readouterr().err


def test_an_output_that_was_cut_short_is_gone_on_with(infer, tmp_path, capsys):
    rows = [{"id": number, "inputs": text} for number, text in enumerate(TEXTS)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = f"--inputs={tmp_path}/in.jsonl", f"--output={tmp_path}/out.jsonl"
    infer(*flags)
    whole = (tmp_path / "out.jsonl").read_text()
    found = [json.loads(line) for line in whole.splitlines()]
    assert [row["id"] for row in found] == list(range(len(TEXTS)))
    assert all(isinstance(row["prediction"], str) and row["score"] < 0 for row in found)
    (tmp_path / "out.jsonl").write_text(whole[: whole.index("\n", 200) + 20])
    infer(*flags)
    assert (tmp_path / "out.jsonl").read_text() == whole
    assert "rows; going on after them" in capsys.readouterr().err
    with pytest.raises(UserError, match="was made with another decoding"):
        infer(*flags, "--num_beams=2")
    rows[0]["inputs"] = "another text"
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="was made of other inputs: its row 1 has 'the cat'"):
        infer(*flags)
    (tmp_path / "in.jsonl").write_text(json.dumps({"inputs": "the cat"}) + "\n")
    with pytest.raises(UserError, match=f"has {len(TEXTS)} rows, and the inputs have 1"):
        infer(*flags)
    (tmp_path / "out.jsonl.settings.json").unlink()
    with pytest.raises(UserError, match="exists; choose another or remove it"):
        infer(*flags)
    assert (tmp_path / "out.jsonl").read_text() == whole


def test_standard_output_is_for_the_rows(infer, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("ä rat\r\nb\n".encode())))
    infer("--num_beams=2", "--num_return_sequences=2")
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["inputs"] for row in rows] == ["ä rat", "b"]
    assert all(len(row["predictions"]) == len(row["scores"]) == 2 for row in rows)


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        ('{"question": "a"}', [], "line 1: no field 'inputs'; valid: question; --field says"),
        ('{"inputs": "a"}\n{', [], "line 2: not JSON"),
        ('{"inputs": 3}', [], "line 1: field 'inputs' is no string"),
        ("[]", [], "line 1: no JSON object"),
        ('{"inputs": "a", "score": 1}', [], "line 1: has a field 'score' already"),
        ('{"inputs": "\\ud800"}', [], "line 1: not JSON .half of a surrogate pair"),
        ('{"inputs": "a", "n": ' + "9" * 5000 + "}", [], "a number has too many digits"),
        ("", [], "in.jsonl has no texts"),
        ("", ["--num_beams=two"], "DecodingConfig.num_beams"),
        ("", ["--forced_bos_token_id=99999"], "99999 is no token of the model, which has 0 to 383"),
        ("", ["--suppress_tokens=[-1]"], "-1 is no token of the model"),
        ("", ["--seed=99999999999999"], "--seed=99999999999999: should be from 0"),
        ("", ["--temperature=0.5"], "temperature says what to draw from; set do_sample"),
        ("", ["--num_return_sequences=2"], "is more than num_beams = 1"),
        ("", ["--checkpoint=7"], "no checkpoint '7'"),
        ("", ["--checkpoint=all"], "--checkpoint=all: one at a time"),
    ],
)
def test_mistakes_are_one_line(infer, tmp_path, text, flags, message):
    (tmp_path / "in.jsonl").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        infer(f"--inputs={tmp_path}/in.jsonl", f"--output={tmp_path}/out.jsonl", *flags)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out.jsonl").exists()


def test_rows_of_a_file_or_of_standard_input(tmp_path, monkeypatch):
    (tmp_path / "in.txt").write_text("one\r\ntwo\n\nthree")
    found = list(predictions.read_rows(str(tmp_path / "in.txt"), None, "inputs"))
    assert [row["inputs"] for row in found] == ["one", "two", "", "three"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b'{"q": "a"}\n\n{"q": "b"}')))
    assert list(predictions.read_rows("-", "jsonl", "q")) == [{"q": "a"}, {"q": "b"}]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\nb\xff\n")))
    with pytest.raises(UserError, match="standard input, line 2: not UTF-8"):
        list(predictions.read_rows("-", None, "inputs"))
    with pytest.raises(UserError, match="cannot be read"):
        list(predictions.read_rows(str(tmp_path / "none.txt"), None, "inputs"))


def test_an_output_that_cannot_be_written(tmp_path):
    with predictions.Output(str(tmp_path / "no/out.jsonl"), {}) as output:
        with pytest.raises(UserError, match="cannot be written"):
            output.write({"prediction": "a"})


def test_a_mistake_leaves_no_empty_file(finished, tmp_path):  # noqa: F811
    shutil.copytree(finished.model_dir, tmp_path / "run")
    shutil.rmtree(next((tmp_path / "run/checkpoints").glob("4")) / "params")
    flags = [f"--inputs={tmp_path}/in.txt", f"--output={tmp_path}/out.jsonl"]
    (tmp_path / "in.txt").write_text("a")
    with pytest.raises(UserError, match="params is missing"):
        predictions.run(predictions.flag_parser("").parse_args([f"{tmp_path}/run", *flags]))
    assert not (tmp_path / "out.jsonl").exists()
