"""Settings that Optuna proposes, one after the other, from the results of those before."""

import pathlib
from collections.abc import Mapping
from typing import Any

from switchx.errors import UserError
from switchx.research.sweep import Settings, Sweep

MEND = "choose another MODEL_DIR and Search.storage, or remove that search"


class Proposals:
    """Optuna's study behind a sweep's `Search`; what it knows lies in its storage.

    Proposals that an earlier process left without a result come first, with the same values: their
    trials go on.

    Attributes:
      closed: settings of the proposals that were closed before.
    """

    def __init__(self, sweep: Sweep):
        """Open the study, or begin it.

        Raises:
          UserError: Optuna is not installed, or its storage cannot be opened or has a search by
            another metric.
        """
        try:
            import optuna
        except ImportError:
            raise UserError("Sweep.search needs Optuna: pip install 'switchx[optuna]'") from None
        search = sweep.search
        assert search is not None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._states = optuna.trial.TrialState
        self._num_arms = search.num_arms
        self._spaces = {name: _space(optuna, each) for name, each in search.values.items()}
        folder = pathlib.Path(sweep.model_dir).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        samplers: Mapping[str, Any] = {
            "tpe": optuna.samplers.TPESampler,
            "cmaes": optuna.samplers.CmaEsSampler,
            "random": optuna.samplers.RandomSampler,
        }
        try:
            self._study = optuna.create_study(
                study_name=folder.name,
                storage=search.storage or f"sqlite:///{folder / 'search.sqlite'}",
                pruner=optuna.pruners.MedianPruner()
                if search.prune
                else optuna.pruners.NopPruner(),
                direction="minimize" if sweep.criterion.best == "lowest" else "maximize",
                load_if_exists=True,
            )
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"Search.storage cannot be opened: {reason}") from None
        there = self._study.user_attrs.get("metric", sweep.metric)
        if there != sweep.metric:
            raise UserError(
                f"Sweep.metric = {sweep.metric!r}: the search in {folder} is by {there!r}; {MEND}"
            )
        self._study.set_user_attr("metric", sweep.metric)
        if (self._study.direction.name == "MINIMIZE") != (sweep.criterion.best == "lowest"):
            raise UserError(f"Sweep.direction: the search in {folder} has the other one; {MEND}")
        before = self._study.get_trials()
        # A process that goes on makes other draws than those that were made already.
        self._study.sampler = samplers[search.sampler](seed=search.seed + len(before))
        for left in before:
            if left.state == self._states.RUNNING:
                self._study.tell(left.number, state=self._states.FAIL)
                self._study.enqueue_trial(left.params)
        closed = (self._states.COMPLETE, self._states.PRUNED)
        self.closed: list[Settings] = [trial.params for trial in before if trial.state in closed]
        self._asked = len(self.closed)
        self._open: dict[int, Any] = {}

    def ask(self) -> tuple[int, Settings] | None:
        """The next proposal and its number; None when there were enough.

        Raises:
          UserError: choices that are not those of proposals before.
        """
        if self._asked >= self._num_arms:
            return None
        self._asked += 1
        try:
            trial = self._study.ask(self._spaces)
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"Search.values differ from those before: {reason}; {MEND}") from None
        self._open[trial.number] = trial
        return trial.number, {name: trial.params[name] for name in self._spaces}

    def report(self, number: int, step: int, value: float) -> bool:
        """Note an evaluation of a proposal under way; returns whether it is to be pruned."""
        self._open[number].report(value, step)
        return self._open[number].should_prune()

    def tell(self, number: int, value: float | None) -> None:
        """Close a proposal: its result, or None where it was pruned, diverged or failed."""
        state = self._states.COMPLETE if value is not None else self._states.PRUNED
        self._study.tell(self._open.pop(number), value, state=state)


def _space(optuna: Any, distribution: Any) -> Any:
    kind, *limits = distribution
    if kind == "choice":
        return optuna.distributions.CategoricalDistribution(limits[0])
    low, high = limits
    if kind == "integer":
        return optuna.distributions.IntDistribution(low, high)
    return optuna.distributions.FloatDistribution(low, high, log=kind == "log_uniform")
