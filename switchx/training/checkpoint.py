"""Checkpoints: saved in the background, committed by rename, restored to any sharding."""

import dataclasses
import itertools
import logging
import pathlib
import re
import shutil
import sys
from collections.abc import Iterable
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import checkpoint_managers as policies
from orbax.checkpoint.path import atomicity

from switchx import distributed
from switchx.errors import UserError
from switchx.training import checksums, lora
from switchx.training.selection import Criterion
from switchx.training.state import TrainState, num_bytes
from switchx.training.trainable import ADAPTERS

# The folders of a checkpoint; one of an evaluated step has `METRICS` besides.
ITEMS = ("params", "optimizer", "data")
METRICS = "metrics"


def _barrier(*, key: str, timeout_ms: int) -> None:
    """Where the threads of all processes that save meet.

    A thread that comes here with an error on its way up does not wait: the others wait elsewhere,
    for it, and the error would never be heard of.
    """
    if error := sys.exception():
        raise error
    ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


# Orbax gives up a save by the wall clock, which may be set while it saves. And where folders are
# made in a thread of their own, others wait for it by the wall clock, five minutes if it fails.
_ASYNC = ocp.options.AsyncOptions(
    timeout_secs=1000 * 365 * 86400,
    create_directories_asynchronously=False,
    barrier_sync_fn=_barrier,
)

# Orbax logs the traceback of an error in a thread, and raises it, too: once is enough.
logging.getLogger("absl").addFilter(
    lambda record: not (record.exc_info and "orbax" in record.pathname)
)


class _ItemPath(atomicity.AtomicRenameTemporaryPath):
    """Where orbax collects the files of an item, or of a whole checkpoint, before the rename.

    An item's checksums are among its files when it is renamed, and it is renamed before the
    checkpoint is, so a checkpoint that has its name has its checksums.
    """

    async def finalize(self) -> None:
        """Called by the thread that saves, when all files are written."""
        if self.get_final().name in (*ITEMS, METRICS):
            checksums.write(pathlib.Path(self.get()))
        await super().finalize()


class Checkpointer:
    """Checkpoints of one run under `directory`/<step>/.

    A checkpoint holds the items `params`, `optimizer` (optax state, step and rng) and `data` (the
    position of the data), each with the checksums of its files. It appears under its final name
    only when it is complete; what a killed run left half-written is removed here and never
    restored. The newest checkpoint is compared with its checksums here (by the first of several
    processes, which also writes them when all have written theirs); one that does not hold
    what was written is moved to `directory`/<step>.damaged with a warning that says what is
    wrong with it, and the one before it is taken.

    Args:
      directory: created if missing.
      keep: how many of the latest to keep.
      keep_best: how many of those with the best evaluations to keep besides.
      criterion: which evaluation is the best; None is the lowest cross-entropy.

    Raises:
      UserError: not writable, or there are checkpoints but all of them are damaged (which
        leaves them where they are).
    """

    def __init__(
        self,
        directory: pathlib.Path,
        *,
        keep: int = 3,
        keep_best: int = 1,
        criterion: Criterion | None = None,
    ):
        criterion = criterion or Criterion()
        self._directory = directory.absolute()
        if distributed.is_first():
            _set_aside_damaged(self._directory)
        distributed.wait_for_all("checkpoints")

        def quality(metrics: dict[str, float]) -> Any:
            # Of equal ones the earliest: there it was reached.
            return criterion.score(metrics), -metrics.get("step", 0)

        best = policies.BestN(
            get_metric_fn=quality,
            n=keep_best,
            keep_checkpoints_without_metrics=False,
        )
        try:
            self._manager = ocp.CheckpointManager(
                self._directory,
                options=ocp.CheckpointManagerOptions(
                    create=True,
                    cleanup_tmp_directories=True,
                    temporary_path_class=_ItemPath,
                    async_options=_ASYNC,
                    # Only with this are the metrics saved, and the best kept after a restart.
                    best_fn=quality,
                    preservation_policy=policies.AnyPreservationPolicy(
                        [policies.LatestN(keep), best]
                    ),
                ),
            )
        except OSError as error:
            raise UserError(f"cannot write checkpoints to {self._directory}: {error}") from None
        except ValueError as error:
            raise UserError(f"cannot read the checkpoints in {self._directory}: {error}") from None

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
          metrics: numbers of the evaluation, if this step was evaluated, the criterion's among
            them and finite.

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
                metrics=None if metrics is None else {"step": step, **metrics},
                force=True,
            )
        except jax.errors.JaxRuntimeError:
            raise  # of devices or processes, not of files
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
        except jax.errors.JaxRuntimeError:
            raise  # of devices or processes, not of files
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
        except jax.errors.JaxRuntimeError:
            raise  # of devices or processes, not of files
        except Exception as error:
            raise _unreadable(self._directory / str(step), error) from error
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
        checkpoints = _checkpoints(self._directory)
        if not checkpoints:
            return "no earlier checkpoint exists"
        return f"step {checkpoints[0].name} is intact"


