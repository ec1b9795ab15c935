"""Every routing scheme trains, evaluates, samples and saves from its gin file alone."""

import json
import math
import pathlib

import pytest

from switchx import configuration, run
from switchx.experiment import Experiment
from tests.e2e.faults import write_text

ROOT = pathlib.Path(__file__).parents[2]
ROUTER_FILES = sorted(path.stem for path in (ROOT / "gin_configs/routers").glob("*.gin"))


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    write_text(path)
    return str(path)


@pytest.mark.parametrize("name", ROUTER_FILES)
def test_trains_from_gin_alone(name, text, tmp_path):
    files = ["gin_configs/switch_tiny.gin", "gin_configs/data/text_file.gin"]
    smaller = {
        "TEXT_FILES": text,
        "MODEL_DIR": str(tmp_path / "run"),
        "TOKEN_CACHE_DIR": str(pathlib.Path(text).parent / "tokens"),
        "TRAIN_STEPS": 3,
        "EVAL_PERIOD": 3,
        "EVAL_STEPS": 1,
        "CHECKPOINT_PERIOD": 3,
        "BATCH_SIZE": 8,
        "TASK_FEATURE_LENGTHS": {"inputs": 40, "targets": 16},
        "DataConfig.vocabulary": "bytes",
        "ModelConfig.vocab_size": 384,
        "ModelConfig.d_model": 16,
        "ModelConfig.d_ff": 24,
        "ModelConfig.num_heads": 2,
        "ModelConfig.head_dim": 8,
        "ModelConfig.num_encoder_layers": 1,
        "ModelConfig.num_decoder_layers": 1,
        "ModelConfig.sparse_every": 1,
        "NUM_EXPERTS": 4,
        "MESH": {"data": 8},
        "MoeConfig.group_size": "row",
        "Experiment.num_samples": 1,
        "Experiment.sample_length": 2,
        "Experiment.log_period": 1,
    }
    bindings = [f"{name}={value}" for name, value in smaller.items()]
    files.append(f"gin_configs/routers/{name}.gin")
    experiment = configuration.build(Experiment, files, bindings)
    run.train(experiment, "")
    directory = pathlib.Path(experiment.model_dir)
    assert (directory / "DONE").exists()
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    train = [row for row in rows if row["split"] == "train"]
    assert [row["step"] for row in train] == [1, 2, 3]
    assert len([row for row in rows if row["split"].startswith("eval/")]) == 1
    for row in rows:
        assert all(math.isfinite(row[key]) for key in ("loss", "dropped_fraction", "router_z_loss"))
        for load in row["expert_load"].values():
            assert math.isclose(sum(load), 1, abs_tol=1e-4)
    assert train[-1]["grad_norm"] > 0
