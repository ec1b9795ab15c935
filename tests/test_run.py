"""Whole runs, in this process, on models of a few thousand parameters."""

import dataclasses
import json
import math

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from switchx.data.pipeline import DataConfig
from switchx.data.tasks import FileTask
from switchx.errors import UserError
from switchx.experiment import Experiment
from switchx.models.config import ModelConfig
from switchx.moe.config import MoeConfig
from switchx.run import train
from switchx.training.lora import LoraConfig
from switchx.training.optimizer import OptimizerConfig

MODEL = ModelConfig(
    vocab_size=384,
    d_model=16,
    d_ff=24,
    num_heads=2,
    head_dim=8,
    num_encoder_layers=2,
    num_decoder_layers=2,
    moe=MoeConfig(num_experts=4, group_size="row"),
)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "fat", "rat"]
    rng = np.random.default_rng(0)
    path.write_text("\n".join(" ".join(rng.choice(words, 12)) for _ in range(400)))
    return str(path)


@pytest.fixture(scope="module")
def experiment(text) -> Experiment:
    data = DataConfig(
        mixture_or_task_name="mine",
        task_feature_lengths={"inputs": 40, "targets": 16},
        vocabulary="bytes",
        batch_size=8,
        tasks=(FileTask(name="mine", files=text),),
    )
    return Experiment(
        model=MODEL,
        data=data,
        optimizer=OptimizerConfig(warmup_steps=100),
        train_steps=12,
        eval_period=6,
        eval_steps=2,
        checkpoint_period=5,
        log_period=3,
        num_samples=2,
        sample_length=5,
        mesh={"data": 8},
    )


@pytest.fixture(scope="module")
def finished(experiment, tmp_path_factory) -> Experiment:
    directory = tmp_path_factory.mktemp("runs") / "first"
    finished = dataclasses.replace(experiment, model_dir=str(directory), log_norms=True)
    train(finished, "# gin text")
    return finished


def path(experiment: Experiment, name: str):
    import pathlib

    return pathlib.Path(experiment.model_dir, name)


