"""A sweep from its file to its results: what it would cost, its trials, and their summary."""

import argparse
import ast
import collections
import json
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from rich.console import Console
from rich.table import Column, Table

from switchx import command_line, configuration, regime
from switchx.errors import UserError
from switchx.regime import Regime
from switchx.report.statistics import estimate
from switchx.research import executors, topologies
from switchx.research.planning import Planner
from switchx.research.scheduler import FINAL, Scheduler
from switchx.research.search import MEND, Proposals
from switchx.research.sweep import Sweep, Trial, arms, describe, make_trial, make_trials
from switchx.run_directory import RunDirectory


def flag_parser(description: str) -> argparse.ArgumentParser:
    """A parser of what scripts/sweep.py takes; `run` does what they say."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="--gin.NAME=VALUE binds a macro or field of the sweep's file (SEEDS, "
        "Sweep.max_arms, …).",
        allow_abbrev=False,
    )
    parser.add_argument("gin_files", nargs="+", metavar="FILE", help="of the sweep; later ones win")
    parser.add_argument(
        "--dry_run", action="store_true", help="list the trials and what they cost; run none"
    )
    parser.add_argument(
        "--max_parallel", type=_positive, metavar="N", help="trials at a time; default: as there is"
    )
    parser.add_argument(
        "--max_attempts", type=_positive, default=3, metavar="N", help="of a trial; default: 3"
    )
    parser.add_argument(
        "--executor",
        choices=executors.NAMES,
        default="local",
        help="local (default): processes of this machine; ray; slurm; submitit_local: slurm's way "
        "without SLURM",
    )
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of the executor's jobs, as it names them: num_gpus=1 (ray), slurm_partition=gpu",
    )
    parser.add_argument(
        "--gin_search_paths",
        default="",
        metavar="DIRS",
        help="comma-separated folders in which the sweep's files are looked for, not its base's",
    )
    return parser


def run(parser: argparse.ArgumentParser) -> None:
    """Do what the command line says.

    Raises:
      UserError: anything mistaken in the sweep, or trials that failed in the end.
      Interrupted: by a signal; trials are saved.
    """
    flags, changes = command_line.parse_changes(parser)
    # The trials have the accelerators.
    if not flags.dry_run:
        jax.config.update("jax_platforms", "cpu")
    paths = [path for path in flags.gin_search_paths.split(",") if path]
    sweep = configuration.build(Sweep, flags.gin_files, changes, paths)
    sweep_gin = configuration.operative_config()
    options = _options(flags.option)
    found = list(make_trials(sweep, arms(sweep))) if sweep.search is None else []
    for settings in sweep.search.ends() if sweep.search else ():
        make_trial(sweep, settings, sweep.seeds[0])
    if flags.dry_run:
        Console(width=None).print(plan(sweep, found))
        return
    folder = pathlib.Path(sweep.model_dir)
    if (folder / "config.json").exists():
        raise UserError(
            f"MODEL_DIR = {sweep.model_dir!r} holds a run; a sweep needs a folder of its own: "
            "choose another"
        )
    directory = RunDirectory(sweep.model_dir)
    executor = executors.make(flags.executor, flags.max_parallel, folder, options)
    try:
        scheduler = Scheduler(sweep, executor, max_attempts=flags.max_attempts)
        for trial, _ in found:
            scheduler.add(trial)
        study = _Study(sweep, scheduler, directory, flags.gin_files)
        directory.write_text("sweep.gin", sweep_gin)
        study.write()
        if sweep.search is None:
            print(f"{len(found)} trials in {folder}, {executor.max_parallel} at a time", flush=True)
            scheduler.run()
        else:
            scheduler.run(_Searching(sweep, scheduler, study, executor.max_parallel).advance)
    finally:
        executor.close()
        directory.close()
    Console().print(summary(sweep, scheduler))
    print(f"report: python scripts/report.py {folder} --out {folder / 'report.html'}")
    failed = [trial for trial in scheduler.trials.values() if trial.state not in FINAL]
    if failed:
        raise UserError(
            f"{len(failed)} of {len(scheduler.trials)} trials failed; the first: {failed[0].name}: "
            f"{failed[0].error} ({folder / 'logs' / failed[0].name}.log)"
        )


class _Study:
    """sweep.json, which tells readers what the folders are."""

    def __init__(
        self, sweep: Sweep, scheduler: Scheduler, directory: RunDirectory, files: Sequence[str]
    ):
        self._sweep, self._scheduler = sweep, scheduler
        self._directory, self._files = directory, list(files)

    def write(self) -> None:
        """Write what is known by now."""
        sweep = self._sweep
        self._directory.write_json(
            "sweep.json",
            {
                "name": pathlib.Path(self._files[0]).stem,
                "gin_file": self._files[0],
                "axes": sweep.names,
                "eval_axes": list(
                    dict.fromkeys(name for axis in sweep.eval_axes for name in axis.values)
                ),
                "seeds": list(sweep.seeds),
                "metric": sweep.metric,
                "direction": sweep.criterion.best,
                "trials": [
                    {name: getattr(trial, name) for name in ("name", "settings", "seed", "hash")}
                    for trial in self._scheduler.trials.values()
                ],
            },
        )


class _Searching:
    """Between looks at the jobs: results to Optuna, and its next proposals to the scheduler."""

    def __init__(self, sweep: Sweep, scheduler: Scheduler, study: _Study, max_parallel: int):
        self._sweep, self._scheduler, self._study = sweep, scheduler, study
        self._proposals = Proposals(sweep)
        self._open: dict[int, list[Trial]] = {}
        self._reported: dict[int, int] = {}
        self._width = max(1, max_parallel // len(sweep.seeds))
        for settings in self._proposals.closed:
            same = settings.keys() == set(sweep.names)
            again = make_trials(sweep, [settings]) if same else ()
            if not same or not all([scheduler.add_ended(trial) for trial, _ in again]):
                raise UserError(
                    f"the search in {scheduler.folder} has results of another configuration, such "
                    f"as {describe(settings)}; {MEND}"
                )

    def advance(self) -> None:
        """Look once."""
        self._look_at_all()
        while len(self._open) < self._width and (proposal := self._proposals.ask()):
            number, settings = proposal
            trials = [trial for trial, _ in make_trials(self._sweep, [settings])]
            self._open[number] = trials
            for trial in trials:
                self._scheduler.add(trial)
            self._study.write()
            # An earlier process may have ended what is proposed again.
            self._look_at_all()

    def _look_at_all(self) -> None:
        for number, trials in list(self._open.items()):
            self._look(number, [self._scheduler.trials[trial.name] for trial in trials])

    def _look(self, number: int, trials: list[Trial]) -> None:
        seen = [self._scheduler.evaluations(trial.name) for trial in trials]
        shared = sorted(set.intersection(*map(set, seen)))
        means = {step: statistics.fmean(values[step] for values in seen) for step in shared}
        for step in shared:
            if step > self._reported.get(number, -1):
                self._reported[number] = step
                if self._proposals.report(number, step, means[step]):
                    for trial in trials:
                        self._scheduler.prune(trial.name)
        if self._scheduler.ended(trials):
            done = all(trial.state == "done" for trial in trials) and bool(means)
            self._proposals.tell(number, means[shared[-1]] if done else None)
            del self._open[number]


def plan(sweep: Sweep, found: Sequence[tuple[Trial, Any]]) -> Table:
    """The trials of a sweep with FLOPs, memory and hours on this machine's devices."""
    table = Table(_whole("trial"), "steps", "FLOPs", "memory", "hours")
    if sweep.search is not None:
        table.title = f"{sweep.search.num_arms} arms of a search, {len(sweep.seeds)} seed(s) each"
        return table
    topology, known, total = topologies.parse("local"), {}, 0.0
    for trial, config in found:
        key = json.dumps(trial.settings)
        if key not in known:
            known[key] = _cost(config, topology)
        steps, flops, memory, seconds = known[key]
        total += seconds
        table.add_row(
            trial.name,
            f"{steps:,}",
            f"{flops:.3g}",
            f"{memory / 2**30:.2f} GiB",
            f"{seconds / 3600:.3f}",
        )
    table.title = (
        f"{len(found)} trials, {total / 3600:.2f} hours one after the other, by the limits of "
        f"{topology.num_devices} x {topology.accelerator.kind}: expect more"
    )
    return table


