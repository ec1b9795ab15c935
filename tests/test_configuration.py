import dataclasses
import os
import pathlib
import subprocess
import sys

import pytest

from switchx import configuration, sharding
from switchx.errors import UserError
from switchx.experiment import Experiment, check_fits
from switchx.models.config import ModelConfig
from switchx.moe.routing import ROUTERS

ROOT = pathlib.Path(__file__).parents[1]
ENTRIES = sorted(path.name for path in (ROOT / "gin_configs").glob("*.gin"))


def build(*bindings: str, files=("gin_configs/switch_tiny.gin",), **options) -> Experiment:
    return configuration.build(Experiment, list(files), list(bindings), **options)


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_configuration_builds(entry):
    experiment = build(files=[f"gin_configs/{entry}"])
    assert experiment.model_dir == f"runs/{entry.removesuffix('.gin')}"
    assert (experiment.model.moe is not None) == entry.startswith("switch")


# Sizes as published or, for what nobody published, counted by hand; see docs/models.md.
MODELS = {
    "deepseek_moe_base": 1_857_699_072,
    "expert_choice_base": 3_815_423_232,
    "gshard_600b": 619_301_008_384,
    "olmoe_base": 1_041_480_960,
    "openmoe_base": 700_641_024,
    "st_moe_32b": 269_104_613_376,
    "st_moe_base": 700_641_024,
    "st_moe_large": 4_091_291_648,
    "switch_base": 619_339_008,
    "switch_c": 1_571_375_798_688,
    "switch_large": 26_309_291_008,
    "switch_recall": 419_840,
    "switch_tiny": 6_560_768,
    "switch_xxl": 394_675_073_024,
    "t5_1_1_base": 247_577_856,
    "t5_1_1_large": 783_150_080,
    "t5_1_1_small": 76_961_152,
    "t5_1_1_xl": 2_849_757_184,
    "t5_1_1_xxl": 11_135_332_352,
    "t5_base": 222_903_552,
    "t5_c": 1_667_357_088,
    "t5_large": 737_668_096,
    "t5_recall": 189_440,
    "t5_tiny": 2_886_656,
}
TWINS = {
    "switch_recall": "t5_recall",
    "switch_tiny": "t5_tiny",
    "switch_base": "t5_base",
    "switch_large": "t5_large",
    "switch_xxl": "t5_1_1_xxl",
    "switch_c": "t5_c",
}


def model(name: str) -> ModelConfig:
    """A model file with the run that any of them takes."""
    return build(files=[f"gin_configs/models/{name}.gin", "gin_configs/runs/base.gin"]).model


def test_every_model_file_is_known():
    found = {path.stem for path in (ROOT / "gin_configs/models").glob("*.gin")}
    assert found - {"switch_layers"} == set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_sizes_of_the_models(name):
    assert model(name).num_params == MODELS[name]
    text = (ROOT / f"gin_configs/models/{name}.gin").read_text()
    assert f"{MODELS[name]:,} parameters" in " ".join(text.replace("#", "").split())


def test_the_table_of_models():
    lines = (ROOT / "docs/models.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")] for line in lines if "|" in line]
    found = {row[1].strip("`"): row[2:5] + row[6:7] for row in rows if row[1].startswith("`")}
    expected = {
        name: [
            f"{config.num_params:,}",
            f"{config.num_active_params:,}",
            f"{config.flops_per_sequence(512, 114) / 1e9:,.2f}",
            f"`{TWINS[name]}`" if name in TWINS else "",
        ]
        for name, config in {name: model(name) for name in MODELS}.items()
    }
    assert found == expected


ROUTER_FILES = sorted(path.stem for path in (ROOT / "gin_configs/routers").glob("*.gin"))


@pytest.mark.parametrize("name", ROUTER_FILES)
def test_router_files_go_on_any_sparse_model(name):
    for entry in ("switch_tiny", "switch_large"):
        files = [f"gin_configs/{entry}.gin", f"gin_configs/routers/{name}.gin"]
        model = build(files=files).model
        assert model.stack_moe["decoder"].causal
        # Where the encoder's may not decode, the decoder is the Switch Transformer's.
        if model.decoder_moe is not None:
            plain = build(files=files[:1]).model.moe
            expected = dataclasses.replace(plain, group_size=model.decoder_moe.group_size)
            assert model.decoder_moe == expected


def test_every_router_has_a_file_and_a_line():
    used = {
        build(
            files=["gin_configs/switch_tiny.gin", f"gin_configs/routers/{name}.gin"]
        ).model.moe.router
        for name in ROUTER_FILES
    }
    assert used == set(ROUTERS)
    lines = (ROOT / "docs/routing.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")] for line in lines if line.startswith("| `")]
    causal = {row[1].strip("`"): row[5] for row in rows}
    assert causal == {name: "yes" if s.causal else "no" for name, s in ROUTERS.items()}


