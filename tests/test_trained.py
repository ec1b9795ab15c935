import dataclasses
import io
import json
import shutil

import numpy as np
import pytest

from switchx import trained
from switchx.data.pipeline import DataConfig
from switchx.data.tasks import FileTask
from switchx.errors import UserError
from switchx.experiment import Experiment, read_experiment
from switchx.run import train
from tests.test_run import MODEL


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Experiment:
    """An experiment that has been run for four steps."""
    folder = tmp_path_factory.mktemp("trained")
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "fat", "rat"]
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice(words, 12)) for _ in range(200)]
    (folder / "text.txt").write_text("\n\n".join(lines))
    experiment = Experiment(
        model=MODEL,
        data=DataConfig(
            mixture_or_task_name="mine",
            task_feature_lengths={"inputs": 40, "targets": 16},
            vocabulary="bytes",
            batch_size=8,
            tasks=(FileTask(name="mine", files=str(folder / "text.txt")),),
        ),
        model_dir=str(folder / "run"),
        train_steps=4,
        eval_period=2,
        checkpoint_period=2,
        num_samples=0,
        eval_steps=1,
    )
    train(experiment)
    return experiment


def test_a_run_directory_says_what_it_is(finished, tmp_path):
    assert read_experiment(finished.model_dir) == finished
    moved = shutil.copytree(finished.model_dir, tmp_path / "moved")
    want = dataclasses.replace(finished, model_dir=str(moved), eval_steps=None)
    assert read_experiment(str(moved), ["EVAL_STEPS=None"]) == want
    (moved / "config.json").write_text('{"model": ')
    with pytest.raises(UserError, match="config.json cannot be read: Expecting value"):
        read_experiment(str(moved))
    for folder, reason in ((moved / "checkpoints", "has neither"), (moved / "no", "is no folder")):
        with pytest.raises(UserError, match=reason):
            read_experiment(str(folder))


def test_a_converted_directory_has_its_model_and_vocabulary(finished, tmp_path):
    (tmp_path / "model.json").write_text(MODEL.to_json())
    with pytest.raises(UserError, match="has no vocabulary.model; name the vocabulary"):
        read_experiment(str(tmp_path))
    found = read_experiment(str(tmp_path), ["DataConfig.vocabulary=bytes"])
    assert (found.model, found.data.vocabulary) == (MODEL, "bytes")
    assert found.model_dir == str(tmp_path)
    (tmp_path / "vocabulary.model").touch()
    assert read_experiment(str(tmp_path)).data.vocabulary == str(tmp_path / "vocabulary.model")


def test_checkpoints_by_what_they_are(finished, tmp_path):
    run = str(shutil.copytree(finished.model_dir, tmp_path / "run"))

    def steps(which: str) -> list[int]:
        return [int(path.name) for path in trained.find_checkpoints(run, which)]

    assert steps("all") == [2, 4] and steps("last") == [4] and steps("2") == [2]
    assert trained.load(finished, trained.find_checkpoints(run, "2")[0]).step == 2
    for step, score in ((2, 1.5), (4, 2.5)):
        path = tmp_path / f"run/checkpoints/{step}/metrics/metrics"
        path.write_text(json.dumps({"cross_entropy": score}))
    assert steps("best") == [2]
    for which in ("3", "newest", ""):
        with pytest.raises(UserError, match=f"no checkpoint '{which}'; there are: last.*, 2, 4"):
            steps(which)
    path.write_text("{}")
    with pytest.raises(UserError, match="4/metrics/metrics does not hold 'cross_entropy'"):
        steps("best")
    for step in (2, 4):
        shutil.rmtree(tmp_path / f"run/checkpoints/{step}/metrics")
    with pytest.raises(UserError, match="no checkpoint in .* was evaluated"):
        steps("best")
    with pytest.raises(UserError, match="holds no checkpoint"):
        trained.find_checkpoints(str(tmp_path / "none"))


