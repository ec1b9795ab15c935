"""The three regimes at toy size, by command line, as a user would; one of them killed."""

import json
import pathlib
import subprocess
import time

import pytest

from tests.e2e.commands import finish, rows, start
from tests.e2e.faults import SMALL

FLAGS = (
    "--gin.TASK_FEATURE_LENGTHS={'inputs': 64, 'targets': 40}",
    "--gin.BATCH_SIZE=8",
    "--gin.TRAIN_STEPS=6",
    "--gin.EVAL_PERIOD=2",
    "--gin.EVAL_STEPS=1",
    "--gin.Experiment.log_period=1",
    "--gin.NUM_DECODED_EXAMPLES=2",
    "--gin.Experiment.num_samples=1",
    "--gin.Experiment.sample_length=2",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("base")
    (folder / "text.txt").write_text("\n\n".join(f"Paragraph {n} of a text." for n in range(400)))
    flags = (*SMALL, f"--gin.TEXT_FILES={folder / 'text.txt'}", f"--gin.MODEL_DIR={folder / 'run'}")
    finish(start("train", *flags, "--gin.TRAIN_STEPS=2", "--gin.Experiment.num_samples=0"))
    return folder / "run"


def regime(name: str, base: pathlib.Path, directory: pathlib.Path) -> subprocess.Popen:
    return start(
        "finetune",
        f"--gin_file=gin_configs/runs/finetune_{name}.gin",
        f"--gin.INITIAL_CHECKPOINT_PATH={base}",
        f"--gin.MODEL_DIR={directory}",
        *FLAGS,
        *(["--gin.INSTRUCTION_STEPS=4"] if name == "combined" else []),
    )


@pytest.mark.parametrize(("name", "task"), [("single", "wn_supersense"), ("instruction", None)])
def test_a_regime_of_one_stage(base, tmp_path, name, task):
    output = finish(regime(name, base, tmp_path))
    task = task or "embedded_instructions"
    evaluated = [row["step"] for row in rows(tmp_path / name) if row["split"] == f"eval/{task}"]
    assert evaluated == [0, 2, 4, 6]
    assert output.strip().splitlines()[-1].startswith(f"{name}")
    # The model, the vocabulary and the optimizer's state are the checkpoint's.
    config = json.loads((tmp_path / name / "config.json").read_text())
    assert config["data"]["vocabulary"] == "bytes" and config["model"]["d_model"] == 16
    assert config["model"]["moe"]["expert_dropout_rate"] == 0.4
    assert "starting from the parameters and optimizer of" in output


def test_a_regime_that_is_killed_goes_on_where_it_was(base, tmp_path):
    finish(regime("combined", base, tmp_path / "whole"))
    process = regime("combined", base, tmp_path / "killed")
    for _ in range(30_000):
        # A step of the second stage behind its first checkpoint.
        if any(row["step"] == 3 for row in rows(tmp_path / "killed/single")):
            break
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert (tmp_path / "killed/instruction/DONE").exists()
    assert not (tmp_path / "killed/single/DONE").exists()
    output = finish(regime("combined", base, tmp_path / "killed"))
    assert "instruction is complete at step 4" in output
    for stage in ("instruction", "single"):
        assert rows(tmp_path / "killed" / stage) == rows(tmp_path / "whole" / stage)
    start_of = [
        json.loads((tmp_path / name / "single/config.json").read_text())["initial_checkpoint_path"]
        for name in ("whole", "killed")
    ]
    assert [pathlib.Path(path).parts[-3:-1] for path in start_of] == [
        ("instruction", "checkpoints")
    ] * 2
    assert pathlib.Path(start_of[0]).name == pathlib.Path(start_of[1]).name
