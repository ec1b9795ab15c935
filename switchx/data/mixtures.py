"""Mixtures: which tasks, at which rates. A declaration, and the law of rates as a function."""

import dataclasses
from collections.abc import Mapping, Sequence

from switchx.data import glue
from switchx.data.instructions import SUFFIX
from switchx.data.tasks import check_name, freeze_strings
from switchx.errors import UserError, check_choice, check_range, check_types, closest

RATES = ("proportional", "capped", "tempered")


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Tasks mixed at the level of examples, by name.

    `rates` is 'proportional' to the number of training examples, 'capped' (the same with each
    number cut off at `maximum`), 'tempered' (capped if there is a `maximum`, then to the power of
    1 / `temperature`), or a mapping from task names to relative rates. A text task counts its
    source texts, not the rows they are cut into. A task of rate 0 is evaluated, not trained on.
    Source: Raffel et al. 2020, section 3.5.2.
    """

    name: str
    tasks: str | Sequence[str]
    rates: str | Mapping[str, int | float] = dataclasses.field(default="proportional", hash=False)
    maximum: int | None = None
    temperature: int | float = 1.0

    def __post_init__(self) -> None:
        """Check types and values, and freeze the list of tasks."""
        check_types(self)
        check_name(self)
        freeze_strings(self, "tasks")
        unique = len(set(self.tasks)) == len(self.tasks)
        check_range(self, "tasks", unique, "task names, none of them twice")
        positive = self.maximum is None or self.maximum > 0
        check_range(self, "maximum", positive, "a positive number")
        check_range(self, "temperature", self.temperature > 0, "a positive number")
        if isinstance(self.rates, Mapping):
            self._check_mapping(self.rates)
        else:
            check_choice(self, "rates", RATES)
        if self.rates == "capped" and self.maximum is None:
            raise UserError("Mixture.rates = 'capped' needs Mixture.maximum")
        if self.maximum is not None and self.rates not in ("capped", "tempered"):
            raise UserError("Mixture.maximum needs Mixture.rates = 'capped' or 'tempered'")
        if self.temperature != 1 and self.rates != "tempered":
            raise UserError("Mixture.temperature needs Mixture.rates = 'tempered'")

    def _check_mapping(self, rates: Mapping[str, int | float]) -> None:
        for name, rate in rates.items():
            if name not in self.tasks:
                hint = closest(str(name), self.tasks)
                raise UserError(f"Mixture.rates names {name!r}, not a task of the mixture{hint}")
            if not _is_rate(rate):
                raise UserError(f"Mixture.rates[{name!r}] = {rate!r} must be a number from 0 on")
        missing = [name for name in self.tasks if name not in rates]
        if missing:
            raise UserError(f"Mixture.rates has no rate for {missing[0]!r}")
        if not sum(rates.values()):
            raise UserError(
                f"Mixture.rates of {self.name!r} sum to zero: nothing is left to train on; give a "
                "task a positive rate"
            )


def mixing_rates(mixture: Mixture, num_examples: Mapping[str, int]) -> dict[str, float]:
    """Share of each task in the mixture, summing to 1, given its number of training examples."""
    if isinstance(mixture.rates, Mapping):
        weights = {name: float(mixture.rates[name]) for name in mixture.tasks}
    else:
        cap: int | float = float("inf")
        if mixture.rates != "proportional" and mixture.maximum is not None:
            cap = mixture.maximum
        power = 1.0 / mixture.temperature if mixture.rates == "tempered" else 1.0
        counts = {name: min(num_examples[name], cap) for name in mixture.tasks}
        # Relative to the largest, so that no temperature is too low.
        most = max(counts.values()) or 1
        weights = {name: (count / most) ** power for name, count in counts.items()}
    total = sum(weights.values())
    if not total:
        raise UserError(f"mixture {mixture.name!r}: no task has a training example")
    return {name: weight / total for name, weight in weights.items()}


def _is_rate(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 <= value < float("inf")


# sotu_period and wn_define are in no mixture: they are kept for measuring transfer.
_TASKS = (
    "wn_supersense",
    "wn_hypernym_nli",
    "wn_syn_ant",
    "wn_reverse_dictionary",
    "inflection",
    "cmudict_g2p",
    "cldr_names",
    "date_iso",
)

EMBEDDED: Mapping[str, Mixture] = {
    mixture.name: mixture
    for mixture in (
        Mixture("embedded_instructions", tuple(f"{name}{SUFFIX}" for name in _TASKS)),
        Mixture("embedded_tasks", _TASKS),
        # Half of the examples are span corruption, so neither half is drowned.
        Mixture(
            "embedded_pretrain_and_tasks",
            ("embedded_span_corruption", *_TASKS),
            rates={
                "embedded_span_corruption": float(len(_TASKS)),
                **dict.fromkeys(_TASKS, 1.0),
            },
        ),
    )
}


def _by_size(name: str, *left_out: str) -> Mixture:
    sizes = {
        task.name: task.num_train
        for task in glue.TASKS.values()
        if task.name.startswith(f"{name}_") and task.name not in left_out
    }
    return Mixture(name, tuple(sizes), rates=sizes)


# WNLI is left out as T5 does: its validation set contradicts its training set.
GLUE = {
    mixture.name: mixture
    for mixture in (_by_size("glue", "glue_wnli_v002"), _by_size("super_glue"))
}
NAMED: Mapping[str, Mixture] = {**EMBEDDED, **GLUE}
