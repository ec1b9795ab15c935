"""The run directory: the unit of every experiment, between training and everything after it."""

import contextlib
import dataclasses
import fcntl
import importlib.metadata
import json
import math
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from switchx.errors import UserError, parse_json
from switchx.reconstruction import reconstruct

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "seqio", "tensorflow")


class RunDirectory:
    """A directory that holds one run, locked for as long as this object lives.

    Of several processes with one run, one creates, locks and writes; for the others (`writes` is
    False) nothing here changes a file.

    config.gin, config.json   the configuration: as gin has it, and resolved, as plain data
    model.json                the model's configuration
    metrics.jsonl             one row per logged step and split
    samples.jsonl             decoded examples
    predictions/<step>/       what an evaluation's examples were answered, by task and split
    router_analysis/<step>/   where every token of a text went: rows and a summary
    checkpoints/<step>/       parameters, optimizer, data position
    events.out.*              TensorBoard
    versions.json             packages, git revision, devices, mesh, command
    DONE                      written last
    """

    def __init__(self, path: str, *, writes: bool = True):
        """Create and lock.

        Raises:
          UserError: not a directory, not writable, or in use by another process.
        """
        self.path = pathlib.Path(path)
        self._writes = writes
        self._lock: int | None = None
        if not writes:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path, os.O_RDONLY)
            probe = self.path / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(f"MODEL_DIR = {path!r} cannot be written: {error.strerror}") from None
        try:
            # The kernel releases the lock when the process ends, however it ends.
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"MODEL_DIR = {path!r} is in use by another process; wait for it or choose another"
            ) from None

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            os.close(self._lock)

    @property
    def checkpoints(self) -> pathlib.Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def done(self) -> bool:
        """Whether the run reached its last step."""
        return (self.path / "DONE").exists()

    def set_done(self, done: bool) -> None:
        """Write or remove DONE."""
        if done:
            self.write_text("DONE", time.strftime("%Y-%m-%d %H:%M:%S\n"))
        elif self._writes:
            (self.path / "DONE").unlink(missing_ok=True)

    def check_free(self, config: Any, *, may_change: Iterable[str]) -> None:
        """Check that this configuration may run here: a new directory, or the same configuration.

        A field that the recorded configuration lacks, as an earlier version wrote it, is taken to
        have been what is its default now.

        Args:
          config: a configuration dataclass.
          may_change: dotted keys that a continued run may change, such as its length.

        Raises:
          UserError: the directory holds another configuration's run; names the differing keys.
        """
        path = self.path / "config.json"
        if path.exists():
            recorded = self.read_json("config.json")
            # What cannot be built now is compared as it is written.
            with contextlib.suppress(UserError):
                recorded = _plain(reconstruct(type(config), recorded, str(path)))
            here, there = _flatten(_plain(config)), _flatten(recorded)
            differing = [
                f"{key} (there {there.get(key)!r}, now {here.get(key)!r})"
                for key in sorted(here.keys() | there.keys())
                if here.get(key) != there.get(key)
                and not any(key == free or key.startswith(free + ".") for free in may_change)
            ]
            if differing:
                raise UserError(
                    f"MODEL_DIR = {str(self.path)!r} holds a run of another configuration: "
                    f"{', '.join(differing[:8])}{' …' if len(differing) > 8 else ''}; "
                    "choose another MODEL_DIR or remove it"
                )
        elif self.checkpoints.exists() and any(self.checkpoints.iterdir()):
            raise UserError(
                f"MODEL_DIR = {str(self.path)!r} holds checkpoints without a config.json; "
                "choose another MODEL_DIR, and start from these by INITIAL_CHECKPOINT_PATH"
            )

    def read_json(self, name: str) -> Any:
        """Content of a JSON file.

        Raises:
          UserError: not JSON.
        """
        try:
            return parse_json((self.path / name).read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{self.path / name} is not JSON: {error}") from None

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file, all of it or nothing."""
        self.write_text(name, json.dumps(value, indent=2) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Write a file, all of it or nothing."""
        if not self._writes:
            return
        temporary = self.path / f".{name}.tmp"
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, self.path / name)
        except OSError as error:
            raise UserError(f"cannot write {self.path / name}: {error.strerror}") from None


def find_file(path: str | None, name: str, what: str) -> pathlib.Path:
    """A file of the run that INITIAL_CHECKPOINT_PATH names, from which `what` is read.

    Args:
      path: a run directory, its checkpoints folder, or a checkpoint in it.
      name: of the file.
      what: it tells.

    Raises:
      UserError: no path, or no such file.
    """
    if path is None:
        raise UserError(f"INITIAL_CHECKPOINT_PATH is not set, and {what} is read from there")
    folder = pathlib.Path(path).absolute()
    for each in (folder, *folder.parents[:2]):
        if (each / name).is_file():
            return each / name
    raise UserError(
        f"INITIAL_CHECKPOINT_PATH = {path!r} has no {name}; give a run directory, or a checkpoint "
        "in it"
    )


