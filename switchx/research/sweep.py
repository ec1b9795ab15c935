"""`Sweep`: one experiment under many settings, each with several seeds, as a list of trials.

An arm is one combination of the axes' values; a trial is an arm with a seed. All arms see the same
seeds, and a seed orders the data alike in each: arms compare pairwise.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import os
import pathlib
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from switchx import configuration, regime
from switchx.data import pipeline
from switchx.errors import UserError, check_choice, check_range, check_types, closest
from switchx.experiment import Experiment
from switchx.reconstruction import change
from switchx.regime import Regime
from switchx.training.selection import DIRECTIONS, Criterion

Settings = dict[str, Any]

# What a trial may be: the script that does the same by itself, and what it configures.
KINDS: Mapping[str, type] = {"train": Experiment, "finetune": Regime}

# The one axis that is no macro or field: a configuration file read after the base.
GIN_FILE = "gin_file"

# What the sweep itself binds for every trial: macros, and the fields that they fill.
_OWN = {
    "RANDOM_SEED": "Sweep.seeds",
    "Experiment.seed": "Sweep.seeds",
    "MODEL_DIR": "Sweep.model_dir",
    "Experiment.model_dir": "Sweep.model_dir",
    "Regime.model_dir": "Sweep.model_dir",
}

# Where a trial lies and what it keeps there for the next start do not make it another.
_PLACES = ("model_dir", "token_cache_dir", "compilation_cache_dir")

_NAME = re.compile(r"[A-Za-z_][\w./]*", re.ASCII)

_DISTRIBUTIONS = ("uniform", "log_uniform", "integer", "choice")


@dataclasses.dataclass(frozen=True)
class Grid:
    """Every combination of the values of its names.

    Attributes:
      values: macro or field, as `--gin.NAME` takes it → its values; `gin_file` for files that are
        read after the base.
      when: settings of earlier axes for which this one exists; elsewhere its names are not set.

    Raises:
      UserError: no values, or one that JSON does not have.
    """

    values: Mapping[str, Sequence[Any]]
    when: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        _check_values(self)

    def settings(self) -> list[Settings]:
        """What it sets, arm by arm."""
        return [
            dict(zip(self.values, chosen, strict=True))
            for chosen in itertools.product(*self.values.values())
        ]


@dataclasses.dataclass(frozen=True)
class Zip:
    """The first values of all its names, then the second ones, and so on.

    Attributes:
      values, when: as `Grid`'s; lists of equal length.

    Raises:
      UserError: no values, or lists of different lengths.
    """

    values: Mapping[str, Sequence[Any]]
    when: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        _check_values(self)
        lengths = {name: len(values) for name, values in self.values.items()}
        if len(set(lengths.values())) > 1:
            found = ", ".join(f"{name} {length}" for name, length in lengths.items())
            raise UserError(f"Zip.values: lists of different lengths ({found}); make them equal")

    def settings(self) -> list[Settings]:
        """What it sets, arm by arm."""
        return [
            dict(zip(self.values, chosen, strict=True))
            for chosen in zip(*self.values.values(), strict=True)
        ]


@dataclasses.dataclass(frozen=True)
class Random:
    """Draws of its names from distributions, the same for the same seed.

    Attributes:
      values: name → ('uniform', low, high), ('log_uniform', low, high), ('integer', low, high)
        with both ends, or ('choice', [...]).
      num_samples: how many draws.
      seed: of the draws.
      when: as `Grid`'s.

    Raises:
      UserError: a distribution that is none, or no draws.
    """

    values: Mapping[str, Sequence[Any]]
    num_samples: int = 8
    seed: int = 0
    when: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        _check_values(self)
        check_range(self, "num_samples", self.num_samples >= 1, "at least 1")
        for name, distribution in self.values.items():
            check_distribution("Random", name, distribution)

    def settings(self) -> list[Settings]:
        """What it sets, draw by draw."""
        generator = random.Random(self.seed)
        return [
            {name: _draw(generator, each) for name, each in self.values.items()}
            for _ in range(self.num_samples)
        ]


@dataclasses.dataclass(frozen=True)
class Search:
    """Settings proposed by Optuna from the results so far, instead of all combinations.

    Attributes:
      values: name → distribution, as `Random`'s.
      num_arms: how many settings are tried; each runs with every seed, and counts by the mean.
      sampler: "tpe", "cmaes" or "random".
      prune: end arms whose evaluations are worse than the median of the others' at the same step.
      storage: Optuna's: a URL of any database it knows; None is search.sqlite in the sweep's
        folder.
      seed: of the sampler.

    Raises:
      UserError: a distribution or a sampler that is none.
    """

    values: Mapping[str, Sequence[Any]]
    num_arms: int = 20
    sampler: str = "tpe"
    prune: bool = True
    storage: str | None = None
    seed: int = 0

    def __post_init__(self):
        _check_values(self)
        check_range(self, "num_arms", self.num_arms >= 1, "at least 1")
        check_choice(self, "sampler", ("tpe", "cmaes", "random"))
        for name, distribution in self.values.items():
            check_distribution("Search", name, distribution)

    def ends(self) -> list[Settings]:
        """Settings with every choice and both ends of every range, one name changed at a time."""
        values = {name: _ends(distribution) for name, distribution in self.values.items()}
        first = {name: each[0] for name, each in values.items()}
        others = [{**first, name: value} for name, each in values.items() for value in each[1:]]
        return [first, *others]


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A study: a base, axes, seeds, and what is measured.

    Attributes:
      base: gin files of every trial, read in order.
      axes: of which every combination is an arm; none for the base alone.
      seeds: that every arm runs with.
      bindings: macros and fields that every trial has, over the base.
      eval_axes: axes of evaluation alone: the checkpoint that a trial ends with is evaluated with
        each combination. A value '%NAME' is what the trial has for NAME.
      search: for settings that Optuna proposes, in the place of axes; None for none.
      metric, direction: what trials are compared by, a number of an evaluation's row; None goes by
        the name, as for the best checkpoint.
      max_arms: so many of the arms only, evenly spread over their list; None for all.
      kind: what a trial is: "train", or "finetune" for a regime.
      model_dir: folder of the sweep (MODEL_DIR).

    Raises:
      UserError: wrong types, a name on two axes or one that is the sweep's to bind, or no seeds.
    """

    base: Sequence[str]
    axes: Sequence[Any] = ()
    seeds: Sequence[int] = (0, 1, 2)
    bindings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    eval_axes: Sequence[Any] = ()
    search: Search | None = None
    metric: str = "cross_entropy"
    direction: str | None = None
    max_arms: int | None = None
    kind: str = "train"
    model_dir: str = "runs/sweep"

    def __post_init__(self):
        check_types(self)
        several = not isinstance(self.base, str) and all(isinstance(f, str) for f in self.base)
        check_range(self, "base", several, "a list of gin files")
        check_choice(self, "kind", KINDS)
        check_range(self, "model_dir", bool(self.model_dir), "a path")
        check_range(self, "max_arms", self.max_arms is None or self.max_arms >= 1, "positive")
        if self.direction is not None:
            check_choice(self, "direction", DIRECTIONS)
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise UserError(f"Sweep.seeds = {list(self.seeds)}: give one or more different seeds")
        for axes in ("axes", "eval_axes"):
            for axis in getattr(self, axes):
                if not isinstance(axis, Grid | Zip | Random):
                    raise UserError(f"Sweep.{axes} has {axis!r}, which is no Grid, Zip or Random")
        if self.search and self.axes:
            raise UserError(
                "Sweep.search with Sweep.axes: a search proposes all that differs; make choices "
                "of the axes: Search.values = {'NAME': ('choice', [a, b])}"
            )
        self._check_names([*self.axes, *([self.search] if self.search else [])], self.bindings)
        self._check_names(self.eval_axes, {})
        both = {name for axis in self.eval_axes for name in axis.values} & set(self.names)
        if both:
            raise UserError(
                f"Sweep.eval_axes: {min(both)} is one of the axes too, and results would not say "
                "which of the two they are of; write one as Class.field"
            )
        known: set[str] = set()
        for axis in self.axes:
            for name in axis.when:
                if name not in known:
                    raise UserError(
                        f"{type(axis).__name__}.when: no earlier axis has {name!r}"
                        f"{closest(name, known)}"
                    )
            known |= set(axis.values)

    def _check_names(self, axes: Sequence[Any], bindings: Mapping[str, Any]) -> None:
        for name in (*bindings, *(name for axis in axes for name in axis.values)):
            if not _NAME.fullmatch(name):
                raise UserError(f"Sweep: {name!r} is no name of a macro or field; see README.md")
            if owner := _OWN.get(_canonical(name).rpartition("/")[2]):
                raise UserError(
                    f"Sweep: {name} is for {owner} to say; remove it from axes and bindings"
                )
        for number, axis in enumerate(axes):
            others = [bindings, *(e.values for e in axes[:number] if not _exclude(e, axis))]
            for name in axis.values:
                same = [each for each in axis.values if _canonical(each) == _canonical(name)][1:]
                same += [n for other in others for n in other if _canonical(n) == _canonical(name)]
                if same:
                    spelt = "" if same[0] == name else f" (as {same[0]} too)"
                    raise UserError(
                        f"Sweep: {name} is bound twice{spelt}, by axes or by an axis and the "
                        "bindings; remove one of the two"
                    )

    @property
    def criterion(self) -> Criterion:
        """Which result is the best."""
        return Criterion(self.metric, self.direction)

    @property
    def names(self) -> list[str]:
        """Names of all axes, in order."""
        searched = [self.search] if self.search else []
        return list(dict.fromkeys(name for axis in (*self.axes, *searched) for name in axis.values))


