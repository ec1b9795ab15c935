"""The rows and tables of finetuning_regimes.md, from the runs that finetuning_regimes.sh made.

python docs/experiments/finetuning_regimes.py runs/finetuning_regimes > rows.jsonl
python docs/experiments/finetuning_regimes.py docs/experiments/finetuning_regimes.jsonl
"""

import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

from switchx.report.statistics import estimate, paired_differences

MODELS = {"switch_tiny": "sparse", "t5_tiny": "dense"}
METRICS = {
    "sotu_period": ("cross_entropy", "decoded_accuracy"),
    "wn_define": ("cross_entropy", "decoded_rouge_l", "decoded_chrf"),
    "wn_supersense": ("cross_entropy", "decoded_accuracy"),
}
# Regime → folder of its result, for a task.
REGIMES = {
    "instructions alone": "combined/instruction",
    "single": "single/single/{}",
    "longer": "longer/single/{}",
    "combined": "combined/single/{}",
}
Rows = list[dict[str, Any]]


def collect(root: pathlib.Path) -> Iterator[dict[str, Any]]:
    """What the test split said of every run: a row a run and task."""
    for model in MODELS:
        for folder in sorted((root / model).glob("seed_*")):
            for regime, place in REGIMES.items():
                for task in sorted({*METRICS, *others(folder)}):
                    path = folder / place.format(task) / "metrics.jsonl"
                    lines = path.read_text().splitlines() if path.exists() else []
                    for row in map(json.loads, lines):
                        if row["split"] == f"test/{task}":
                            yield {
                                "model": model,
                                "regime": regime,
                                "task": task,
                                "seed": int(folder.name.removeprefix("seed_")),
                                "run": str(path.parent.relative_to(root)),
                                **{
                                    name: value
                                    for name, value in row.items()
                                    if name in ("step", "cross_entropy", "dropped_fraction")
                                    or name.startswith("decoded_")
                                },
                            }


def others(folder: pathlib.Path) -> set[str]:
    """The tasks that the instruction stage was tested on."""
    path = folder / "combined/instruction/metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    splits = (json.loads(line)["split"] for line in lines)
    return {split.removeprefix("test/") for split in splits if split.startswith("test/")}


def values(rows: Rows, model: str, regime: str, task: str, metric: str) -> dict[int, float]:
    """A metric by seed."""
    wanted = {"model": model, "regime": regime, "task": task}
    fitting = [row for row in rows if row.items() >= wanted.items() and metric in row]
    return {row["seed"]: row[metric] for row in fitting}


def show(numbers: list[float]) -> str:
    """Mean ± half its 95 % interval, and of how many."""
    found = estimate(numbers)
    if found is None:
        return ""
    half = "" if found.high is None else f" ± {found.high - found.mean:.3f}"
    return f"{found.mean:.3f}{half} ({found.n})"


def print_tables(rows: Rows) -> None:
    """Means by regime, and differences paired by seed."""
    for task, metrics in METRICS.items():
        heads = [f"{metric}, {kind}" for metric in metrics for kind in MODELS.values()]
        print(f"\n{task}\n\n| regime | {' | '.join(heads)} |{chr(10)}|{'---|' * (1 + len(heads))}")
        for regime in REGIMES:
            cells = [
                show(list(values(rows, model, regime, task, metric).values()))
                for metric in metrics
                for model in MODELS
            ]
            if any(cells):
                print(f"| {regime} | {' | '.join(cells)} |")
        heads = [*MODELS.values(), "sparse - dense"]
        print(f"\n| {task}: combined minus | metric | {' | '.join(heads)} |\n|{'---|' * 5}")
        for other in ("single", "longer"):
            for metric in metrics:
                gains = [
                    paired_differences(
                        values(rows, model, "combined", task, metric),
                        values(rows, model, other, task, metric),
                    )
                    for model in MODELS
                ]
                both = paired_differences(*gains)
                if both:
                    cells = [show(list(each.values())) for each in (*gains, both)]
                    print(f"| {other} | {metric} | {' | '.join(cells)} |")


if __name__ == "__main__":
    source = pathlib.Path(sys.argv[1])
    if source.is_dir():
        for found in collect(source):
            print(json.dumps(found))
    else:
        print_tables([json.loads(line) for line in source.read_text().splitlines()])