def test_published_sizes_of_switch_base():
    for num_experts, expected in {
        16: 1_072_397_568,
        32: 1_978_514_688,
        64: 3_790_748_928,
        128: 7_415_217_408,
        256: 14_664_154_368,
    }.items():
        experiment = build(f"NUM_EXPERTS={num_experts}", files=["gin_configs/switch_base.gin"])
        assert experiment.model.num_params == expected
        assert f"{num_experts} -> {expected:,}" in (
            (ROOT / "gin_configs/models/switch_base.gin").read_text()
        )


@pytest.mark.parametrize("name", TWINS)
def test_dense_twins_differ_only_in_the_sparse_layers(name):
    sparse, dense = model(name), model(TWINS[name])
    assert dense == dataclasses.replace(sparse, moe=None, sparse_every=dense.sparse_every)
    # Equal FLOPs, but for a router of [d_model, experts] at every token of every sparse layer.
    tokens = sum(sparse.encoder_sparse) * 512 + sum(sparse.decoder_sparse) * 114
    routers = 2 * sparse.d_model * sparse.moe.num_experts * tokens
    assert sparse.flops_per_sequence(512, 114) == dense.flops_per_sequence(512, 114) + routers


@pytest.mark.parametrize("end", ["recall", "tiny", "base", "base_c4"])
def test_dense_twins_train_alike(end):
    sparse = build(files=[f"gin_configs/switch_{end}.gin"])
    dense = build(files=[f"gin_configs/t5_{end}.gin"])
    assert sparse.data == dense.data and sparse.optimizer == dense.optimizer
    assert sparse.train_steps == dense.train_steps


@dataclasses.dataclass(frozen=True)
class Device:
    """What a mesh asks of a device."""

    id: int
    platform: str = "gpu"


@pytest.mark.parametrize(
    ("entry", "devices", "bindings"),
    [
        ("switch_recall", 4, []),
        ("switch_base", 8, ["BATCH_SIZE=128"]),
        ("switch_large", 8, []),
        ("switch_base_c4", 32, []),
        ("switch_base_c4", 64, ["MoeConfig.group_size=4096"]),
        ("switch_base_c4", 128, ["MoeConfig.group_size=2048"]),
        ("switch_xxl", 512, []),
        ("switch_c", 512, []),
    ],
)
def test_configurations_fit_the_devices_they_name(entry, devices, bindings):
    experiment = build(*bindings, files=[f"gin_configs/{entry}.gin"])
    mesh = sharding.make_mesh(experiment.mesh, [Device(number) for number in range(devices)])
    check_fits(experiment, mesh)


@dataclasses.dataclass(frozen=True)
class Other:
    """What no gin file configures."""


def test_files_that_configure_something_else_are_named_as_that():
    with pytest.raises(UserError, match="no Other is configured"):
        configuration.build(Other, ["gin_configs/switch_tiny.gin"])


def test_the_recipe_of_the_switch_paper():
    # arXiv:2101.03961, sections 2 and 3 and appendix; 2^20 tokens are 2048 rows of 512.
    experiment = build(files=["gin_configs/switch_base_c4.gin"])
    model, data, optimizer = experiment.model, experiment.data, experiment.optimizer
    assert model.num_params == 7_415_217_408
    assert (model.moe.num_experts, model.moe.top_k, model.moe.jitter_noise) == (128, 1, 0.01)
    assert (model.moe.load_balance_weight, model.moe.router_z_weight) == (0.01, 0.0)
    assert (model.moe.capacity_factor, model.moe.eval_capacity_factor) == (1.25, 2.0)
    assert model.moe.group_size == 8192
    assert (model.dtype, model.dropout_rate, model.init_scale) == ("bfloat16", 0.0, 0.1)
    assert data.batch_size * experiment.lengths[0] == 2**20
    assert experiment.lengths == (512, 114)
    assert (data.noise_density, data.mean_span_length, data.pack) == (0.15, 3.0, True)
    (task,) = data.tasks
    assert task.name == data.mixture_or_task_name
    assert (task.tfds_name, task.objective) == ("c4/en:3.1.0", "span_corruption")
    assert (optimizer.name, optimizer.schedule, optimizer.warmup_steps) == (
        "adafactor",
        "rsqrt",
        10_000,
    )
    assert (optimizer.learning_rate, experiment.train_steps) == (1.0, 550_000)


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


def test_from_another_folder_with_the_repository_on_pythons_path(tmp_path):
    code = (
        "from switchx.configuration import build\n"
        "from switchx.experiment import Experiment\n"
        "print(build(Experiment, ['gin_configs/switch_tiny.gin']).model.d_model)\n"
    )
    for path in (str(ROOT), ""):
        completed = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (completed.stdout, completed.stderr) == ("128\n", ""), completed


def test_search_paths_are_those_of_one_call(tmp_path):
    (tmp_path / "own.gin").write_text("TRAIN_STEPS = 7\n")
    files = ["gin_configs/switch_tiny.gin", "own.gin"]
    assert build(files=files, search_paths=[str(tmp_path)]).train_steps == 7
    with pytest.raises(UserError, match="--gin_file=own.gin: no such file"):
        build(files=files)
