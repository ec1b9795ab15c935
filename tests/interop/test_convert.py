import dataclasses
import pathlib
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from switchx import trained
from switchx.data.pipeline import DataConfig
from switchx.data.tasks import FileTask
from switchx.errors import UserError
from switchx.experiment import Experiment
from switchx.interop import convert, hf
from switchx.models.config import ModelConfig
from switchx.run import train
from switchx.training import lora
from switchx.training.lora import LoraConfig
from switchx.training.optimizer import OptimizerConfig

ORACLES = pathlib.Path(__file__).parents[1] / "oracles" / "huggingface"
VOCABULARY = pathlib.Path(__file__).parents[2] / "switchx/data/embedded/spm8k.model"


def saved_params(config, directory):
    data = DataConfig(vocabulary="bytes", task_feature_lengths={"inputs": 16, "targets": 8})
    experiment = Experiment(model=config, data=data, model_dir=str(directory))
    return trained.load(experiment).params


@pytest.mark.parametrize("scan_layers", [False, True])
def test_the_run_directory_holds_what_load_gives(tmp_path, scan_layers, monkeypatch):
    # The oracle's vocabulary of 128 is smaller than any of ours.
    monkeypatch.setattr(trained, "check_fits", lambda experiment, mesh: None)
    source = ORACLES / "switch_steps_bias_untied"
    converted = convert.from_hf(str(source), str(tmp_path / "run"), scan_layers=scan_layers)
    loaded = hf.load(source, scan_layers=scan_layers)
    config = ModelConfig.from_json((tmp_path / "run/model.json").read_text())
    assert config == converted.config == loaded.config
    params = saved_params(config, tmp_path / "run")
    assert jax.tree.structure(params) == jax.tree.structure(loaded.params)
    jax.tree.map(np.testing.assert_array_equal, params, loaded.params)


def test_the_vocabulary_comes_along_and_the_next_commands_are_named(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(ORACLES / "t5_v10_relu_tied", source)
    converted = convert.from_hf(str(source), str(tmp_path / "without"))
    assert converted.vocabulary is None
    assert "no spiece.model" in convert.describe(converted)
    shutil.copy(VOCABULARY, source / "spiece.model")
    converted = convert.from_hf(str(source), str(tmp_path / "with"))
    assert converted.vocabulary == tmp_path / "with/vocabulary.model"
    assert converted.vocabulary.read_bytes() == VOCABULARY.read_bytes()
    text = convert.describe(converted)
    assert f"INITIAL_CHECKPOINT_PATH={tmp_path / 'with'}" in text
    assert f"DataConfig.vocabulary={converted.vocabulary}" in text


def test_a_directory_that_holds_a_run_is_left_alone(tmp_path):
    source = str(ORACLES / "switch")
    convert.from_hf(source, str(tmp_path / "run"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    with pytest.raises(UserError, match="model.json exists; choose another"):
        convert.from_hf(source, str(tmp_path / "run"))
    (tmp_path / "half/checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="checkpoints exists; choose another"):
        convert.from_hf(source, str(tmp_path / "half"))
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_source_that_cannot_be_read_leaves_no_directory(tmp_path):
    with pytest.raises(UserError):
        convert.from_hf(str(tmp_path / "nothing"), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_training_a_converted_directory_in_place_is_refused(tmp_path):
    convert.from_hf(str(ORACLES / "switch"), str(tmp_path))
    config = ModelConfig.from_json((tmp_path / "model.json").read_text())
    config = ModelConfig(**{**vars(config), "vocab_size": 384})
    experiment = Experiment(
        model=config, data=DataConfig(vocabulary="bytes"), model_dir=str(tmp_path)
    )
    with pytest.raises(UserError, match="INITIAL_CHECKPOINT_PATH"):
        train(experiment)


def test_a_run_with_adapters_is_exported_merged(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n".join("the cat sat on a mat and saw a rat" for _ in range(99)))
    base = Experiment(
        model=ModelConfig(
            vocab_size=384,
            d_model=8,
            d_ff=12,
            num_heads=2,
            head_dim=4,
            num_encoder_layers=1,
            num_decoder_layers=1,
        ),
        data=DataConfig(
            mixture_or_task_name="mine",
            task_feature_lengths={"inputs": 40, "targets": 16},
            vocabulary="bytes",
            batch_size=8,
            tasks=(FileTask("mine", str(text)),),
        ),
        optimizer=OptimizerConfig(name="adamw", learning_rate=0.1, schedule="constant"),
        lora=LoraConfig(rank=2, targets="attention"),
        model_dir=str(tmp_path / "adapted"),
        train_steps=2,
        eval_steps=1,
        num_samples=0,
    )
    train(base)
    converted = convert.from_run(str(tmp_path / "adapted"), str(tmp_path / "merged"))
    with ocp.StandardCheckpointer() as checkpointer:
        folders = [tmp_path / name / "checkpoints/2/params" for name in ("adapted", "merged")]
        adapted, merged = map(checkpointer.restore, folders)
    assert "adapters" in adapted and "adapters" not in merged
    jax.tree.map(np.testing.assert_array_equal, merged, jax.device_get(lora.merge(adapted)))
    assert "DataConfig.vocabulary=bytes" in convert.describe(converted)
    # Read merged wherever they are read, and read plainly once exported.
    for experiment in (base, dataclasses.replace(base, model_dir=str(tmp_path / "merged"))):
        params = trained.load(dataclasses.replace(experiment, lora=None)).params
        jax.tree.map(np.testing.assert_array_equal, params, merged)
    with pytest.raises(UserError, match="exists; choose another"):
        convert.from_run(str(tmp_path / "adapted"), str(tmp_path / "merged"))
    with pytest.raises(UserError, match="--scan_layers and --allow_pickle are of --from=hf"):
        convert.from_run(str(tmp_path / "adapted"), str(tmp_path / "x"), scan_layers=True)