def arms(sweep: Sweep) -> list[Settings]:
    """The settings of every arm, the first axis slowest."""
    found = combine(sweep.axes)
    if sweep.max_arms is None or len(found) <= sweep.max_arms:
        return found
    step = len(found) / sweep.max_arms
    return [found[math.floor(step * number)] for number in range(sweep.max_arms)]


def combine(axes: Sequence[Any]) -> list[Settings]:
    """Every combination of axes, each once; an axis whose `when` does not hold sets nothing.

    Raises:
      UserError: a `when` that never holds.
    """
    found: list[Settings] = [{}]
    for axis in axes:
        holds = [
            all(settings.get(name) == value for name, value in axis.when.items())
            for settings in found
        ]
        if not any(holds):
            raise UserError(
                f"{type(axis).__name__}.when = {dict(axis.when)!r} holds for no arm, and "
                f"{', '.join(axis.values)} would never be set; give what an earlier axis has"
            )
        found = [
            settings | more
            for settings, there in zip(found, holds, strict=True)
            for more in (axis.settings() if there else [{}])
        ]
    return [json.loads(text) for text in dict.fromkeys(map(json.dumps, found))]


@dataclasses.dataclass
class Trial:
    """An arm with a seed: what to run, and how far it came. Kept in trial.json of its folder.

    Attributes:
      name: of its folder.
      kind: as `Sweep`'s.
      settings, seed: the arm's, and the seed.
      hash: SHA-256 of the whole configuration, places left out.
      gin_files, bindings: what its configuration is made of.
      eval_settings: what its checkpoint is evaluated with after training, see `Sweep.eval_axes`.
      run_directory: that of its result, relative to its folder: a regime's last.
      task, steps: of that run.
      state: "waiting", "running", "done", "failed", "diverged" (a loss that is not finite),
        "pruned" by the search, or "stopped" with the sweep.
      attempts: so far.
      error: what ended the last attempt, a line.
      seconds: of the attempts; one that was killed had no time to add its own.

    Raises:
      UserError: wrong types.
    """

    name: str
    kind: str
    settings: Settings
    seed: int
    hash: str
    gin_files: list[str]
    bindings: list[str]
    eval_settings: list[Settings]
    run_directory: str
    task: str
    steps: int
    state: str = "waiting"
    attempts: int = 0
    error: str = ""
    seconds: float = 0.0

    def __post_init__(self):
        check_types(self)


