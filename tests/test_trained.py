import dataclasses
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
    path.write_text("[]")
    with pytest.raises(UserError, match="4/metrics/metrics is not a JSON object"):
        steps("best")
    for step in (2, 4):
        shutil.rmtree(tmp_path / f"run/checkpoints/{step}/metrics")
    with pytest.raises(UserError, match="has no checkpoint of an evaluated step"):
        steps("best")
    with pytest.raises(UserError, match="holds no checkpoint"):
        trained.find_checkpoints(str(tmp_path / "none"))


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


def test_another_model_is_refused(finished):
    wider = dataclasses.replace(finished, model=dataclasses.replace(MODEL, d_ff=32))
    with pytest.raises(UserError, match="do not fit this model"):
        trained.load(wider)