def _cost(config: Any, topology: topologies.Topology) -> tuple[int, float, int, float]:
    """Steps, FLOPs, bytes a device, seconds; of a regime, of all its runs."""
    experiments = [config]
    if isinstance(config, Regime):
        experiments = [each for stage in config.stages for each in regime.runs(config, stage)]
    steps, flops, memory, seconds = 0, 0.0, 0, 0.0
    for each in experiments:
        planned = Planner(each).analytic(topology, each.mesh, largest_batch=False)
        steps += each.train_steps
        flops += each.train_flops * each.train_steps
        memory = max(memory, planned.peak)
        seconds += planned.seconds * each.train_steps
    return steps, flops, memory, seconds


def summary(sweep: Sweep, scheduler: Scheduler) -> Table:
    """The last evaluation of every arm: mean over seeds and its 95 % interval by Student's t."""
    found: dict[str, list[float]] = collections.defaultdict(list)
    states: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    names: dict[str, str] = {}
    for name, trial in scheduler.trials.items():
        # Not by their description, which rounds.
        arm = json.dumps(trial.settings)
        names[arm] = describe(trial.settings)
        states[arm][trial.state] += 1
        evaluations = scheduler.evaluations(name)
        if trial.state == "done" and evaluations:
            found[arm].append(evaluations[max(evaluations)])
    table = Table(_whole("arm"), sweep.metric, "95 %", "seeds", "trials")
    for arm, counts in states.items():
        mean = estimate(found[arm])
        table.add_row(
            names[arm],
            f"{mean.mean:.4f}" if mean else "",
            f"± {mean.high - mean.mean:.4f}" if mean and mean.high is not None else "",
            str(len(found[arm])),
            ", ".join(f"{count} {state}" for state, count in sorted(counts.items())),
        )
    return table


def _whole(header: str) -> Column:
    """A column that is broken over lines rather than cut off: names end in a hash."""
    return Column(header, overflow="fold")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} should be at least 1")
    return int(text)


def _options(given: Sequence[str]) -> Mapping[str, Any]:
    found = {}
    for each in given:
        name, separator, text = each.partition("=")
        if not separator or not name:
            raise UserError(f"--option={each}: write --option NAME=VALUE")
        try:
            found[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            found[name] = text
    return found
