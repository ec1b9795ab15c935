"""Nothing that is loaded is executed: held over the source, and tried on a run directory."""

import ast
import contextlib
import dataclasses
import pathlib

import jax
import pytest

from switchx import configuration, sharding
from switchx.errors import UserError
from switchx.experiment import Experiment
from switchx.interop import hf
from switchx.models.config import ModelConfig
from switchx.models.t5 import T5
from switchx.run_directory import JsonLines, RunDirectory
from switchx.training.checkpoint import Checkpointer, restore_from
from switchx.training.optimizer import OptimizerConfig, make_optimizer
from switchx.training.state import create_state
from tests.training.conftest import small_config

ROOT = pathlib.Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "switchx").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")])

# Modules whose readers execute what they read, and functions that do, by their last names.
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "runpy"}
MODULES |= {"torch", "code", "imp", "importlib.util", "importlib.machinery"}
CALLS = {"eval", "exec", "compile", "__import__", "unsafe_load", "full_load", "load_pickle"}
# Methods of the same names that are no builtins: a lowered JAX program's, a pattern's.
METHODS = {"compile"}


def dangers(source: str) -> list[str]:
    """What in a source text could execute the data it reads."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            if names == ["torch"]:
                continue  # what it loads is looked at below
            if names == ["importlib.util"] and "spec_from" not in source:
                continue  # whether a package is there
            if isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(f"{node.module}.{name}" for name in names)]
            found += [name for name in names if name in MODULES or name.split(".")[0] in MODULES]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        last = called.split(".")[-1]
        if last in CALLS and not ("." in called and last in METHODS):
            found.append(called)
        if called.endswith("yaml.load"):
            found.append(called)
        if called == "torch.load" and "weights_only=True" not in map(ast.unparse, node.keywords):
            found.append(called)
        for keyword in node.keywords:
            if keyword.arg == "allow_pickle" and ast.unparse(keyword.value) == "True":
                found.append(f"{called}(allow_pickle)")
            if keyword.arg == "shell":
                found.append(f"{called}(shell)")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_executes_what_it_reads(path):
    assert dangers(path.read_text(encoding="utf-8")) == []


def test_the_search_finds_what_it_is_for():
    for text in (
        "import pickle",
        "from torch import load",
        "from importlib.util import spec_from_file_location",
        "eval(text)",
        "exec(text)",
        "builtins.eval(text)",
        "compile(text, '', 'exec')",
        "yaml.load(text)",
        "yaml.unsafe_load(text)",
        "np.load(path, allow_pickle=True)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "subprocess.run(text, shell=True)",
    ):
        assert dangers(text), text
    for text in (
        "ast.literal_eval(text)",
        "yaml.safe_load(text)",
        "re.compile(text)",
        "import torch",
    ):
        assert not dangers(text), text


def test_a_run_directory_is_read_without_running_its_gin_file(tmp_path):
    config = small_config()
    mesh = sharding.make_mesh({"data": 1}, jax.devices()[:1])
    create, abstract, *_ = create_state(
        T5(config), lambda axes: make_optimizer(OptimizerConfig(), axes), seed=1, mesh=mesh
    )
    run, trap = tmp_path / "run", tmp_path / "executed"
    checkpointer = Checkpointer(run / "checkpoints")
    checkpointer.save(create(), {"batch": 0})
    checkpointer.close()
    (run / "model.json").write_text(config.to_json())
    (run / "config.json").write_text("{}")
    (run / "metrics.jsonl").write_text('{"step": 0}\n')
    (run / "config.gin").write_text(
        "from __gin__ import dynamic_registration\n"
        "import shutil\n"
        "from switchx import experiment\n"
        "experiment.Experiment.model_dir = @shutil.copyfile()\n"
        f"shutil.copyfile.src = {str(run / 'metrics.jsonl')!r}\n"
        f"shutil.copyfile.dst = {str(trap)!r}\n"
    )
    # It is a trap: a configuration asked for by the user runs, and calls what it likes.
    with contextlib.suppress(UserError):
        configuration.build(Experiment, [str(run / "config.gin")])
    trap.unlink()
    (run / "sitecustomize.py").write_text(f"open({str(trap)!r}, 'w')")

    assert ModelConfig.from_json((run / "model.json").read_text()) == config
    directory = RunDirectory(str(run))
    directory.check_free(dataclasses.make_dataclass("Empty", [])(), may_change=())
    assert directory.read_json("config.json") == {}
    directory.close()
    JsonLines(run / "metrics.jsonl", last_step=0).close()
    Checkpointer(run / "checkpoints").restore(abstract)
    restore_from(str(run), abstract, optimizer=True)
    with pytest.raises(UserError, match="supported"):
        hf.load(run)
    assert not trap.exists()


def test_gin_is_named_only_where_a_configuration_is_asked_for():
    readers = [path for path in SOURCES if "config.gin" in path.read_text(encoding="utf-8")]
    # One describes the run directory, one writes the file, one hands its text over, one says so.
    names = {path.relative_to(ROOT).as_posix() for path in readers}
    assert names == {"switchx/run_directory.py", "switchx/run.py", "switchx/configuration.py"}
    for path in readers:
        text = path.read_text(encoding="utf-8")
        assert 'read_text("config.gin' not in text and '"config.gin").read' not in text
