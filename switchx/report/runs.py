"""Run directories as a report reads them: what can be read is read, what cannot is named."""

import dataclasses
import json
import math
import pathlib
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from switchx.errors import parse_json
from switchx.training.selection import numbers

# One of these files makes a directory a run.
FILES = ("config.json", "metrics.jsonl", "model.json", "versions.json", "trial.json")
_LARGEST = 2**53


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run directory holds, as far as it can be read.

    Attributes:
      path: the directory, as the user named it.
      state: "done", "running", "waiting", "stopped", "pruned", "diverged" or "failed" as a sweep's
        trial.json says; without one "done", "diverged" (the last loss is not finite), "unfinished"
        or "empty" (no metrics yet), by the files.
      rows: of metrics.jsonl by step, the last of each step and split; what is not finite is None.
      evaluations: of evaluations.jsonl: a finished trial evaluated under changed settings.
      samples: of samples.jsonl.
      config: config.json, None if there is none that can be read.
      versions: versions.json, likewise.
      trial: trial.json, empty without.
      analysis: the latest router_analysis/<step>/summary.json.
      problems: a line for each thing that is missing or broken.
    """

    path: pathlib.Path
    state: str
    rows: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    config: dict[str, Any] | None
    versions: dict[str, Any] | None
    trial: dict[str, Any]
    analysis: dict[str, Any] | None
    problems: tuple[str, ...]

    @property
    def last_step(self) -> int:
        """The last step that metrics.jsonl knows of, 0 without any."""
        return self.rows[-1]["step"] if self.rows else 0

    @property
    def splits(self) -> list[str]:
        """Splits that were evaluated, in order of appearance; without "train"."""
        return list(dict.fromkeys(row["split"] for row in self.rows if row["split"] != "train"))

    @property
    def task(self) -> str | None:
        """The task or mixture that the configuration trains on."""
        data = (self.config or {}).get("data")
        name = data.get("mixture_or_task_name") if isinstance(data, dict) else None
        return name if isinstance(name, str) else None

    @property
    def step_seconds(self) -> float | None:
        """Median over the logged periods of the seconds a step took, the first (which compiles)
        left out if there are others."""
        found = [value for _, value in self.curve("step_seconds", "train") if value is not None]
        return statistics.median(found[1:] or found) if found else None

    @property
    def training_seconds(self) -> float | None:
        """Step time × steps: what training costs without compilation and evaluations."""
        return None if self.step_seconds is None else self.step_seconds * self.last_step

    @property
    def training_dropped(self) -> float | None:
        """Mean of the dropped fractions that training logged, from the first step to the last."""
        found = [value for _, value in self.curve("dropped_fraction", "train") if value is not None]
        return statistics.fmean(found) if found else None

    def curve(self, metric: str, split: str) -> list[tuple[int, float | None]]:
        """Step and value of a metric, for every row of the split that has it."""
        rows = [row for row in self.rows if row["split"] == split]
        found = [(row["step"], metric_value(row, metric), metric in row) for row in rows]
        return [(step, number) for step, number, there in found if there or number is not None]

    def last(self, split: str) -> dict[str, Any] | None:
        """The last row of a split."""
        return next((row for row in reversed(self.rows) if row["split"] == split), None)

    def layers(self) -> list[str]:
        """Names of the sparse layers, encoder first."""
        loads = [row["expert_load"] for row in self.rows if "expert_load" in row]
        names = dict.fromkeys(name for load in loads if isinstance(load, dict) for name in load)
        return sorted(names, key=_layer_order)


def is_run(path: pathlib.Path) -> bool:
    """Whether a directory is a run, be it a broken one."""
    return any((path / name).exists() for name in FILES) or (path / "checkpoints").is_dir()


def read_run(path: pathlib.Path) -> Run:
    """Read a run directory. Raises nothing for what is in it: see `Run.problems`."""
    problems: list[str] = []
    rows = _unique(read_rows(path / "metrics.jsonl", problems))
    config = read_object(path / "config.json", problems)
    versions = read_object(path / "versions.json", problems)
    trial = read_object(path / "trial.json", problems, needed=False) or {}
    if not any(row["split"] != "train" for row in rows) and rows:
        problems.append("metrics.jsonl has no evaluation yet")
    return Run(
        path=path,
        state=_state(path, trial, rows),
        rows=rows,
        evaluations=_evaluations(path, problems),
        samples=read_rows(path / "samples.jsonl", problems, needed=False),
        config=config,
        versions=versions,
        trial=trial,
        analysis=_analysis(path, problems),
        problems=tuple(problems),
    )


def read_object(
    path: pathlib.Path, problems: list[str], *, needed: bool = True
) -> dict[str, Any] | None:
    """The JSON object of a file; None, and a line in `problems`, if it cannot be read."""
    try:
        found = parse_json(path.read_bytes())
    except FileNotFoundError:
        if needed:
            problems.append(f"{path.name} is missing")
        return None
    except OSError as error:
        problems.append(f"{path.name} cannot be read: {error.strerror}")
        return None
    except ValueError as error:
        problems.append(f"{path.name} is not JSON: {error}")
        return None
    if not isinstance(found, dict):
        problems.append(f"{path.name} is not a JSON object")
        return None
    return _cleaned(found)


def read_rows(
    path: pathlib.Path, problems: list[str], *, needed: bool = True
) -> list[dict[str, Any]]:
    """JSON objects with a "step", one a line, by step; lines that are none are counted as problems.

    A row without a split gets "train".
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        if needed:
            problems.append(f"{path.name} is missing")
        return []
    except OSError as error:
        problems.append(f"{path.name} cannot be read: {error.strerror}")
        return []
    rows, broken = [], []
    for number, line in enumerate(lines, 1):
        if line.strip():
            row = _row(line)
            rows += [row] if row else []
            broken += [] if row else [number]
    if broken == [len(lines)]:
        problems.append(f"{path.name}: the last line is cut off; left out")
    elif broken:
        more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        where = ", ".join(map(str, broken[:3]))
        problems.append(f"{path.name}: no JSON row in line {where}{more}; left out")
    if needed and not rows and not broken:
        problems.append(f"{path.name} is empty")
    return sorted(rows, key=lambda row: row["step"])


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested objects as one, with dotted keys."""
    if not isinstance(value, Mapping) or not value:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= flatten(item, f"{prefix}.{key}" if prefix else str(key))
    return flat


def key(settings: Mapping[str, Any]) -> str:
    """Settings as something that can be compared: equal for equal settings, 2 and 2.0 too."""
    return json.dumps(_plain(settings), sort_keys=True)


def shares(value: Any) -> list[float] | None:
    """A list of finite numbers, such as one layer's expert load; None for anything else."""
    if not isinstance(value, list) or not value:
        return None
    fits = all(isinstance(each, int | float) and not isinstance(each, bool) for each in value)
    return [float(each) for each in value] if fits else None


