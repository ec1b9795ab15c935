"""Run and sweep directories written by hand, for the tests of reports."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

TASK = "recall"
LAYERS = ("encoder/1", "decoder/1")
VERSIONS = {
    "packages": {"jax": "0.10.2", "numpy": "2.4.6"},
    "python": "3.11.7",
    "git": "abc",
    "devices": ["cpu"],
    "mesh": {"data": 1},
    "command": ["scripts/train.py", "--gin_file=a file.gin"],
}


def train_row(step: int, loss: float | None, **more: Any) -> dict[str, Any]:
    """A row of training: the step takes 0.25 s, but 7 s in the first period."""
    return {
        "step": step,
        "split": "train",
        "loss": loss,
        "cross_entropy": loss,
        "learning_rate": 0.01 / step,
        "tokens_per_second": 1000.0 + step,
        "step_seconds": 7.0 if step == 1 else 0.25,
        "grad_norm": 1.0 + 1 / step,
        **router(step),
        **more,
    }


def eval_row(step: int, cross_entropy: float | None, dropped: float = 0.05, **more: Any) -> dict:
    """A row of an evaluation."""
    return {
        "step": step,
        "split": f"eval/{TASK}",
        "loss": cross_entropy,
        "cross_entropy": cross_entropy,
        "accuracy": 0.4,
        **router(step),
        "dropped_fraction": dropped,
        **more,
    }


def router(step: int) -> dict[str, Any]:
    """What the sparse layers of one row say, another at each step."""
    drift = step / 1000
    load = {layer: [0.5 - drift, 0.3, 0.15 + drift, 0.05] for layer in LAYERS}
    layer = {"dropped_fraction": 0.05 + drift, "router_entropy": 1.2, "router_confidence": 0.4}
    return {
        "dropped_fraction": 0.06 + drift,
        "router_entropy": 1.25 - drift,
        "expert_load": load,
        "by_layer": {name: dict(layer) for name in LAYERS},
    }


def write_run(
    path: pathlib.Path,
    *,
    final: float = 2.0,
    dropped: float = 0.05,
    steps: Sequence[int] = (1, 10, 20),
    config: Mapping[str, Any] | None = None,
    done: bool = True,
) -> pathlib.Path:
    """A run that ends at `final`, with evaluations at all steps but the first."""
    path.mkdir(parents=True)
    rows = []
    for step in steps:
        value = final * (1 + (steps[-1] - step) / 20)
        rows.append(train_row(step, value + 0.125))
        if step > 1:
            rows.append(eval_row(step, value, dropped))
    write_rows(path / "metrics.jsonl", rows)
    own = {"data": {"mixture_or_task_name": TASK}, "seed": 0, "model_dir": str(path)}
    (path / "config.json").write_text(json.dumps(own | dict(config or {})))
    (path / "versions.json").write_text(json.dumps(VERSIONS))
    write_rows(
        path / "samples.jsonl",
        [{"step": steps[-1], "inputs": "key 17", "target": "a b", "prediction": "a <c>"}],
    )
    if done:
        (path / "DONE").write_text("")
    return path


def write_rows(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_analysis(path: pathlib.Path) -> None:
    """What router_analysis leaves of a run, for one layer with two experts."""
    folder = path / "router_analysis" / "20"
    folder.mkdir(parents=True)
    layer = {
        "name": "encoder/1",
        "num_experts": 2,
        "load": [0.75, 0.25],
        "dropped_fraction": 0.125,
        "entropy": 0.5,
        "confidence": 0.875,
        "confidence_histogram": {"edges": [0.5, 0.75, 1.0], "counts": [3, 9]},
        "top_tokens": [[{"token": "▁the", "count": 12, "share": 0.93}], []],
        "mutual_information": {"token": 0.31, "position": 0.07, "domain": None},
    }
    summary = {"step": 20, "source": "a.txt", "tokens": 4321, "layers": [layer]}
    (folder / "summary.json").write_text(json.dumps(summary))


def write_sweep(
    path: pathlib.Path,
    values: Mapping[tuple[Any, int], float],
    *,
    states: Mapping[tuple[Any, int], str] | None = None,
    axis: str = "CAPACITY_FACTOR",
    evaluations: Mapping[tuple[Any, int, Any], float] | None = None,
) -> pathlib.Path:
    """A sweep over one axis: (level, seed) → the metric at the end, which is lowest at best.

    Args:
      path: to write to.
      values: the metric; a trial without one has no directory.
      states: of the trials that are not done.
      axis: its name.
      evaluations: (level, seed, level of EVAL_CAPACITY_FACTOR) → the metric.
    """
    path.mkdir(parents=True)
    states = states or {}
    trials = []
    for level, seed in [*values, *(each for each in states if each not in values)]:
        name = f"{axis}={level}-s{seed}-0a1b2c3d"
        entry = {"name": name, "settings": {axis: level}, "seed": seed, "hash": "0a1b2c3d"}
        trials.append(entry)
        state = states.get((level, seed), "done")
        if (level, seed) not in values:
            continue
        run = write_run(
            path / "trials" / name,
            final=values[level, seed],
            dropped=0.1 / (level if isinstance(level, int | float) and level else 1),
            config={"capacity_factor": level, "seed": seed},
            done=state == "done",
        )
        error = "the loss is not finite" if state == "diverged" else ""
        more = {"argv": ["x"], "gin": "", "attempts": 1, "error": error, "seconds": 30.0 + seed}
        (run / "trial.json").write_text(json.dumps({**entry, "state": state, **more}))
        rows = [
            eval_row(20, value, 0.01 * other, split=f"validation/{TASK}")
            | {"settings": {"EVAL_CAPACITY_FACTOR": other}}
            for (at, of, other), value in (evaluations or {}).items()
            if (at, of) == (level, seed)
        ]
        if rows:
            write_rows(run / "evaluations.jsonl", rows)
    plan = {
        "name": path.name,
        "gin_file": "gin_configs/sweeps/a.gin",
        "axes": [axis],
        "eval_axes": ["EVAL_CAPACITY_FACTOR"] if evaluations else [],
        "seeds": sorted({seed for _, seed in [*values, *states]}),
        "metric": "cross_entropy",
        "direction": "lowest",
        "trials": trials,
    }
    (path / "sweep.json").write_text(json.dumps(plan))
    return path