def make_trials(sweep: Sweep, settings: Sequence[Settings]) -> Iterator[tuple[Trial, Any]]:
    """The trials of arms, seed by seed, each with its configuration: an Experiment or a Regime.

    All arms run with one seed before any runs with the next, so that a sweep that is stopped has
    compared all of them.

    Raises:
      UserError: a configuration that cannot be built, as `configuration.build`, with the axis's
        name; an axis of evaluation that does not fit; or two arms that are the same.
    """
    seen: dict[str, Settings] = {}
    for seed in sweep.seeds:
        for each in settings:
            trial, config = make_trial(sweep, each, seed)
            if trial.hash in seen:
                raise UserError(
                    f"arms {describe(seen[trial.hash])} and {describe(each)} are the same "
                    "configuration; remove one of the two"
                )
            seen[trial.hash] = each
            yield trial, config


def make_trial(sweep: Sweep, settings: Settings, seed: int) -> tuple[Trial, Any]:
    """An arm with a seed, and its configuration.

    Raises:
      UserError: as `make_trials`.
    """
    bound = {**sweep.bindings, **settings, "RANDOM_SEED": seed}
    extra = bound.pop(GIN_FILE, None) or []
    extra = [extra] if isinstance(extra, str) else extra
    if not isinstance(extra, list | tuple) or not all(isinstance(each, str) for each in extra):
        raise UserError(f"Sweep: {GIN_FILE} = {extra!r} should be a gin file, or a list of them")
    files = [*sweep.base, *extra]
    bindings = [f"{name}={_literal(value)}" for name, value in bound.items()]
    try:
        config = configuration.build(KINDS[sweep.kind], files, bindings)
    except UserError as error:
        where = f" (arm {describe(settings)})" if settings else ""
        raise UserError(f"{error}{where}") from None
    digest = fingerprint(config)
    experiment, root = config, config.model_dir
    if isinstance(config, Regime):
        experiment = list(regime.runs(config, config.stages[-1]))[-1]
    eval_settings = [_resolve(each, bound) for each in combine(sweep.eval_axes) if each]
    for each in eval_settings:
        _check_evaluation(experiment, each)
    trial = Trial(
        name=f"{_slug(settings)}-s{seed}-{digest[:8]}",
        kind=sweep.kind,
        settings=settings,
        seed=seed,
        hash=digest,
        gin_files=files,
        bindings=bindings,
        eval_settings=eval_settings,
        run_directory=os.path.relpath(experiment.model_dir, root),
        task=experiment.data.mixture_or_task_name,
        steps=experiment.train_steps,
    )
    return trial, config


