"""Which evaluation is the best, and when a better one has been waited for long enough."""

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from switchx.errors import UserError, closest, parse_json

DIRECTIONS = ("lowest", "highest")
# Of every other metric more is better.
_LOW = re.compile(r"(.*[_/])?(loss|cross_entropy|perplexity|error_rate|fraction|violation)")


def numbers(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a metrics row, of nested ones as "outer/inner"; lists are left out."""
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[prefix + name] = float(value)
    return found


@dataclasses.dataclass(frozen=True)
class Criterion:
    """A metric by which evaluations are compared.

    Attributes:
      metric: a key of an evaluation's row, "outer/inner" for nested ones.
      direction: "lowest" or "highest" is best; None goes by the name: lowest for losses,
        perplexity, error rates, dropped fractions and violations, else highest.
    """

    metric: str = "cross_entropy"
    direction: str | None = None

    @property
    def best(self) -> str:
        """The direction, "lowest" or "highest"."""
        if self.direction is not None:
            return self.direction
        return "lowest" if _LOW.fullmatch(self.metric) else "highest"

    def check(self, row: Mapping[str, Any]) -> None:
        """Check that an evaluation has the metric.

        Raises:
          UserError: it has not.
        """
        if self.metric not in (found := numbers(row)):
            top = [name for name in found if "by_layer/" not in name]
            raise UserError(
                f"Experiment.best_metric = {self.metric!r} is no number of an evaluation"
                f"{closest(self.metric, top)}"
            )

    def score(self, values: Mapping[str, Any]) -> float:
        """More is better; minus infinity where the metric is missing or not finite."""
        value = numbers(values).get(self.metric, math.nan)
        if not math.isfinite(value):
            return -math.inf
        return value if self.best == "highest" else -value


class Patience:
    """How many evaluations have passed since the best one.

    It is a matter of the evaluations alone, so that a run which goes on finds it by noting again
    those that metrics.jsonl holds.

    Args:
      criterion: of the best.
      limit: evaluations without a better one after which it is exhausted; None is never.
    """

    def __init__(self, criterion: Criterion, limit: int | None):
        self.best_step: int | None = None
        self.waited = 0
        self._best = -math.inf
        self._criterion = criterion
        self._limit = limit

    def note(self, step: int, row: Mapping[str, Any]) -> None:
        """Take an evaluation, in order. That before the first step is no result of training."""
        if not step:
            return
        score = self._criterion.score(row)
        if score > self._best:
            self._best, self.best_step, self.waited = score, step, 0
        else:
            self.waited += 1

    @property
    def exhausted(self) -> bool:
        """Whether nothing better is expected."""
        return self._limit is not None and self.waited >= self._limit


def evaluations(
    metrics: pathlib.Path, split: str, last_step: int | None = None
) -> list[dict[str, Any]]:
    """Rows of a split in a metrics.jsonl, up to a step; none where there is no such file.

    Lines that are no rows are left out, as `JsonLines` does.
    """
    if not metrics.exists():
        return []
    found = []
    for line in metrics.read_bytes().split(b"\n"):
        try:
            row = parse_json(line)
        except ValueError:
            continue
        if not isinstance(row, dict) or row.get("split") != split:
            continue
        if isinstance(row.get("step"), int) and (last_step is None or row["step"] <= last_step):
            found.append(row)
    return found


def best_checkpoint(checkpoints: pathlib.Path, criterion: Criterion) -> pathlib.Path:
    """The checkpoint with the best evaluation, of those in a checkpoints folder.

    Raises:
      UserError: no checkpoint was saved at an evaluation.
    """
    scores = {}
    for path in _steps(checkpoints):
        file = path / "metrics" / "metrics"
        if file.exists():
            try:
                scores[path] = criterion.score(json.loads(file.read_text(encoding="utf-8")))
            except (ValueError, AttributeError):
                raise UserError(f"{file} is not a JSON object; take another checkpoint") from None
    if not scores:
        raise UserError(
            f"{checkpoints} has no checkpoint of an evaluated step, of which one would be the "
            "best; set EVAL_PERIOD to a multiple of CHECKPOINT_PERIOD, or take the last"
        )
    # Of equal ones the earliest, as `Patience` has it.
    return max(scores, key=lambda path: (scores[path], -int(path.name)))


def _steps(folder: pathlib.Path) -> Iterable[pathlib.Path]:
    paths = folder.iterdir() if folder.is_dir() else ()
    return sorted((path for path in paths if path.name.isdecimal()), key=lambda p: int(p.name))