def _without_params(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "opt_state": state.opt_state, "rng": state.rng}


def restore_from(path: str, abstract: TrainState, *, optimizer: bool) -> TrainState:
    """Start from another run: its parameters and, if `optimizer`, its optimizer state and step.

    Parameters come merged with the adapters that lie beside them, and without adapters.

    Args:
      path: a run directory, its checkpoints folder, or one checkpoint (a step) in it.
      abstract: shapes, dtypes and shardings wanted. Without `optimizer` only its `params` are
        read and the other fields of the result are the abstract ones.
      optimizer: whether to take the rest of the training state too.

    Raises:
      UserError: no checkpoint there, a damaged one, or parameters of other names or shapes,
        naming them.
    """
    directory = find_checkpoint(pathlib.Path(path))
    items = ITEMS[:2] if optimizer else ITEMS[:1]
    if optimizer and (directory / "params").is_dir() and not (directory / "optimizer").exists():
        raise UserError(
            f"checkpoint {directory} has parameters and no optimizer state to keep; leave "
            "Experiment.initial_optimizer off (KEEP_OPTIMIZER=False)"
        )
    if distributed.is_first() and (damage := find_damage(directory, items)):
        raise UserError(
            f"checkpoint {directory} is damaged ({damage}); give another one, or a good copy of it"
        )
    distributed.wait_for_all("restore")
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            saved = checkpointer.metadata(directory / "params").item_metadata
            saved = dict(saved.tree if hasattr(saved, "tree") else saved)
        except jax.errors.JaxRuntimeError:
            raise  # of devices or processes, not of files
        except Exception as error:
            raise _unreadable(directory, error) from error
        wanted = lora.base(abstract.params)
        _check_same(lora.base(saved), wanted, path)
        if ADAPTERS in saved:
            wanted[ADAPTERS] = _on_every_device(saved[ADAPTERS], wanted)
        try:
            params = checkpointer.restore(directory / "params", wanted)
        except jax.errors.JaxRuntimeError:
            raise  # of devices or processes, not of files
        except Exception as error:
            raise _unreadable(directory, error) from error
        if ADAPTERS in params:
            where = jax.tree.map(lambda leaf: leaf.sharding, lora.base(wanted))
            merge = jax.jit(
                lambda base, adapters: lora.merge({**base, ADAPTERS: adapters}),
                donate_argnums=0,
                out_shardings=where,
            )
            params = merge(lora.base(params), params[ADAPTERS])
        if not optimizer:
            return dataclasses.replace(abstract, params=params)
    rest = _restore_optimizer(directory, _without_params(abstract), path)
    return TrainState(params=params, **rest)


def _restore_optimizer(directory: pathlib.Path, wanted: Any, path: str) -> Any:
    """What is wanted of a saved training state, which may be of more parameters."""
    how = ocp.args.PyTreeRestore(
        item=wanted,
        restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
        partial_restore=True,
    )
    with ocp.PyTreeCheckpointer() as checkpointer:
        try:
            found = checkpointer.restore(directory / "optimizer", args=how)
        except (ValueError, KeyError, TypeError) as error:
            raise _another_optimizer(path) from error
    # What was not saved comes back as it was asked for.
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(found)):
        raise _another_optimizer(path)
    return found


