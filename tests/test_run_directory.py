import dataclasses
import json
import subprocess
import sys

import pytest

from switchx.errors import UserError
from switchx.run_directory import JsonLines, RunDirectory, put_row, read_vocabulary, versions


@dataclasses.dataclass
class Model:
    d_model: int
    layers: tuple[int, ...] = (1, 2)


@dataclasses.dataclass
class Config:
    model: Model
    train_steps: int = 5


CONFIG = Config(Model(8))
PLAIN = {"model": {"d_model": 8, "layers": [1, 2]}, "train_steps": 5}


def test_one_process_at_a_time(tmp_path):
    directory = RunDirectory(str(tmp_path / "run"))
    code = (
        "import sys; from switchx.run_directory import RunDirectory\n"
        "from switchx.errors import UserError\n"
        "try: RunDirectory(sys.argv[1])\n"
        "except UserError as error: print(error)\n"
    )

    def elsewhere() -> str:
        command = [sys.executable, "-c", code, str(directory.path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert "in use by another process" in elsewhere()
    directory.close()
    assert elsewhere() == ""


def test_another_configuration_is_refused_with_the_differing_keys(tmp_path):
    directory = RunDirectory(str(tmp_path))
    directory.check_free(CONFIG, may_change=())
    directory.write_json("config.json", PLAIN)
    directory.check_free(CONFIG, may_change=())
    other = Config(Model(16), train_steps=9)
    with pytest.raises(UserError, match=r"model.d_model \(there 8, now 16\)") as error:
        directory.check_free(other, may_change=("train_steps",))
    assert "train_steps" not in str(error.value)
    assert directory.read_json("config.json") == PLAIN
    directory.check_free(Config(Model(8), train_steps=9), may_change=("train_steps",))


def test_a_run_of_an_earlier_version_goes_on_with_the_defaults_of_new_fields(tmp_path):
    directory = RunDirectory(str(tmp_path))
    directory.write_json("config.json", {"model": {"d_model": 8}})
    directory.check_free(CONFIG, may_change=())
    with pytest.raises(UserError, match=r": model.layers \(there \[1, 2\], now \[3\]\); choose"):
        directory.check_free(Config(Model(8, (3,))), may_change=())
    # A field that is gone was something.
    directory.write_json("config.json", PLAIN | {"colour": "red"})
    with pytest.raises(UserError, match=r": colour \(there 'red', now None\); choose"):
        directory.check_free(CONFIG, may_change=())


def test_checkpoints_of_unknown_origin_are_refused(tmp_path):
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    with pytest.raises(UserError, match="without a config.json"):
        RunDirectory(str(tmp_path)).check_free(CONFIG, may_change=())


def test_a_file_is_no_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        RunDirectory(str(tmp_path / "file"))


def test_files_are_replaced_whole(tmp_path, monkeypatch):
    directory = RunDirectory(str(tmp_path))
    directory.write_json("model.json", {"a": 1})

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("switchx.run_directory.os.replace", fail)
    with pytest.raises(UserError, match="No space left"):
        directory.write_json("model.json", {"a": 2})
    assert directory.read_json("model.json") == {"a": 1}


def test_done(tmp_path):
    directory = RunDirectory(str(tmp_path))
    assert not directory.done
    directory.set_done(True)
    assert directory.done
    directory.set_done(False)
    assert not directory.done


def test_rows_after_the_last_step_and_half_rows_are_forgotten(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = JsonLines(path, last_step=0)
    for step in (1, 2, 3):
        rows.write({"step": step, "text": "é"})
    rows.close()
    with path.open("a") as file:
        file.write('{"step": 4, "los')
    rows = JsonLines(path, last_step=2)
    rows.write({"step": 3, "text": "again"})
    rows.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "text": "é"},
        {"step": 2, "text": "é"},
        {"step": 3, "text": "again"},
    ]


def test_damaged_rows_are_dropped_and_counted(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    good = '{"step": 2, "text": "a\u2028b"}'.encode()
    path.write_bytes(b'[1]\n7\n{"loss": 1}\n\xff\n' + good + b'\n{"step": 3}')
    rows = JsonLines(path, last_step=3)
    rows.write({"step": 4})
    rows.close()
    assert path.read_bytes() == good + b'\n{"step": 3}\n{"step": 4}\n'
    assert "4 line(s) are no JSON rows" in capsys.readouterr().out


def test_a_file_that_is_no_text_is_no_json(tmp_path):
    directory = RunDirectory(str(tmp_path / "run"))
    (directory.path / "config.json").write_bytes(b"\xff\xfe\0")
    with pytest.raises(UserError, match="config.json is not JSON"):
        directory.check_free(CONFIG, may_change=())
    directory.close()


def test_rows_are_json_whatever_the_numbers(tmp_path):
    rows = JsonLines(tmp_path / "metrics.jsonl", last_step=0)
    rows.write({"step": 1, "loss": float("nan"), "by_layer": {"a": [float("inf"), 2.0]}})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text) == {"step": 1, "loss": None, "by_layer": {"a": [None, 2.0]}}


def test_a_full_disk_names_the_file(tmp_path):
    rows = JsonLines(tmp_path / "metrics.jsonl", last_step=0)
    rows._file = open("/dev/full", "w")
    for attempt in (lambda: rows.write({"step": 1}), rows.close):
        with pytest.raises(UserError, match="metrics.jsonl: No space left on device"):
            attempt()


def test_versions_name_packages_and_command():
    found = versions([], {"data": 2})
    assert found["packages"]["jax"] and found["mesh"] == {"data": 2}
    assert found["command"] == sys.argv


def test_rows_of_an_evaluation_replace_their_like(tmp_path):
    def rows() -> list[dict]:
        return [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]

    old = {"step": 2, "split": "test/x", "loss": 1.0}
    put_row(tmp_path, old)
    put_row(tmp_path, {"step": 2, "split": "train", "loss": 3.0})
    put_row(tmp_path, {"step": 4, "split": "test/x", "loss": float("nan")})
    assert rows()[0] == old and rows()[2]["loss"] is None
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "spl')  # cut off, as by a kill
    put_row(tmp_path, old | {"loss": 2.0})
    assert [(row["step"], row["split"]) for row in rows()] == [
        (2, "train"),
        (4, "test/x"),
        (2, "test/x"),
    ]


def test_rows_are_only_appended_beside_a_running_run(tmp_path):
    directory = RunDirectory(str(tmp_path))
    written = JsonLines(tmp_path / "metrics.jsonl", last_step=0)
    put_row(tmp_path, {"step": 1, "split": "test/x"})
    put_row(tmp_path, {"step": 1, "split": "test/x"})
    written.write({"step": 2, "split": "train"})
    written.close()
    directory.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    with pytest.raises(UserError, match="cannot write .*metrics.jsonl"):
        put_row(tmp_path / "none", {"step": 1, "split": "test/x"})


def test_the_vocabulary_of_a_run(tmp_path):
    with pytest.raises(UserError, match="INITIAL_CHECKPOINT_PATH is not set, and the vocabulary"):
        read_vocabulary(None)
    assert read_vocabulary(None, vocabulary="bytes") == "bytes"
    with pytest.raises(UserError, match="has no model.json; give a run directory"):
        read_vocabulary(str(tmp_path))
    (tmp_path / "model.json").write_text("{}")
    for content in (None, "{", "[]", '{"data": {}}', '{"data": {"vocabulary": 3}}'):
        if content is not None:
            (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match="does not say with which vocabulary.*--gin.VOCAB"):
            read_vocabulary(str(tmp_path))
    (tmp_path / "config.json").write_text('{"data": {"vocabulary": "spm8k"}}')
    assert read_vocabulary(str(tmp_path / "checkpoints/7")) == "spm8k"
    # What was converted has its own.
    (tmp_path / "vocabulary.model").touch()
    assert read_vocabulary(str(tmp_path)) == str(tmp_path / "vocabulary.model")