def test_decoding_does_not_depend_on_the_texts_around(finished):
    texts = ["the cat", "a fat <extra_id_0> rat", "", *["and saw one"] * 9]
    together = list(trained.decode(finished, texts))
    assert [row["inputs"] for row in together] == texts
    alone = [next(trained.decode(finished, [text])) for text in texts[:3]]
    assert together[:3] == alone
    assert all(isinstance(row["prediction"], str) for row in together)


def test_what_is_too_long_is_cut_aloud(finished, capsys):
    short, long = trained.decode(finished, ["the cat", "the cat " * 20])
    assert "truncated" not in short and long["truncated"] == 160 + 1 - 40
    assert "1 input(s) were longer than TASK_FEATURE_LENGTHS" in capsys.readouterr().err


def test_a_directory_without_checkpoint(finished, tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        trained.load(dataclasses.replace(finished, model_dir=str(tmp_path)))


def test_a_checkpoint_without_parameters_is_damaged(finished, tmp_path):
    shutil.copytree(finished.model_dir, tmp_path / "run")
    newest = max((tmp_path / "run/checkpoints").iterdir(), key=lambda path: int(path.name))
    shutil.rmtree(newest / "params")
    with pytest.raises(UserError, match=f"/{newest.name} .*params is missing") as error:
        trained.load(dataclasses.replace(finished, model_dir=str(tmp_path / "run")))
    assert "\n" not in str(error.value)


def test_standard_output_is_for_the_rows(finished, tmp_path, capsys):
    shutil.copytree(finished.model_dir, tmp_path / "run")
    for manifest in (tmp_path / "run").rglob("checksums.json"):
        manifest.unlink()
    elsewhere = dataclasses.replace(finished, model_dir=str(tmp_path / "run"))
    trained.write_rows(trained.decode(elsewhere, ["a"]), None)
    output, notes = capsys.readouterr()
    assert [json.loads(line)["inputs"] for line in output.splitlines()] == ["a"]
    assert "no checksums; read unchecked" in notes


def test_another_model_is_refused(finished):
    wider = dataclasses.replace(finished, model=dataclasses.replace(MODEL, d_ff=32))
    with pytest.raises(UserError, match="do not fit this model"):
        trained.load(wider)


def test_rows_are_written_once(tmp_path, capsys):
    rows = [{"prediction": "naïve"}, {"prediction": "b"}]
    trained.write_rows(rows, None)
    assert capsys.readouterr().out == '{"prediction": "naïve"}\n{"prediction": "b"}\n'
    trained.write_rows(rows, str(tmp_path / "out.jsonl"))
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").open()] == rows
    with pytest.raises(UserError, match="exists; choose another"):
        trained.write_rows([], str(tmp_path / "out.jsonl"))
    assert (tmp_path / "out.jsonl").stat().st_size
    with pytest.raises(UserError, match="cannot be written"):
        trained.write_rows([], str(tmp_path / "no/out.jsonl"))


def test_a_mistake_leaves_no_empty_file(finished, tmp_path):
    nowhere = dataclasses.replace(finished, model_dir=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="holds no checkpoint"):
        trained.write_rows(trained.decode(nowhere, ["a"]), str(tmp_path / "out.jsonl"))
    assert not (tmp_path / "out.jsonl").exists()


def test_texts_from_a_file_or_standard_input(tmp_path, monkeypatch):
    (tmp_path / "in.txt").write_text("one\r\ntwo\n\nthree")
    assert list(trained.read_texts(str(tmp_path / "in.txt"))) == ["one", "two", "", "three"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("ä\r\nb\n\nc".encode())))
    assert list(trained.read_texts("-")) == ["ä", "b", "", "c"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\nb\xff\n")))
    with pytest.raises(UserError, match="standard input, line 2: not UTF-8"):
        list(trained.read_texts("-"))
    with pytest.raises(UserError, match="cannot be read"):
        list(trained.read_texts(str(tmp_path / "none.txt")))
