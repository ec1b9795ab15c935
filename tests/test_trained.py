import dataclasses
import io
import json
import shutil

import numpy as np
import pytest

from switchx import trained
from switchx.data import mixtures
from switchx.data.pipeline import DataConfig
from switchx.data.tasks import FileTask
from switchx.errors import UserError
from switchx.experiment import Experiment
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


def metrics(experiment) -> list[dict]:
    with open(f"{experiment.model_dir}/metrics.jsonl") as file:
        return [json.loads(line) for line in file]


def evaluated(experiment, step: int) -> dict:
    """The row that training wrote of the evaluation at a step."""
    rows = [row for row in metrics(experiment) if row["split"] == "eval/mine"]
    return next(row for row in rows if row["step"] == step)


def test_evaluation_gives_the_row_that_training_wrote(finished):
    (row,) = trained.evaluate(finished)
    want = evaluated(finished, 4)
    assert row["step"] == 4 and row["split"] == "validation/mine"
    assert row["checkpoint"].endswith("checkpoints/4")
    for name in ("loss", "cross_entropy", "accuracy", "dropped_fraction"):
        assert row[name] == pytest.approx(want[name], rel=1e-5), name


def test_another_step_and_another_split(finished):
    path = f"{finished.model_dir}/checkpoints/2"
    (row,) = trained.evaluate(dataclasses.replace(finished, initial_checkpoint_path=path))
    want = evaluated(finished, 2)
    assert row["step"] == 2
    assert row["cross_entropy"] == pytest.approx(want["cross_entropy"], rel=1e-5)
    (row,) = trained.evaluate(finished, split="train")
    assert row["split"] == "train/mine" and row["cross_entropy"] != want["cross_entropy"]


def test_evaluation_writes_nothing_into_the_run(finished):
    before = metrics(finished)
    trained.evaluate(finished)
    assert metrics(finished) == before


def test_a_mixture_is_evaluated_task_by_task(finished):
    # Long enough for most pronunciations: a task whose targets mostly do not fit is refused.
    lengths = {"inputs": 40, "targets": 32}
    data = dataclasses.replace(
        finished.data, mixture_or_task_name="embedded_tasks", task_feature_lengths=lengths
    )
    rows = trained.evaluate(dataclasses.replace(finished, data=data))
    names = mixtures.EMBEDDED["embedded_tasks"].tasks
    assert {row["split"] for row in rows} == {f"validation/{name}" for name in names}
    assert len({row["cross_entropy"] for row in rows}) == 8


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
    trained.write_rows(trained.evaluate(elsewhere), None)
    output, notes = capsys.readouterr()
    assert [json.loads(line)["split"] for line in output.splitlines()]
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