def fingerprint(config: Any) -> str:
    """SHA-256 of all that a configuration says, but for where it is kept."""
    plain = json.dumps(_without_places(dataclasses.asdict(config)), sort_keys=True, default=str)
    return hashlib.sha256(plain.encode()).hexdigest()


def assignments(settings: Settings) -> list[str]:
    """Settings as `reconstruction.change` takes them."""
    return [f"{name}={value!r}" for name, value in settings.items()]


def describe(settings: Settings) -> str:
    """Settings in a line."""
    return ", ".join(f"{name} = {_short(value)}" for name, value in settings.items()) or "the base"


def check_distribution(owner: str, name: str, distribution: Sequence[Any]) -> None:
    """Check what `Random` and `Search` have for a name.

    Raises:
      UserError: no distribution, or limits that are none.
    """
    kind, *limits = distribution
    if kind not in _DISTRIBUTIONS:
        hint = closest(str(kind), _DISTRIBUTIONS)
        raise UserError(f"{owner}.values: {name}: {kind!r} is no distribution{hint}")
    if kind == "choice":
        valid = len(limits) == 1 and isinstance(limits[0], list | tuple) and bool(limits[0])
        form = "('choice', [a, b, …])"
    else:
        number = int if kind == "integer" else (int, float)
        valid = len(limits) == 2 and all(isinstance(each, number) for each in limits)
        valid = valid and limits[0] < limits[1] and (kind != "log_uniform" or limits[0] > 0)
        form = f"({kind!r}, low, high)"
    if not valid:
        raise UserError(f"{owner}.values: {name}: {distribution!r} should be {form}")


def _exclude(first: Any, second: Any) -> bool:
    """Whether two axes exist under conditions of which only one can hold."""
    conditions = [getattr(axis, "when", {}) for axis in (first, second)]
    shared = conditions[0].keys() & conditions[1].keys()
    return any(conditions[0][name] != conditions[1][name] for name in shared)


