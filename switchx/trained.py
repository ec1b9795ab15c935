"""A trained model: the checkpoints of a run directory, found and loaded."""

import argparse
import contextlib
import pathlib
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

from jax.sharding import Mesh
from tqdm import tqdm

from switchx import distributed, sharding
from switchx.errors import UserError
from switchx.experiment import (
    Experiment,
    check_fits,
    plan_state,
    read_experiment,
    use_compilation_cache,
)
from switchx.training.checkpoint import find_checkpoint, restore_from
from switchx.training.selection import best_checkpoint


class Trained(NamedTuple):
    """A model with its parameters on their devices.

    Attributes:
      params: parameter tree.
      checkpoint: folder they came from, .../checkpoints/<step>.
      mesh: devices.
    """

    params: Any
    checkpoint: pathlib.Path
    mesh: Mesh

    @property
    def step(self) -> int | None:
        """Updates the parameters have seen; None if the folder's name does not tell."""
        name = self.checkpoint.name
        return int(name) if name.isdigit() else None


def flag_parser(
    description: str, fields: str, checkpoints: str = "last (default), best or a step"
) -> argparse.ArgumentParser:
    """A parser of what scripts on a run directory take; more may be added to it.

    Args:
      description: of the script.
      fields: those of the run's configuration that one may want to change.
      checkpoints: what --checkpoint may be.
    """
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"--gin.NAME=VALUE changes a field of the run's configuration: {fields}, …",
        allow_abbrev=False,
    )
    parser.add_argument("run_directory", metavar="RUN_DIR", help="what MODEL_DIR was in training")
    parser.add_argument("--checkpoint", default="last", help=checkpoints)
    distributed.add_flags(parser)
    return parser


def find_checkpoints(run_directory: str, which: str = "last") -> list[pathlib.Path]:
    """The checkpoints of a run that are meant, oldest first.

    Args:
      run_directory: a run's.
      which: 'last', 'best' (by the run's `best_metric`, of those saved at an evaluation), 'all', or
        a step.

    Raises:
      UserError: there is none of them; names those there are.
    """
    folder = pathlib.Path(run_directory).absolute() / "checkpoints"
    last = find_checkpoint(folder)
    steps = sorted(int(path.name) for path in last.parent.iterdir() if path.name.isdecimal())
    if which == "all":
        return [last.parent / str(step) for step in steps]
    if which == "last":
        return [last]
    if which == "best":
        return [best_checkpoint(last.parent, read_experiment(run_directory).criterion)]
    if which.isdecimal() and int(which) in steps:
        return [last.parent / str(int(which))]
    choices = ", ".join(map(str, steps))
    raise UserError(f"{folder} has no checkpoint {which!r}; there are: last, best, all, {choices}")


def load(experiment: Experiment, checkpoint: pathlib.Path | None = None) -> Trained:
    """Read the parameters of a checkpoint.

    Args:
      experiment: has the model and the mesh.
      checkpoint: None for the one that `initial_checkpoint_path` names if it is set, and else the
        newest in `model_dir`.

    Raises:
      UserError: no checkpoint there, a damaged one, or one of another model.
    """
    mesh = sharding.make_mesh(experiment.mesh, distributed.devices())
    check_fits(experiment, mesh)
    use_compilation_cache(experiment)
    path = checkpoint or experiment.initial_checkpoint_path or experiment.model_dir
    checkpoint = find_checkpoint(pathlib.Path(path))
    with notes(), sharding.use(mesh, experiment.rules):
        abstract = plan_state(experiment, mesh).abstract
        params = restore_from(str(checkpoint), abstract, optimizer=False).params
    return Trained(params, checkpoint, mesh)


def notes() -> contextlib.redirect_stdout:
    """A context in which what is said goes to standard error: standard output is for results."""
    return contextlib.redirect_stdout(sys.stderr if distributed.is_first() else sys.stdout)


def progress(items: Iterable[Any], what: str, unit: str) -> Iterable[Any]:
    """The items; on a terminal the first process shows their rate and the time left."""
    quiet = None if distributed.is_first() else True
    return tqdm(items, desc=what, disable=quiet, leave=False, unit=f" {unit}")