def metric_value(row: Mapping[str, Any], metric: str) -> float | None:
    """A number of a row, a nested one by "outer/inner"; None if it has none of that name."""
    if metric not in row and "/" in metric:
        return numbers(row).get(metric)
    found = row.get(metric)
    if isinstance(found, int | float) and not isinstance(found, bool):
        return float(found)
    return None


def metric_names(runs: Iterable[Run]) -> set[str]:
    """Every metric that a row of these runs has, those of single layers left out."""
    rows = (row for run in runs for row in [*run.rows, *run.evaluations])
    return {name for row in rows for name in row if metric_value(row, name) is not None} - {"step"}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = parse_json(line)
    except ValueError:
        return None
    if not isinstance(row, dict):
        return None
    step = row.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < _LARGEST:
        return None
    row = _cleaned(row)
    if not isinstance(row.setdefault("split", "train"), str):
        return None
    return row


def _cleaned(value: Any) -> Any:
    """Numbers that are not finite, or not exact in JavaScript, become None."""
    if isinstance(value, dict):
        return {key: _cleaned(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_cleaned(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, int) and abs(value) > _LARGEST:
        return None
    return value


def _unique(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return list({(row["step"], row["split"]): row for row in rows}.values())


def _evaluations(path: pathlib.Path, problems: list[str]) -> list[dict[str, Any]]:
    rows = read_rows(path / "evaluations.jsonl", problems, needed=False)
    kept = [row for row in rows if isinstance(row.get("settings"), dict)]
    if len(kept) < len(rows):
        problems.append(f"evaluations.jsonl: {len(rows) - len(kept)} row(s) without settings")
    keys = [(row["split"], key(row["settings"])) for row in kept]
    return list(dict(zip(keys, kept, strict=True)).values())


def _analysis(path: pathlib.Path, problems: list[str]) -> dict[str, Any] | None:
    found = [each for each in path.glob("router_analysis/*/summary.json")]
    steps = {int(each.parent.name): each for each in found if each.parent.name.isdecimal()}
    if not steps:
        return None
    own: list[str] = []
    summary = read_object(steps[max(steps)], own)
    problems += [f"router_analysis/{max(steps)}/{problem}" for problem in own]
    if summary is not None and not isinstance(summary.get("layers"), list):
        problems.append(f"router_analysis/{max(steps)}/summary.json has no layers")
        return None
    return summary


def _state(path: pathlib.Path, trial: Mapping[str, Any], rows: list[dict[str, Any]]) -> str:
    if isinstance(trial.get("state"), str):
        return trial["state"]
    if (path / "DONE").exists():
        return "done"
    train = [row for row in rows if row["split"] == "train"]
    if train and "loss" in train[-1] and train[-1]["loss"] is None:
        return "diverged"
    return "unfinished" if rows else "empty"


def _layer_order(name: str) -> tuple[bool, str, int]:
    stack, _, number = name.rpartition("/")
    return stack != "encoder", stack, int(number) if number.isdecimal() else 0
