"""Checkpoints: saved in the background, committed by rename, restored to any sharding."""

import dataclasses
import pathlib
import re
import shutil
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from switchx.errors import UserError
from switchx.training.state import TrainState, num_bytes

BEST_METRIC = "cross_entropy"


class Checkpointer:
    """Checkpoints of one run under `directory`/<step>/.

    A checkpoint holds the items `params`, `optimizer` (optax state, step and rng) and `data` (the
    position of the data). It appears under its final name only when it is complete; what a
    killed run left half-written is removed here and never restored.

    Args:
      directory: created if missing.
      keep: how many of the latest to keep.
      keep_best: how many of those with the lowest evaluated cross-entropy to keep besides.
    """

    def __init__(self, directory: pathlib.Path, *, keep: int = 3, keep_best: int = 1):
        self._directory = directory.absolute()
        best = policies.BestN(
            get_metric_fn=lambda metrics: -metrics[BEST_METRIC],
            n=keep_best,
            keep_checkpoints_without_metrics=False,
        )
        try:
            self._manager = ocp.CheckpointManager(
                self._directory,
                options=ocp.CheckpointManagerOptions(
                    create=True,
                    cleanup_tmp_directories=True,
                    preservation_policy=policies.AnyPreservationPolicy(
                        [policies.LatestN(keep), best]
                    ),
                ),
            )
        except OSError as error:
            raise UserError(f"cannot write checkpoints to {self._directory}: {error}") from None

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(
        self,
        state: TrainState,
        position: dict[str, int],
        metrics: dict[str, float] | None = None,
    ) -> None:
        """Begin to save; returns as soon as the state may be changed.

        Args:
          state: saved under its own step.
          position: of the data, JSON values.
          metrics: with `BEST_METRIC`, if this step was evaluated.

        Raises:
          UserError: this or an earlier save failed (disk full, directory gone).
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        self._check_space(num_bytes(state))
        try:
            self._manager.check_for_errors()
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(state.params),
                    optimizer=ocp.args.StandardSave(_without_params(state)),
                    data=ocp.args.JsonSave(position),
                ),
                metrics=metrics,
                force=True,
            )
        except Exception as error:
            raise self._failure(error) from error

    def wait(self) -> None:
        """Wait until everything begun is on disk.

        Raises:
          UserError: a save failed.
        """
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:
            raise self._failure(error) from error

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, int]]:
        """The newest complete checkpoint: state, as `abstract` is sharded, and data position."""
        step = self._manager.latest_step()
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardRestore(abstract.params),
                    optimizer=ocp.args.StandardRestore(_without_params(abstract)),
                    data=ocp.args.JsonRestore(),
                ),
            )
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"checkpoint {self._directory / str(step)} cannot be read ({reason}); "
                "remove that folder to go on from the one before it"
            ) from error
        state = TrainState(params=restored["params"], **restored["optimizer"])
        return state, restored["data"]

    def close(self) -> None:
        """Wait and release."""
        self.wait()
        self._manager.close()

    def _check_space(self, needed: int) -> None:
        free = shutil.disk_usage(self._directory).free
        if free < needed:
            raise UserError(
                f"checkpoint could not be written to {self._directory}: it needs "
                f"{needed / 2**20:.1f} MiB and {free / 2**20:.1f} MiB are free; {self._intact()}"
            )

    def _failure(self, error: Exception) -> UserError:
        text = " ".join(str(error).split()) or type(error).__name__
        # TensorStore wraps the system's reason in the path of every layer it passed.
        reason = re.search(r"([^:]+) \[os_error_code=", text)
        return UserError(
            f"checkpoint could not be written to {self._directory}: "
            f"{reason[1].strip() if reason else text}; {self._intact()}"
        )

    def _intact(self) -> str:
        # From the disk: after a failed save the manager's own list is ahead of it.
        steps = [int(entry.name) for entry in _entries(self._directory) if entry.name.isdigit()]
        return f"step {max(steps)} is intact" if steps else "no earlier checkpoint exists"


def _without_params(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "opt_state": state.opt_state, "rng": state.rng}


def restore_from(path: str, abstract: TrainState, *, optimizer: bool) -> TrainState:
    """Start from another run: its parameters and, if `optimizer`, its optimizer state and step.

    Args:
      path: a run directory, its checkpoints folder, or one checkpoint (a step) in it.
      abstract: shapes, dtypes and shardings wanted. Without `optimizer` only its `params` are
        read and the other fields of the result are the abstract ones.
      optimizer: whether to take the rest of the training state too.

    Raises:
      UserError: no checkpoint there, or parameters of other names or shapes, naming them.
    """
    directory = find_checkpoint(pathlib.Path(path))
    with ocp.StandardCheckpointer() as checkpointer:
        saved = checkpointer.metadata(directory / "params").item_metadata
        _check_same(dict(saved.tree if hasattr(saved, "tree") else saved), abstract.params, path)
        params = checkpointer.restore(directory / "params", abstract.params)
        if not optimizer:
            return dataclasses.replace(abstract, params=params)
        try:
            rest = checkpointer.restore(directory / "optimizer", _without_params(abstract))
        except ValueError as error:
            raise UserError(
                f"the optimizer state of {path} is not that of this OptimizerConfig; use the same "
                "one, or leave Experiment.initial_optimizer off"
            ) from error
        return TrainState(params=params, **rest)


def find_checkpoint(path: pathlib.Path) -> pathlib.Path:
    """The checkpoint's folder in a run directory or its checkpoints folder (the newest), or `path`.

    Raises:
      UserError: there is none.
    """
    path = path.absolute()
    if (path / "params").is_dir():
        return path
    for folder in (path / "checkpoints", path):
        steps = [int(entry.name) for entry in _entries(folder) if entry.name.isdigit()]
        if steps:
            return folder / str(max(steps))
    raise UserError(
        f"INITIAL_CHECKPOINT_PATH = {str(path)!r} holds no checkpoint; "
        "give a run directory, or a step in its checkpoints folder"
    )


def _entries(folder: pathlib.Path) -> list[pathlib.Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _check_same(saved: Any, wanted: Any, path: str) -> None:
    def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
        return {
            jax.tree_util.keystr(key, simple=True, separator="/"): tuple(leaf.shape)
            for key, leaf in leaves
        }

    have, want = shapes(saved), shapes(wanted)
    differing = [
        f"{name} is {have.get(name, 'missing')} there, {want.get(name, 'missing')} here"
        for name in sorted(have.keys() | want.keys())
        if have.get(name) != want.get(name)
    ]
    if differing:
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise UserError(
            f"the parameters of {path} do not fit this model: {'; '.join(differing[:3])}{more}"
        )
