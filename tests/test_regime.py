"""Regimes of a few steps, in this process."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from switchx import regime as regimes
from switchx.data.pipeline import DataConfig
from switchx.data.tasks import FileTask
from switchx.errors import UserError
from switchx.experiment import Experiment
from switchx.models.config import ModelConfig
from switchx.regime import Regime, Stage
from switchx.training.optimizer import OptimizerConfig

MODEL = ModelConfig(
    vocab_size=384,
    d_model=8,
    d_ff=12,
    num_heads=2,
    head_dim=4,
    num_encoder_layers=1,
    num_decoder_layers=1,
)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> Experiment:
    folder = tmp_path_factory.mktemp("pairs")
    tasks = []
    for name in ("first", "second", "third"):
        rows = [{"inputs": f"{name} {n}", "targets": str(n % 3)} for n in range(20)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        tasks.append(FileTask(name, str(folder / f"{name}.jsonl"), objective="supervised"))
    data = DataConfig(
        mixture_or_task_name="first",
        task_feature_lengths={"inputs": 24, "targets": 8},
        vocabulary="bytes",
        batch_size=16,
        tasks=tasks,
    )
    return Experiment(
        model=MODEL,
        data=data,
        optimizer=OptimizerConfig(warmup_steps=1, learning_rate=0.1, schedule="constant"),
        train_steps=4,
        eval_period=2,
        eval_steps=1,
        checkpoint_period=2,
        num_samples=0,
        mesh={"data": 8},
    )


def on(experiment: Experiment, task: str, **changes) -> Experiment:
    data = dataclasses.replace(experiment.data, mixture_or_task_name=task)
    return dataclasses.replace(experiment, data=data, **changes)


def two_stages(experiment, folder, **changes) -> Regime:
    stages = [
        Stage("general", on(experiment, "first")),
        Stage("special", on(experiment, "first"), tasks=["second", "third"]),
    ]
    return Regime(**({"stages": stages, "model_dir": str(folder)} | changes))


def config_of(directory: pathlib.Path) -> dict:
    return json.loads((directory / "config.json").read_text())


def test_stages_follow_one_another_and_are_not_done_twice(
    experiment, tmp_path, capsys, monkeypatch
):
    # Of the first stage, the worst by this metric is the last.
    first = on(experiment, "first", best_metric="num_tokens", best_direction="lowest")
    stages = [
        Stage("general", first),
        Stage("special", on(experiment, "first"), tasks=["second", "third"]),
    ]
    regime = Regime(stages, str(tmp_path))

    def interrupt(experiment: Experiment, config_gin: str):
        if experiment.model_dir.endswith("third"):
            raise KeyboardInterrupt
        return train(experiment, config_gin)

    train = regimes.train
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(regimes, "train", interrupt)
        regimes.run(regime, "# gin")
    before = capsys.readouterr().out
    assert before.index("1. general: first, 4 steps") < before.index("2. special: second, 4 steps")
    done = {path: path.read_text() for path in tmp_path.rglob("metrics.jsonl")}
    assert len(done) == 2

    outcomes = regimes.run(regime, "# gin")
    assert [(each.stage, each.task, each.steps) for each in outcomes] == [
        ("general", "first", 4),
        ("special", "second", 4),
        ("special", "third", 4),
    ]
    for path, text in done.items():
        assert path.read_text() == text
    # Equal by the metric, so the earlier one; both special runs start from it.
    start = str(tmp_path / "general/checkpoints/2")
    assert str(outcomes[0].checkpoint) == start
    for task in ("second", "third"):
        assert config_of(tmp_path / "special" / task)["initial_checkpoint_path"] == start
        assert (tmp_path / "special" / task / "config.gin").read_text() == "# gin"
        row = next(each for each in outcomes if each.task == task)
        assert row.best["step"] == int(row.checkpoint.name)
        assert np.isfinite(row.best["cross_entropy"])
    text = capsys.readouterr().out
    assert "2. special: second, 4 steps; complete, was from the best checkpoint" in text
    assert "special  third" in text.splitlines()[-1]


def test_the_next_stage_may_start_from_the_last_checkpoint(experiment, tmp_path):
    short = dict(best_metric="num_tokens", train_steps=4)
    stages = [
        Stage("one", on(experiment, "first", **short)),
        Stage("two", on(experiment, "second", train_steps=2)),
    ]
    regimes.run(Regime(stages, str(tmp_path), start="last"))
    assert config_of(tmp_path / "two")["initial_checkpoint_path"].endswith("one/checkpoints/4")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(stages=[]), "Regime.stages is empty; give --gin_file="),
        (dict(start="bst"), "Regime.start = 'bst' is unknown; did you mean 'best'"),
        (dict(model_dir=""), "Regime.model_dir = ''"),
    ],
    ids=str,
)
def test_mistaken_regimes(experiment, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        two_stages(experiment, tmp_path, **changes)


def test_stages_that_cannot_follow_one_another(experiment, tmp_path):
    one, several = Stage("one", experiment), Stage("two", experiment, tasks=["first", "second"])
    with pytest.raises(UserError, match="'two' has 2 tasks.*only the last stage"):
        Regime([several, one])
    with pytest.raises(UserError, match="two called 'one'"):
        Regime([one, one])
    with pytest.raises(UserError, match="EVAL_PERIOD = 3 of stage 'one' is not a multiple"):
        Regime([Stage("one", dataclasses.replace(experiment, eval_period=3))])
    with pytest.raises(UserError, match="keep_best_checkpoints = 0 in stage 'one'"):
        Regime([Stage("one", dataclasses.replace(experiment, keep_best_checkpoints=0))])
    for fields in (dict(name="a/b"), dict(tasks=[]), dict(tasks=["first", "first"])):
        with pytest.raises(UserError, match=f"Stage.{next(iter(fields))}"):
            dataclasses.replace(one, **fields)


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ("secnd", {}, "'secnd'.*did you mean"),
        ("second", {"initial_checkpoint_path": "nowhere"}, "nowhere' holds no checkpoint"),
        ("second", {"num_microbatches": 3}, "NUM_MICROBATCHES = 3"),
        ("second", {"trainable": "expert"}, "'expert' names no parameter.*closest is 'experts'"),
    ],
)
def test_what_is_wrong_with_any_stage_is_said_before_the_first(
    experiment, tmp_path, task, changes, message
):
    regime = Regime(
        [
            Stage("general", on(experiment, "first", **changes)),
            Stage("special", experiment, tasks=[task]),
        ],
        str(tmp_path / "runs"),
    )
    with pytest.raises(UserError, match=message) as error:
        regimes.run(regime)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_holds_other_runs_is_left_alone(experiment, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="holds a run; a regime needs a folder"):
        regimes.run(two_stages(experiment, tmp_path))
    (tmp_path / "config.json").rename(tmp_path / "special.json")
    (tmp_path / "special/third").mkdir(parents=True)
    (tmp_path / "special/third/config.json").write_text('{"seed": 1}')
    with pytest.raises(UserError, match="third' holds a run of another configuration"):
        regimes.run(two_stages(experiment, tmp_path))
    assert not (tmp_path / "general").exists()