def _canonical(name: str) -> str:
    """A name without the modules before its class: gin takes Class.field and module.Class.field."""
    scope, slash, field = name.rpartition("/")
    return scope + slash + ".".join(field.split(".")[-2:])


def _check_values(axis: Any) -> None:
    kind = type(axis).__name__
    if not isinstance(axis.values, Mapping):
        raise UserError(f"{kind}.values = {axis.values!r} should be {{'NAME': [values]}}")
    if not axis.values:
        raise UserError(f"{kind}.values is empty; give {{'NAME': [values]}}")
    for name, values in axis.values.items():
        if isinstance(values, str) or not isinstance(values, Sequence):
            raise UserError(f"{kind}.values: {name} = {values!r} should be a list")
        if not values:
            raise UserError(f"{kind}.values: {name} has no values; give one or more")
        for value in values:
            if not _is_plain(value):
                raise UserError(
                    f"{kind}.values: {name} has {value!r}, which trial.json cannot hold; give "
                    "numbers, strings, True, False, None, and lists and dictionaries of them"
                )
    check_types(axis)


def _is_plain(value: Any) -> bool:
    """Whether a value is the same after JSON, but for tuples, which become lists."""
    if isinstance(value, dict):
        return all(isinstance(name, str) and _is_plain(each) for name, each in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _check_evaluation(experiment: Experiment, settings: Settings) -> None:
    """Check that the checkpoint that a trial will end with can be evaluated so."""
    try:
        changed = change(experiment, assignments(settings))
        if changed.data != experiment.data:
            pipeline.task_names(changed.data)
    except UserError as error:
        raise UserError(f"eval_axes: {error}") from None
    if changed.model.num_params != experiment.model.num_params:
        raise UserError(
            f"eval_axes: with {describe(settings)} the model has {changed.model.num_params:,} "
            f"parameters, and the checkpoint {experiment.model.num_params:,}; make it one of axes"
        )


def _draw(generator: random.Random, distribution: Sequence[Any]) -> Any:
    kind, *limits = distribution
    if kind == "choice":
        return generator.choice(limits[0])
    low, high = limits
    if kind == "integer":
        return generator.randint(low, high)
    if kind == "uniform":
        return generator.uniform(low, high)
    return math.exp(generator.uniform(math.log(low), math.log(high)))


def _ends(distribution: Sequence[Any]) -> list[Any]:
    kind, *limits = distribution
    if kind == "choice":
        return list(limits[0])
    return limits if kind == "integer" else [float(limit) for limit in limits]


def _literal(value: Any) -> str:
    """A value as gin reads it."""
    return value if isinstance(value, str) and value[:1] in ("@", "%") else repr(value)


def _resolve(settings: Settings, bound: Mapping[str, Any]) -> Settings:
    found = {}
    for name, value in settings.items():
        if isinstance(value, str) and value.startswith("%"):
            if value[1:] not in bound:
                raise UserError(
                    f"eval_axes: {name} = {value!r}: no axis or binding of the sweep has "
                    f"{value[1:]!r}{closest(value[1:], bound)}"
                )
            value = bound[value[1:]]
        found[name] = value
    return found


def _without_places(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            str(name): _without_places(each) for name, each in value.items() if name not in _PLACES
        }
    if isinstance(value, list | tuple):
        return [_without_places(each) for each in value]
    # 1 and 1.0 are the same value of a field.
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _short(value: Any) -> str:
    if isinstance(value, str) and value.endswith(".gin"):
        return pathlib.Path(value).stem
    if isinstance(value, str) and "/" in value:
        return "/".join(pathlib.Path(value).parts[-2:])
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _slug(settings: Settings) -> str:
    """Settings as a file's name, cut where they are long: the hash tells them apart."""
    parts = [
        _short(value) if name == GIN_FILE else f"{name.rpartition('.')[2].lower()}={_short(value)}"
        for name, value in settings.items()
    ]
    return re.sub(r"[^\w.=,+-]+", "_", ",".join(parts), flags=re.ASCII)[:80] or "base"