def _another_optimizer(path: str) -> UserError:
    return UserError(
        f"the optimizer state of {path} is not that of this OptimizerConfig and "
        "Experiment.trainable; use the same, or leave Experiment.initial_optimizer off "
        "(KEEP_OPTIMIZER=False)"
    )


def _on_every_device(saved: Any, like: Any) -> Any:
    """Saved arrays as they are to be restored, whole on the devices of a tree of shapes."""
    where = NamedSharding(jax.tree.leaves(like)[0].sharding.mesh, PartitionSpec())
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), saved
    )


def _unreadable(checkpoint: pathlib.Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200]
    return UserError(f"checkpoint {checkpoint} cannot be read ({reason}); take another one")


def find_damage(checkpoint: pathlib.Path, items: Iterable[str] = ITEMS) -> str | None:
    """What is wrong with these items of a checkpoint, or None. Every byte of them is read.

    An item without checksums, as another program writes it, is only looked for, and a warning
    says so.
    """
    for item in items:
        if not (checkpoint / item).is_dir():
            return f"{item} is missing"
        if damage := checksums.find_damage(checkpoint / item):
            return damage
        if not (checkpoint / item / checksums.MANIFEST).exists():
            print(f"warning: {checkpoint / item} has no checksums; read unchecked", flush=True)
    return None


def _set_aside_damaged(directory: pathlib.Path) -> None:
    """Rename damaged checkpoints until the newest one is good."""
    for entry in _entries(directory):
        if entry.is_dir() and entry.name.isdecimal() and not _entries(entry):
            print(f"warning: {entry} is empty and no checkpoint; removed", flush=True)
            entry.rmdir()
    damaged: dict[pathlib.Path, str] = {}
    good = False
    for checkpoint in _checkpoints(directory):
        # Before the newest good one only the metrics matter, which say which was best; a kill
        # may have come while such a checkpoint was being deleted, and then they may be gone.
        damage = None if good else find_damage(checkpoint)
        if not damage and (not good or (checkpoint / METRICS / METRICS).exists()):
            damage = checksums.find_damage(checkpoint / METRICS)
        if damage:
            damaged[checkpoint] = damage
        good = good or not damage
    if damaged and not good:
        found = "; ".join(f"step {path.name}: {damage}" for path, damage in damaged.items())
        raise UserError(
            f"no checkpoint in {directory} is good ({found}); put a good copy there, or remove the "
            "run directory to train from the beginning"
        )
    for checkpoint, damage in damaged.items():
        names = (f"{checkpoint.name}.damaged{number or ''}" for number in itertools.count())
        aside = next(path for path in map(directory.joinpath, names) if not path.exists())
        print(
            f"warning: checkpoint {checkpoint} is damaged ({damage}); moved to {aside.name}, "
            "going on without it",
            flush=True,
        )
        checkpoint.rename(aside)


def find_checkpoint(path: pathlib.Path) -> pathlib.Path:
    """The checkpoint's folder in a run directory or its checkpoints folder (the newest), or `path`.

    Raises:
      UserError: there is none.
    """
    path = path.absolute()
    if (path / "params").is_dir():
        return path
    for folder in (path / "checkpoints", path):
        if checkpoints := _checkpoints(folder):
            return checkpoints[0]
    if path.parent.name == "checkpoints" and path in _checkpoints(path.parent):
        return path  # without its parameters, which restoring it says
    raise UserError(
        f"{str(path)!r} holds no checkpoint; INITIAL_CHECKPOINT_PATH or MODEL_DIR should be "
        "a run directory, or a step in its checkpoints folder"
    )


def _checkpoints(folder: pathlib.Path) -> list[pathlib.Path]:
    """Checkpoints in a folder, newest first. An empty folder is none."""
    found = [path for path in _entries(folder) if path.name.isdecimal() and _entries(path)]
    return sorted(found, key=lambda path: int(path.name), reverse=True)


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
