"""Every mistake a user makes at the command line: one line, exit code 2, no traceback.

The cases run in one process without pytest's type-checking hooks, through the same entry point
as `scripts/train.py`.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import textwrap

import pytest

from switchx import configuration
from switchx.experiment import Experiment

ROOT = pathlib.Path(__file__).parents[1]
TINY = "--gin_file=gin_configs/switch_tiny.gin"

DRIVER = """
import contextlib, io, json, sys
from switchx import configuration
from switchx.experiment import Experiment
from switchx.run import train

results = []
for arguments in json.load(sys.stdin):
    sys.argv = ["train.py", *arguments]
    error, code = io.StringIO(), 0
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
        try:
            configuration.main(Experiment, train, "")
        except SystemExit as exit:
            code = exit.code
        except BaseException as escaped:
            code = repr(escaped)
    results.append([code, error.getvalue()])
print(json.dumps(results))
"""

# Arguments, and what the message must contain.
FILES = {
    "empty.txt": "",
    "broken.jsonl": '{"inputs": "a", "targets": "b"}\n{"inputs": \n',
    "columns.jsonl": '{"question": "a", "targets": "b"}\n' * 50,
    "twice.gin": "include 'gin_configs/switch_tiny.gin'\nTRAIN_STEPS = 5\nTRAIN_STEPS = 6\n",
    "syntax.gin": "include 'gin_configs/switch_tiny.gin'\nTRAIN_STEPS = = 5\n",
    "include.gin": "include 'gin_configs/switch_tyny.gin'\n",
    "nested_twice.gin": "include '{tmp}/twice.gin'\n",
    "circle.gin": "include '{tmp}/circle.gin'\n",
    "unused.gin": textwrap.dedent(
        """
        from __gin__ import dynamic_registration
        from switchx.data import tasks
        include 'gin_configs/switch_tiny.gin'
        tasks.FileTask.name = 'mine'
        """
    ),
    "required.gin": "include 'gin_configs/switch_tiny.gin'\n"
    "include 'gin_configs/data/text_file.gin'\n",
    "field.gin": textwrap.dedent(
        """
        from __gin__ import dynamic_registration
        from switchx.models import config
        include 'gin_configs/switch_tiny.gin'
        config.ModelConfig.d_modle = 32
        """
    ),
    "class.gin": textwrap.dedent(
        """
        from __gin__ import dynamic_registration
        from switchx.models import config
        include 'gin_configs/switch_tiny.gin'
        config.ModelConfg.d_model = 32
        """
    ),
    "text.gin": "include 'gin_configs/switch_tiny.gin'\ninclude 'gin_configs/data/text_file.gin'\n",
    "supervised.gin": textwrap.dedent(
        """
        from __gin__ import dynamic_registration
        from switchx.data import tasks
        include 'gin_configs/switch_tiny.gin'
        include 'gin_configs/data/text_file.gin'
        tasks.FileTask.objective = 'supervised'
        """
    ),
}
CASES = {
    "no configuration": ([], ["--gin_file"]),
    "missing file": (
        ["--gin_file=gin_configs/switch_tin.gin"],
        ["switch_tin.gin", "switch_tiny.gin"],
    ),
    "unknown flag": ([TINY, "--gin_fil=x"], ["--gin_fil"]),
    "binding without value": ([TINY, "--gin.TRAIN_STEPS"], ["--gin.TRAIN_STEPS=VALUE"]),
    "binding without name": ([TINY, "--gin.=3"], ["--gin.=3", "--gin.NAME=VALUE"]),
    "misspelt macro": ([TINY, "--gin.TRAIN_STEP=5"], ["TRAIN_STEP ", "TRAIN_STEPS"]),
    "macro of another configuration": (
        ["--gin_file=gin_configs/t5_tiny.gin", "--gin.NUM_EXPERTS=4"],
        ["NUM_EXPERTS"],
    ),
    "macro bound twice": (["--gin_file={tmp}/twice.gin"], ["twice.gin:3", "TRAIN_STEPS", "line 2"]),
    "gin syntax": (["--gin_file={tmp}/syntax.gin"], ["syntax.gin"]),
    "missing include": (
        ["--gin_file={tmp}/include.gin"],
        ["include.gin:1", "'gin_configs/switch_tyny.gin'", "no such file", "switch_tiny.gin'"],
    ),
    "macro bound twice in an include": (
        ["--gin_file={tmp}/nested_twice.gin"],
        ["twice.gin:3", "TRAIN_STEPS", "line 2"],
    ),
    "configuration that is no text": (["--gin_file=/bin/ls"], ["/bin/ls", "not a text file"]),
    "bool in the mesh": ([TINY, "--gin.MESH={'data': True}"], ["MESH", "positive integers"]),
    "include of itself": (["--gin_file={tmp}/circle.gin"], ["circle.gin:1", "itself"]),
    "no sparse layer": ([TINY, "--gin.ModelConfig.sparse_every=5"], ["sparse_every", "t5"]),
    "binding nothing uses": (["--gin_file={tmp}/unused.gin"], ["FileTask", "never used"]),
    "macro without value": (["--gin_file={tmp}/required.gin"], ["TEXT_FILES"]),
    "misspelt field": (["--gin_file={tmp}/field.gin"], ["d_modle", "d_model"]),
    "misspelt field on the command line": (
        [TINY, "--gin.ModelConfig.d_modle=3"],
        ["d_modle", "d_model"],
    ),
    "misspelt class": (
        ["--gin_file={tmp}/class.gin"],
        ["class.gin:5", "ModelConfg", "ModelConfig"],
    ),
    "misspelt class on the command line": (
        [TINY, "--gin.ModelConfg.d_model=3"],
        ["ModelConfg", "ModelConfig"],
    ),
    "string for a number": ([TINY, "--gin.TRAIN_STEPS=many"], ["train_steps", "'many'", "int"]),
    "float for an int": ([TINY, "--gin.BATCH_SIZE=2.5"], ["batch_size", "2.5"]),
    "bool for a number": ([TINY, "--gin.CAPACITY_FACTOR=True"], ["capacity_factor", "True"]),
    "unfinished literal": ([TINY, "--gin.MESH={'data': 1"], ["MESH"]),
    "zero steps": ([TINY, "--gin.TRAIN_STEPS=0"], ["train_steps", "at least 1"]),
    "zero eval period": ([TINY, "--gin.EVAL_PERIOD=0"], ["eval_period"]),
    "negative batch": ([TINY, "--gin.BATCH_SIZE=-1"], ["batch_size", "-1"]),
    "dropout of 1": ([TINY, "--gin.DROPOUT_RATE=1.0"], ["dropout_rate", "[0, 1)"]),
    "negative capacity": ([TINY, "--gin.CAPACITY_FACTOR=-1"], ["capacity_factor", "positive"]),
    "no experts": ([TINY, "--gin.NUM_EXPERTS=0"], ["num_experts", "at least 1"]),
    "unknown router": ([TINY, "--gin.MoeConfig.router=swich"], ["router", "switch"]),
    "unknown dispatch": ([TINY, "--gin.MoeConfig.dispatch=gathr"], ["dispatch", "gather"]),
    "unknown activation": (
        [TINY, "--gin.ModelConfig.activations=('rellu',)"],
        ["activations", "relu"],
    ),
    "unknown dtype": ([TINY, "--gin.ModelConfig.dtype=bfloat"], ["dtype", "bfloat16"]),
    "unknown layout": ([TINY, "--gin.ModelConfig.sparse_layout=mix"], ["sparse_layout", "mixed"]),
    "unknown remat policy": ([TINY, "--gin.ModelConfig.remat=all"], ["remat", "full"]),
    "sparse layer beyond the stack": (
        [TINY, "--gin.ModelConfig.encoder_sparse_layers=(1, 9)"],
        ["encoder_sparse_layers", "below 4"],
    ),
    "unknown optimizer": ([TINY, "--gin.OptimizerConfig.name=adafacto"], ["adafactor"]),
    "unknown schedule": ([TINY, "--gin.OptimizerConfig.schedule=rsqr"], ["schedule", "rsqrt"]),
    "unknown NaN policy": ([TINY, "--gin.Experiment.on_nonfinite=ignore"], ["on_nonfinite"]),
    "label smoothing of 1": ([TINY, "--gin.LossConfig.label_smoothing=1"], ["label_smoothing"]),
    "unknown length key": (
        [TINY, "--gin.TASK_FEATURE_LENGTHS={'input': 64, 'targets': 9}"],
        ["'input'", "inputs"],
    ),
    "unknown vocabulary": ([TINY, "--gin.DataConfig.vocabulary=spm8"], ["spm8", "spm8k"]),
    "vocabulary larger than the model": (
        [TINY, "--gin.DataConfig.vocabulary=spm32k"],
        ["vocab_size", "8192", "32100"],
    ),
    "batch not divisible by microbatches": (
        [TINY, "--gin.NUM_MICROBATCHES=5"],
        ["BATCH_SIZE = 16", "NUM_MICROBATCHES = 5", "15 and 20"],
    ),
    "groups larger than a microbatch": (
        [TINY, "--gin.NUM_MICROBATCHES=2", "--gin.MoeConfig.group_size=4096"],
        ["group_size = 4096", "2 microbatch(es)", "what fits: row, 128"],
    ),
    "unknown mesh axis": ([TINY, "--gin.MESH={'dat': 1}"], ["MESH", "'dat'", "data"]),
    "mesh of too many devices": ([TINY, "--gin.MESH={'data': 3}"], ["MESH", "3", "1 cpu"]),
    "two rests in a mesh": ([TINY, "--gin.MESH={'data': -1, 'expert': -1}"], ["MESH", "-1"]),
    "unknown task": (
        [TINY, "--gin.MIXTURE_OR_TASK_NAME=embedded_span_coruption"],
        ["embedded_span_corruption"],
    ),
    "missing data file": (
        ["--gin_file={tmp}/text.gin", "--gin.TEXT_FILES={tmp}/nothing.txt"],
        ["nothing.txt"],
    ),
    "empty data file": (
        ["--gin_file={tmp}/text.gin", "--gin.TEXT_FILES={tmp}/empty.txt"],
        ["empty.txt"],
    ),
    "broken JSON line": (
        ["--gin_file={tmp}/supervised.gin", "--gin.TEXT_FILES={tmp}/broken.jsonl"],
        ["broken.jsonl", "2"],
    ),
    "missing column": (
        ["--gin_file={tmp}/supervised.gin", "--gin.TEXT_FILES={tmp}/columns.jsonl"],
        ["columns.jsonl", "inputs", "question"],
    ),
    "directory of another configuration": (
        [TINY, "--gin.MODEL_DIR={tmp}/other", "--gin.CAPACITY_FACTOR=2.0"],
        ["MODEL_DIR", "model.moe.capacity_factor", "1.25", "2.0"],
    ),
    "directory that is a file": (
        [TINY, "--gin.MODEL_DIR={tmp}/empty.txt"],
        ["MODEL_DIR", "empty.txt"],
    ),
    "initial checkpoint that is none": (
        [TINY, "--gin.INITIAL_CHECKPOINT_PATH={tmp}"],
        ["INITIAL_CHECKPOINT_PATH", "no checkpoint"],
    ),
    "initial optimizer without checkpoint": (
        [TINY, "--gin.Experiment.initial_optimizer=True"],
        ["initial_optimizer", "INITIAL_CHECKPOINT_PATH"],
    ),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, tuple[int | str, str]]:
    folder = tmp_path_factory.mktemp("mistakes")
    for name, text in FILES.items():
        (folder / name).write_text(text.replace("{tmp}", str(folder)))
    (folder / "other").mkdir()
    experiment = configuration.build(Experiment, ["gin_configs/switch_tiny.gin"])
    config = json.dumps(dataclasses.asdict(experiment))
    (folder / "other" / "config.json").write_text(config)

    def arguments(name: str) -> list[str]:
        given = [argument.replace("{tmp}", str(folder)) for argument in CASES[name][0]]
        if not any(argument.startswith("--gin.MODEL_DIR") for argument in given):
            given.append(f"--gin.MODEL_DIR={folder}/runs/{name.replace(' ', '_')}")
        return given if name != "no configuration" else []

    completed = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps([arguments(name) for name in CASES]),
        cwd=ROOT,
        env={key: value for key, value in os.environ.items() if key != "XLA_FLAGS"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    results = json.loads(completed.stdout.splitlines()[-1])
    return dict(zip(CASES, map(tuple, results), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_mistake_gives_one_line_and_exit_code_2(outcomes, name):
    code, message = outcomes[name]
    assert code == 2, (code, message)
    assert "Traceback" not in message
    for part in CASES[name][1]:
        assert part in message, message
    lines = [line for line in message.splitlines() if "error:" in line]
    assert len(lines) == 1, message
    assert len(lines[0]) < 600
