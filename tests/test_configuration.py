import pathlib

import pytest

from switchx import configuration
from switchx.errors import UserError
from switchx.experiment import Experiment

ROOT = pathlib.Path(__file__).parents[1]
ENTRIES = sorted(path.name for path in (ROOT / "gin_configs").glob("*.gin"))


def build(*bindings: str, files=("gin_configs/switch_tiny.gin",), **options) -> Experiment:
    return configuration.build(Experiment, list(files), list(bindings), **options)


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_configuration_builds(entry):
    experiment = build(files=[f"gin_configs/{entry}"])
    assert experiment.model_dir == f"runs/{entry.removesuffix('.gin')}"
    assert (experiment.model.moe is not None) == entry.startswith("switch")


def test_sizes_of_the_entry_configurations():
    sizes = {entry: build(files=[f"gin_configs/{entry}"]).model.num_params for entry in ENTRIES}
    assert sizes["switch_base.gin"] == 619_339_008
    assert sizes["t5_base.gin"] == 222_903_552
    assert sizes["switch_tiny.gin"] == 6_560_768


def test_dense_twins_differ_only_in_the_sparse_layers():
    for size in ("tiny", "base"):
        sparse = build(files=[f"gin_configs/switch_{size}.gin"])
        dense = build(files=[f"gin_configs/t5_{size}.gin"])
        lengths = sparse.lengths
        routers = 2 * sparse.model.d_model * sparse.model.moe.num_experts
        tokens = sum(sparse.model.encoder_sparse) * lengths[0]
        tokens += sum(sparse.model.decoder_sparse) * lengths[1]
        assert (
            sparse.model.flops_per_sequence(*lengths)
            == dense.model.flops_per_sequence(*lengths) + routers * tokens
        )
        assert sparse.data == dense.data and sparse.optimizer == dense.optimizer


def test_every_documented_macro_reaches_its_field():
    experiment = build(
        "MODEL_DIR=/x/y",
        "MIXTURE_OR_TASK_NAME=embedded_prefix_lm",
        "TASK_FEATURE_LENGTHS={'inputs': 64, 'targets': 32}",
        "BATCH_SIZE=16",
        "TRAIN_STEPS=7",
        "EVAL_PERIOD=3",
        "EVAL_STEPS=None",
        "CHECKPOINT_PERIOD=2",
        "INITIAL_CHECKPOINT_PATH=/a/b",
        "RANDOM_SEED=5",
        "LEARNING_RATE=0.25",
        "DROPOUT_RATE=0.1",
        "EXPERT_DROPOUT_RATE=0.4",
        "NUM_EXPERTS=4",
        "CAPACITY_FACTOR=1.5",
        "EVAL_CAPACITY_FACTOR=3.0",
        "NUM_MICROBATCHES=2",
        "MESH={'data': 2, 'expert': 4}",
    )
    model, data = experiment.model, experiment.data
    assert experiment.model_dir == "/x/y"
    assert data.mixture_or_task_name == "embedded_prefix_lm"
    assert experiment.lengths == (64, 32)
    assert data.batch_size == 16
    assert experiment.train_steps == 7
    assert (experiment.eval_period, experiment.eval_steps) == (3, None)
    assert experiment.checkpoint_period == 2
    assert experiment.initial_checkpoint_path == "/a/b"
    assert (experiment.seed, data.seed) == (5, 5)
    assert experiment.optimizer.learning_rate == 0.25
    assert (model.dropout_rate, model.moe.expert_dropout_rate) == (0.1, 0.4)
    assert model.moe.num_experts == 4
    assert (model.moe.capacity_factor, model.moe.eval_capacity_factor) == (1.5, 3.0)
    assert experiment.num_microbatches == 2
    assert experiment.mesh == {"data": 2, "expert": 4}


def test_the_operative_configuration_builds_the_same_experiment(tmp_path):
    experiment = build("TRAIN_STEPS=11", "MODEL_DIR=/some where/else")
    text = configuration.operative_config()
    assert "TRAIN_STEPS = 11" in text
    (tmp_path / "config.gin").write_text(text)
    assert build(files=[str(tmp_path / "config.gin")]) == experiment


def test_fields_can_be_bound_without_a_macro():
    assert build("OptimizerConfig.clip_norm=1.0").optimizer.clip_norm == 1.0
    assert build("ModelConfig.dtype=bfloat16").model.dtype == "bfloat16"
    assert build("ModelConfig.dtype='bfloat16'").model.dtype == "bfloat16"


def test_later_files_win_and_search_paths_are_searched(tmp_path):
    (tmp_path / "longer.gin").write_text("TRAIN_STEPS = 99\n")
    files = ["gin_configs/switch_tiny.gin", "longer.gin"]
    experiment = build(files=files, search_paths=[str(tmp_path)])
    assert experiment.train_steps == 99
    assert experiment.model_dir == "runs/switch_tiny-longer"


def test_one_build_leaves_nothing_to_the_next():
    build("TRAIN_STEPS=11")
    assert build().train_steps != 11
    with pytest.raises(UserError):
        build("TRAIN_STEP=11")
    assert build().train_steps != 11