def rows(experiment: Experiment, split: str) -> list[dict]:
    lines = path(experiment, "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["split"] == split]


def test_a_run_directory_holds_everything(finished):
    assert path(finished, "config.gin").read_text() == "# gin text"
    assert ModelConfig.from_json(path(finished, "model.json").read_text()) == finished.model
    config = json.loads(path(finished, "config.json").read_text())
    assert config["data"]["batch_size"] == 8 and config["model"]["moe"]["num_experts"] == 4
    assert json.loads(path(finished, "versions.json").read_text())["mesh"]["data"] == 8
    assert path(finished, "DONE").exists()
    assert list(path(finished, ".").glob("events.out.*"))
    steps = {int(entry.name) for entry in path(finished, "checkpoints").iterdir()}
    assert {10, 12} <= steps
    samples = [
        json.loads(line) for line in path(finished, "samples.jsonl").read_text().splitlines()
    ]
    assert [sample["step"] for sample in samples] == [6, 6, 12, 12]
    assert all("<extra_id_0>" in sample["inputs"] for sample in samples)
    assert samples[0]["inputs"] == samples[2]["inputs"]


def test_metrics_rows_hold_the_contract(finished):
    train_rows, eval_rows = rows(finished, "train"), rows(finished, "eval/mine")
    assert [row["step"] for row in train_rows] == [1, 3, 6, 9, 12]
    assert [row["step"] for row in eval_rows] == [6, 12]
    for row in train_rows:
        for name in ("learning_rate", "grad_norm", "tokens_per_second", "step_seconds"):
            assert row[name] > 0
        assert row["mfu"] is None  # the peak of a CPU is not known
        assert set(row["norms"]) == {"param", "update"}
    for row in train_rows + eval_rows:
        assert set(row["expert_load"]) == {"encoder/1", "decoder/1"}
        for load in row["expert_load"].values():
            assert len(load) == 4 and abs(sum(load) - 1) < 1e-4
        parts = row["cross_entropy"] + row["z_loss"]
        parts += 1e-2 * row["load_balance_loss"] + 1e-3 * row["router_z_loss"]
        assert abs(row["loss"] - parts) < 1e-5
        assert 0 <= row["dropped_fraction"] < 1
        assert abs(row["perplexity"] - math.exp(row["cross_entropy"])) < 1e-3
    assert eval_rows[-1]["cross_entropy"] < eval_rows[0]["cross_entropy"]


def test_a_complete_run_stays_as_it_is_and_a_longer_one_goes_on(finished, capsys):
    before = path(finished, "metrics.jsonl").read_text()
    assert train(finished) == {}
    assert "complete at step 12" in capsys.readouterr().out
    assert path(finished, "metrics.jsonl").read_text() == before
    longer = dataclasses.replace(finished, train_steps=14, eval_period=14)
    train(longer)
    assert [row["step"] for row in rows(longer, "train")] == [1, 3, 6, 9, 12]
    assert [row["step"] for row in rows(longer, "eval/mine")] == [6, 12, 14]


def test_a_complete_run_without_checkpoints_is_not_begun_again(experiment, tmp_path):
    run = dataclasses.replace(experiment, model_dir=str(tmp_path))
    path(run, "DONE").touch()
    path(run, "metrics.jsonl").write_text('{"step": 3}\n')
    with pytest.raises(UserError, match="checkpoints are gone"):
        train(run)
    assert path(run, "metrics.jsonl").read_text() == '{"step": 3}\n'


def test_another_configuration_is_refused(finished):
    other = dataclasses.replace(finished, model=dataclasses.replace(MODEL, d_ff=32))
    with pytest.raises(UserError, match=r"model.d_ff \(there 24, now 32\)"):
        train(other)


@pytest.mark.parametrize("with_optimizer", [False, True])
def test_a_new_run_starts_from_anothers_parameters(finished, tmp_path, with_optimizer):
    # With a learning rate too small to matter, the first evaluation is the old run's last.
    start = dataclasses.replace(
        finished,
        model_dir=str(tmp_path / "second"),
        initial_checkpoint_path=str(path(finished, "checkpoints") / "12"),
        initial_optimizer=with_optimizer,
        optimizer=dataclasses.replace(finished.optimizer, learning_rate=1e-12),
        train_steps=1,
    )
    summary = train(start)
    old = next(row for row in rows(finished, "eval/mine") if row["step"] == 12)
    np.testing.assert_allclose(summary["cross_entropy"], old["cross_entropy"], rtol=1e-5)
    assert rows(start, "eval/mine")[-1]["step"] == 1


def test_the_mesh_does_not_change_the_numbers(experiment, finished, tmp_path):
    other = dataclasses.replace(
        experiment, model_dir=str(tmp_path / "mesh"), mesh={"data": 2, "expert": 4}, log_norms=True
    )
    train(other)
    for row, same in zip(rows(other, "train"), rows(finished, "train"), strict=False):
        for name in ("loss", "grad_norm", "dropped_fraction"):
            np.testing.assert_allclose(row[name], same[name], rtol=2e-4, err_msg=name)


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_loss_that_is_not_finite_stops_or_is_skipped(experiment, tmp_path, policy, capsys):
    run = dataclasses.replace(
        experiment,
        model_dir=str(tmp_path / policy),
        optimizer=OptimizerConfig(
            name="adamw", learning_rate=1e38, schedule="constant", warmup_steps=0
        ),
        train_steps=4,
        eval_period=4,
        log_period=1,
        on_nonfinite=policy,
        num_samples=0,
    )
    if policy == "stop":
        with pytest.raises(UserError, match=r"step 2: .* is (nan|inf).*not applied"):
            train(run)
        assert not path(run, "DONE").exists()
    else:
        train(run)
        assert "step 2: " in capsys.readouterr().out
        assert [row["update_skipped"] for row in rows(run, "train")] == [False, True, True, True]


def test_dense_models_train_too(experiment, tmp_path):
    dense = dataclasses.replace(
        experiment,
        model=dataclasses.replace(MODEL, moe=None),
        model_dir=str(tmp_path / "dense"),
        train_steps=2,
        mesh={"data": -1},
    )
    summary = train(dense)
    assert "expert_load" not in summary and math.isfinite(summary["loss"])


# Fine-tuning ------------------------------------------------------------------------------------

DENSE = dataclasses.replace(MODEL, moe=None, num_encoder_layers=1, num_decoder_layers=1)


def small(experiment, directory, **changes) -> Experiment:
    fields = dict(
        model=DENSE,
        model_dir=str(directory),
        eval_period=2,
        checkpoint_period=2,
        num_samples=0,
        log_period=1,
    )
    return dataclasses.replace(experiment, **(fields | changes))


def test_early_stopping_ends_a_run_and_survives_a_restart(experiment, tmp_path, capsys):
    # The number of tokens is the same at every evaluation: never better than at step 2.
    fields = dict(best_metric="num_tokens", early_stopping_patience=3, eval_first=True)
    run = small(experiment, tmp_path / "whole", **fields)
    train(run)
    assert "stopped early: 3 evaluations since the highest num_tokens, at step 2" in (
        capsys.readouterr().out
    )
    assert [row["step"] for row in rows(run, "eval/mine")] == [0, 2, 4, 6, 8]
    assert path(run, "DONE").exists() and path(run, "checkpoints/8/params").exists()
    # The best and the last three.
    kept = sorted(int(entry.name) for entry in path(run, "checkpoints").iterdir())
    assert kept == [2, 4, 6, 8]

    # The same, stopped after 4 steps and begun again; then complete, whatever TRAIN_STEPS says.
    parts = dataclasses.replace(run, model_dir=str(tmp_path / "parts"))
    train(dataclasses.replace(parts, train_steps=4))
    train(parts)
    assert [row["step"] for row in rows(parts, "eval/mine")] == [0, 2, 4, 6, 8]
    before = path(parts, "metrics.jsonl").read_text()
    # As a kill between the last save and DONE leaves it.
    path(parts, "DONE").unlink()
    for _ in range(2):
        train(dataclasses.replace(parts, train_steps=20))
        assert path(parts, "metrics.jsonl").read_text() == before and path(parts, "DONE").exists()
    assert "complete: stopped early at step 8" in capsys.readouterr().out
    train(dataclasses.replace(parts, early_stopping_patience=4))
    assert rows(parts, "eval/mine")[-1]["step"] == 10


def test_a_misspelt_metric_is_known_before_training(experiment, tmp_path):
    run = small(experiment, tmp_path, best_metric="acuracy", eval_first=True)
    with pytest.raises(UserError, match="best_metric = 'acuracy' .*did you mean 'accuracy'"):
        train(run)
    assert rows(run, "train") == []
    train(dataclasses.replace(run, best_metric="accuracy", train_steps=2))
    assert [row["step"] for row in rows(run, "eval/mine")] == [0, 2]


def test_adapters_are_trained_resumed_and_merged(experiment, tmp_path, capsys):
    base = small(experiment, tmp_path / "base", train_steps=2)
    trained_base = train(base)
    changes = dict(
        lora=LoraConfig(rank=2, targets="attention"),
        initial_checkpoint_path=base.model_dir,
        optimizer=OptimizerConfig(
            name="adamw", learning_rate=0.01, schedule="constant", warmup_steps=0
        ),
        train_steps=4,
        eval_first=True,
    )
    adapted = small(experiment, tmp_path / "adapted", **changes)
    summary = train(adapted)
    assert "trained      768 parameters" in capsys.readouterr().out
    first, *_, last = rows(adapted, "eval/mine")
    # Nothing is changed by adapters that are new.
    np.testing.assert_allclose(first["loss"], trained_base["loss"], rtol=1e-6)
    assert last["loss"] < first["loss"]

    # In two parts, to the bit.
    parts = dataclasses.replace(adapted, model_dir=str(tmp_path / "parts"))
    train(dataclasses.replace(parts, train_steps=2))
    assert train(parts)["loss"] == summary["loss"]

    # Where another run starts, they are part of its parameters.
    next_run = small(
        experiment,
        tmp_path / "next",
        initial_checkpoint_path=adapted.model_dir,
        eval_first=True,
        train_steps=1,
    )
    train(next_run)
    start = rows(next_run, "eval/mine")[0]
    np.testing.assert_allclose(start["loss"], summary["loss"], rtol=1e-6)
    assert not path(next_run, "checkpoints/1/params/adapters").exists()


def test_a_subset_keeps_its_share_of_the_optimizer(experiment, tmp_path):
    base = small(experiment, tmp_path / "base", train_steps=2)
    train(base)
    part = small(
        experiment,
        tmp_path / "part",
        initial_checkpoint_path=base.model_dir,
        initial_optimizer=True,
        trainable="attention",
        train_steps=2,
    )
    train(part)
    states = {}
    for run in (base, part):
        with ocp.StandardCheckpointer() as checkpointer:
            folder = path(run, "checkpoints/2/optimizer").absolute()
            states[run.model_dir] = checkpointer.restore(folder)
    whole, less = states[base.model_dir]["opt_state"], states[part.model_dir]["opt_state"]
    assert (whole["count"], less["count"]) == (2, 4)  # moments go on, steps begin again
    assert set(less["v"]["encoder"]["layers_0"]) == {"attention"}
    assert "token_embedder" in whole["v"] and "token_embedder" not in less["v"]
    # What was not trained has no state to go on with.
    back = dataclasses.replace(
        part,
        model_dir=str(tmp_path / "back"),
        trainable=None,
        initial_checkpoint_path=part.model_dir,
    )
    with pytest.raises(UserError, match="optimizer state of .* is not that of this"):
        train(back)


def test_devices_of_this_test():
    assert jax.device_count() == 8