def read_vocabulary(path: str | None, *, vocabulary: str | None = None) -> str:
    """The vocabulary that a run was trained with, unless another is named.

    Args:
      path: a run directory, its checkpoints folder, or a checkpoint in it; what was converted
        from elsewhere has its own in vocabulary.model.
      vocabulary: the other.

    Raises:
      UserError: the run does not tell.
    """
    if vocabulary is not None:
        return vocabulary
    directory = find_file(path, "model.json", "the vocabulary").parent
    if (directory / "vocabulary.model").is_file():
        return str(directory / "vocabulary.model")
    try:
        found = parse_json((directory / "config.json").read_text(encoding="utf-8"))
        found = found["data"]["vocabulary"]
    except (OSError, ValueError, KeyError, TypeError):
        found = None
    if not isinstance(found, str):
        raise UserError(
            f"INITIAL_CHECKPOINT_PATH = {path!r} does not say with which vocabulary the model was "
            "trained; name it, as in --gin.VOCABULARY=spm32k"
        )
    return found


class JsonLines:
    """A file of JSON objects, one a line, each with a "step", to which rows are appended.

    On opening, rows later than `last_step` are dropped: they belong to work that was lost with
    an interrupted run and is about to be done again, with the same numbers. So is a last line
    that was cut off; other lines that are no rows are dropped with a warning that counts them.
    """

    def __init__(self, path: pathlib.Path, *, last_step: int):
        if path.exists():
            # Not splitlines(): a JSON string may hold U+2028 and the like.
            lines = [line for line in path.read_bytes().split(b"\n") if line.strip()]
            steps = [_step(line) for line in lines]
            broken = sum(step is None for step in steps[:-1])
            if broken:
                print(f"{path}: {broken} line(s) are no JSON rows with a step; dropped", flush=True)
            kept = [
                line + b"\n"
                for line, step in zip(lines, steps, strict=True)
                if step is not None and step <= last_step
            ]
            temporary = path.with_name(f".{path.name}.tmp")
            temporary.write_bytes(b"".join(kept))
            os.replace(temporary, path)
        self._path = path
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row and flush it; NaN and infinities, which JSON lacks, become null.

        Raises:
          UserError: it cannot be written.
        """
        text = json.dumps(_finite(row), ensure_ascii=False, allow_nan=False)
        with self._naming_the_file():
            self._file.write(text + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file; raises as `write` does."""
        with self._naming_the_file():
            self._file.close()

    @contextlib.contextmanager
    def _naming_the_file(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"cannot write {self._path}: {error.strerror}") from None


def put_row(directory: pathlib.Path, row: Mapping[str, Any]) -> dict[str, Any]:
    """Write a row of an evaluation into metrics.jsonl, after training or beside it.

    A row of the same step and split is replaced. While a run writes there the row is only
    appended, because its file must stay the same: of equal step and split the last row counts.

    Returns:
      the row that was replaced, empty if there was none.

    Raises:
      UserError: it cannot be written.
    """
    path = directory / "metrics.jsonl"
    text = json.dumps(_finite(row), ensure_ascii=False, allow_nan=False).encode() + b"\n"
    key = row["step"], row["split"]
    replaced: dict[str, Any] = {}
    try:
        lock = os.open(directory, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            with path.open("ab") as file:
                file.write(text)
        else:
            lines = path.read_bytes().split(b"\n") if path.exists() else []
            rows = [line for line in lines if _step(line) is not None]
            kept = [line + b"\n" for line in rows if _key(line) != key]
            replaced |= next((parse_json(line) for line in rows if _key(line) == key), {})
            temporary = path.with_name(f".{path.name}.tmp")
            temporary.write_bytes(b"".join([*kept, text]))
            os.replace(temporary, path)
        finally:
            os.close(lock)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    return replaced


class Nowhere:
    """Takes rows and keeps none: where processes write that do not write the run directory."""

    def write(self, *row: Any) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def _step(line: bytes) -> int | None:
    try:
        row = parse_json(line)
    except ValueError:  # not JSON, or not UTF-8
        return None
    step = row.get("step") if isinstance(row, dict) else None
    return step if isinstance(step, int) else None


def _key(line: bytes) -> tuple[Any, Any]:
    row = parse_json(line)
    return row["step"], row.get("split")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def versions(devices: Iterable[Any], mesh: Mapping[str, int]) -> dict[str, Any]:
    """What a run was made with: packages, Python, git revision, devices, mesh, command."""
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = None
    return {
        "packages": packages,
        "python": sys.version.split()[0],
        "git": _git_revision(),
        "devices": [str(device.device_kind) for device in devices],
        "mesh": dict(mesh),
        "command": sys.argv,
    }


def _git_revision() -> str | None:
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        where = pathlib.Path(__file__).parent
        result = subprocess.run(
            command, cwd=where, capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None


def _plain(config: Any) -> Any:
    """A configuration as JSON gives it back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping) and value:
        flat: dict[str, Any] = {}
        for key, item in value.items():
            flat |= _flatten(item, f"{prefix}.{key}" if prefix else str(key))
        return flat
    return {prefix: value}
