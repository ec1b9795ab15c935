"""What a report shows of runs: one in full, or several beside each other."""

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from switchx.report import figures
from switchx.report.figures import Axis, Figure
from switchx.report.page import (
    Block,
    Chapter,
    Examples,
    Figures,
    Folded,
    Listing,
    Section,
    Text,
    anchor,
)
from switchx.report.runs import Run, flatten, metric_value, shares
from switchx.report.tables import Table, duration, number
from switchx.training.selection import Criterion, numbers

# States of runs whose curves end in a cross.
ENDED_BADLY = ("diverged", "failed", "pruned", "stopped")
AXES = {
    "loss": Axis("loss, nats per target token"),
    "cross_entropy": Axis("cross-entropy, nats per target token"),
    "perplexity": Axis("perplexity"),
    "accuracy": Axis("accuracy, % of target tokens", "~%"),
    "dropped_fraction": Axis("dropped, % of expert choices", "~%", zero=True),
    "router_entropy": Axis("router entropy, nats per token"),
    "router_confidence": Axis("router confidence, mean largest probability"),
    "learning_rate": Axis("learning rate", ".2~g", zero=True),
    "tokens_per_second": Axis("throughput, tokens per second", "~s", zero=True),
    "step_seconds": Axis("step time, seconds", zero=True),
    "grad_norm": Axis("gradient norm"),
    "load_balance_loss": Axis("load-balance loss, summed over layers"),
    "router_z_loss": Axis("router z-loss, summed over layers"),
}
# Of how many runs on one page each is drawn layer by layer.
MOST_BY_LAYER = 4
Named = Mapping[str, Run]


def axis(metric: str) -> Axis:
    """How a metric is written on an axis."""
    return AXES.get(metric, Axis(metric.replace("_", " ")))


def heading(metric: str) -> str:
    """How a metric is written at the head of a chart: as on an axis, without its unit."""
    title = axis(metric).title.partition(",")[0]
    return title[0].upper() + title[1:]


def chapter(
    runs: Sequence[Run], metric: Criterion, *, split: str | None, base: Run | None
) -> Chapter:
    """Everything about one run, or several beside each other.

    Args:
      runs: in the order of the report.
      metric: by which evaluations are compared.
      split: evaluations that the metric is taken from; None for those of the task.
      base: whose configuration the others are compared with; None for the first of several.
    """
    named = names(runs)
    one = len(runs) == 1
    counts: dict[str, int] = {}
    for run in runs:
        counts[run.state] = counts.get(run.state, 0) + 1
    sections = [
        Section("Runs", [runs_table(named, metric, split)]),
        Section("Loss", losses(named, metric, split)),
        Section("Learning rate and throughput", speeds(named)),
        Section("Dropped tokens", dropped(named)),
        Section("Expert load", loads(named)),
        Section("Router entropy and confidence", certainty(named)),
        Section("What the experts specialise in", specialisation(named)),
        Section("Samples", samples(named)),
        Section("Configuration", configuration(named, base)),
        Section("Versions and commands", provenance(named)),
    ]
    problems = [f"{run.path}: {problem}" for run in runs for problem in run.problems]
    return Chapter(
        str(runs[0].path) if one else f"{len(runs)} runs",
        summary(named, metric, split),
        counts,
        problems,
        sections,
    )


def names(runs: Sequence[Run]) -> dict[str, Run]:
    """Runs by the shortest ends of their paths that tell them apart."""
    paths = [run.path.parts for run in runs]
    depth = next(
        (
            depth
            for depth in range(1, max(map(len, paths)) + 1)
            if len({path[-depth:] for path in paths}) == len(paths)
        ),
        None,
    )
    if depth is None:  # a directory given twice
        return {str(run.path): run for run in runs}
    return {"/".join(path[-depth:]): run for path, run in zip(paths, runs, strict=True)}


def main_split(runs: Sequence[Run], metric: str, wanted: str | None = None) -> str | None:
    """The split whose metric is reported: `wanted`, or the evaluation of the task that is trained
    on, or the first that has the metric, "train" if no evaluation has it; None if nothing has."""
    having = dict.fromkeys(
        row["split"] for run in runs for row in run.rows if metric_value(row, metric) is not None
    )
    own = [f"eval/{run.task}" for run in runs]
    order = [wanted, *own, *(split for split in having if split != "train"), "train"]
    return next((split for split in order if split in having), None)


def summary(runs: Named, metric: Criterion, split: str | None = None) -> list[str]:
    """Sentences: how far each run came, its last and its best evaluation, what went wrong."""
    lines = []
    split = main_split(list(runs.values()), metric.metric, split)
    for name, run in runs.items():
        reached = (
            f"{name}: {run.state} at step {run.last_step:,}" if run.rows else f"{name}: {run.state}"
        )
        if run.training_seconds is not None:
            reached += (
                f", {duration(run.training_seconds)} of training at "
                f"{duration(run.step_seconds or 0)} a step"
            )
        points = [(s, v) for s, v in run.curve(metric.metric, split or "") if v is not None]
        if points and split:
            sign = 1 if metric.best == "lowest" else -1
            best = min(points, key=lambda point: sign * point[1])
            reached += (
                f"; {metric.metric} on {split} {number(points[-1][1])} at step {points[-1][0]:,}"
            )
            if best != points[-1]:
                reached += f", best {number(best[1])} at step {best[0]:,}"
        elif run.rows:
            reached += f"; no evaluation with {metric.metric} yet"
        else:
            reached += "; no metrics yet"
        lines.append(reached + ".")
    if len(lines) > 8:
        lines = [*lines[:8], f"… and {len(lines) - 8} more: see the table."]
    bad = [name for name, run in runs.items() if run.state in ("diverged", "failed")]
    if bad:
        lines.append(f"Diverged or failed: {', '.join(bad)}. Their curves end in a cross.")
    return lines


def runs_table(runs: Named, metric: Criterion, split: str | None = None) -> Table:
    """Last numbers of each run."""
    split = main_split(list(runs.values()), metric.metric, split) or "train"
    rows = []
    for name, run in runs.items():
        last = numbers(run.last(split) or {})
        rows.append(
            (
                name,
                run.state,
                run.last_step if run.rows else None,
                last.get(metric.metric),
                int(last["step"]) if last else None,
                last.get("dropped_fraction"),
                run.step_seconds,
                run.training_seconds,
                _devices(run),
                str(run.path),
            )
        )
    columns = (
        "run",
        "state",
        "last step",
        f"{metric.metric} ({split})",
        "at step",
        "dropped fraction",
        "step time (s)",
        "training time (s)",
        "devices",
        "run directory",
    )
    caption = (
        f"Last row of {split} in each run's metrics.jsonl. Step time is the median of the logged "
        "periods without the first, which compiles; training time is step time × steps."
    )
    return Table("runs", caption, columns, rows, state_column=1)


def losses(runs: Named, metric: Criterion, split: str | None = None) -> list[Block]:
    """Curves of the loss, of the metric and of what the router adds."""
    found = [
        curve_figure(runs, "loss", split=split),
        curve_figure(runs, "cross_entropy", split=split),
    ]
    if metric.metric not in ("loss", "cross_entropy"):
        found.append(curve_figure(runs, metric.metric, split=split))
    found += [
        curve_figure(runs, name)
        for name in ("accuracy", "load_balance_loss", "router_z_loss", "grad_norm")
        if name != metric.metric
    ]
    return _shown(found, "No losses in metrics.jsonl yet.")


def speeds(runs: Named) -> list[Block]:
    """Learning rate, throughput and step time."""
    found = [
        curve_figure(runs, name) for name in ("learning_rate", "tokens_per_second", "step_seconds")
    ]
    return _shown(found, "No training rows in metrics.jsonl yet.")


def dropped(runs: Named) -> list[Block]:
    """Dropped choices over time: in all, and by layer."""
    found = [curve_figure(runs, "dropped_fraction"), *by_layer(runs, "dropped_fraction")]
    return _shown(found, _DENSE)


def certainty(runs: Named) -> list[Block]:
    """Entropy of the router's probabilities, and how large the largest is, by layer."""
    found = [
        curve_figure(runs, "router_entropy"),
        *by_layer(runs, "router_entropy"),
        *by_layer(runs, "router_confidence"),
    ]
    return _shown(found, _DENSE)


def curve_figure(
    runs: Named,
    metric: str,
    *,
    lines: Sequence[str] = ("train", "evaluation"),
    series: Mapping[str, str] | None = None,
    ordered: Sequence[str] | None = None,
    split: str | None = None,
) -> Figure | None:
    """A metric over time for every run; None where no row has it.

    Args:
      runs: by name.
      metric: of the rows.
      lines: which of training's batches and evaluations are drawn.
      series: name of a run → what its colour stands for; without it each run has its own.
      ordered: the series, if they have an order.
      split: of the evaluations; None for those of the task.
    """
    rows: list[dict[str, Any]] = []
    short = False
    for name, run in runs.items():
        for line in lines:
            source = "train" if line == "train" else main_split([run], metric, split)
            if source is None or (source == "train" and line != "train"):
                continue
            points = run.curve(metric, source)
            kept = figures.thinned(points)
            short |= len(kept) < len(points)
            own = {"series": (series or {}).get(name, name), "line": line, "run": str(run.path)}
            rows += [{**own, "step": step, "value": value, "end": None} for step, value in kept]
        finite = [row for row in rows if row["run"] == str(run.path) and row["value"] is not None]
        if finite and run.state in ENDED_BADLY:
            max(finite, key=lambda row: row["step"])["end"] = run.state
    if not any(row["value"] is not None for row in rows):
        return None
    captions = []
    if len({row["line"] for row in rows}) > 1:
        captions.append("Dashed: batches of training. Solid: evaluations.")
    if any(row["end"] for row in rows):
        captions.append("A cross is the last finite value of a run that did not end well.")
    if any(row["value"] is None for row in rows):
        captions.append("Gaps are values that were not finite.")
    if short:
        captions.append(f"Longer curves are thinned to {figures.MOST_POINTS} points.")
    title = heading(metric)
    if len(lines) == 1:
        title += " of training's batches" if lines[0] == "train" else " of evaluations"
    return figures.curves(title, rows, axis(metric), ordered=ordered, caption=" ".join(captions))


def by_layer(runs: Named, metric: str) -> list[Figure]:
    """A router statistic of each layer over time, one figure a run."""
    found = []
    for name, run in list(runs.items())[:MOST_BY_LAYER]:
        rows = []
        for row in _chosen(run):
            layers = row.get("by_layer")
            for layer, values in (layers if isinstance(layers, dict) else {}).items():
                value = numbers(values).get(metric) if isinstance(values, dict) else None
                rows.append(
                    {
                        "step": row["step"],
                        "value": value,
                        "series": layer,
                        "line": "evaluation",
                        "run": str(run.path),
                        "end": None,
                    }
                )
        if any(row["value"] is not None for row in rows):
            title = f"{heading(metric)} by layer" + (f": {name}" if len(runs) > 1 else "")
            layers = run.layers() or None
            found.append(
                figures.curves(title, rows, axis(metric), ordered=layers, caption=_source(run))
            )
    return found


def loads(runs: Named) -> list[Block]:
    """Heat maps of expert load over time, one for each layer."""
    blocks: list[Block] = [
        Text(
            "The share of tokens that asked for each expert, in fair shares: 1 is 1/E of the "
            "tokens, the neutral colour; 0 is an expert that nobody asks for."
        )
    ]
    shown = False
    for name, run in list(runs.items())[:MOST_BY_LAYER]:
        found = load_figures(run)
        if found:
            shown = True
            blocks += [Text(f"{name}. {_source(run)}"), Figures(found)]
    if not shown:
        return [Text(_DENSE, notice=True)]
    left = len(runs) - MOST_BY_LAYER
    if left > 0:
        blocks.append(
            Text(f"{left} more run(s): a report of each of them alone has its heat maps.")
        )
    rows = [
        (name, layer, expert, share, share * len(load), row["step"], row["split"], str(run.path))
        for name, run in runs.items()
        for row in _chosen(run)[-1:]
        for layer, load in _layer_loads(row, run.layers())
        for expert, share in enumerate(load)
    ]
    columns = (
        "run",
        "layer",
        "expert",
        "share of tokens",
        "fair shares",
        "step",
        "split",
        "run directory",
    )
    table = Table("expert_load", "Expert load at the last evaluation.", columns, rows)
    return [*blocks, Folded("Expert load at the end, as a table", [table])]


def load_figures(run: Run) -> list[Figure]:
    """The heat map of each layer's expert load over time."""
    rows, layers = _chosen(run), run.layers()
    found: dict[str, list[dict[str, Any]]] = {layer: [] for layer in layers}
    for row in rows:
        for layer, load in _layer_loads(row, layers):
            found[layer].append({"y": row["step"], "load": load, "run": str(run.path)})
    cells = sum(len(points[0]["load"]) for points in found.values() if points)
    columns = max(8, min(60, figures.MOST_CELLS // max(cells, 1)))
    return [
        figures.load_map(
            layer,
            kept,
            y_title="training step",
            order=[row["y"] for row in kept],
        )
        for layer, points in found.items()
        if (kept := figures.thinned(points, columns))
    ]


def final_loads(runs: Named, captions: str) -> list[Figure]:
    """Heat maps of the expert load at the end, a run in each line, one for each layer."""
    layers = list(dict.fromkeys(layer for run in runs.values() for layer in run.layers()))
    found = []
    for layer in layers:
        rows = [
            {"y": name, "load": load, "run": str(run.path)}
            for name, run in runs.items()
            for row in _chosen(run)[-1:]
            for where, load in _layer_loads(row, [layer])
        ]
        if rows:
            found.append(
                figures.load_map(layer, rows, y_title=captions, order=[row["y"] for row in rows])
            )
    return found


def specialisation(runs: Named) -> list[Block]:
    """What router_analysis found: the commonest tokens of each expert, and what tells of it."""
    blocks: list[Block] = []
    for name, run in runs.items():
        if run.analysis is None:
            command = f"python scripts/analyze_router.py {shlex.quote(str(run.path))}"
            blocks.append(Text(f"{name} has not been analysed: {command}", notice=True))
            continue
        blocks += _analysis(name, run, run.analysis)
    return blocks


def samples(runs: Named) -> list[Block]:
    """Decoded examples of the last step, and of earlier ones."""
    blocks: list[Block] = []
    for name, run in list(runs.items())[:MOST_BY_LAYER]:
        steps = sorted({row["step"] for row in run.samples}, reverse=True)
        if not steps:
            blocks.append(Text(f"{name} has no samples.jsonl with examples.", notice=True))
        for step in steps[:6]:
            rows = [row for row in run.samples if row["step"] == step][:4]
            examples = Examples(
                [
                    [
                        (key, str(value))
                        for key, value in row.items()
                        if key not in ("step", "split")
                    ]
                    for row in rows
                ]
            )
            if step == steps[0]:
                blocks += [Text(f"{name}, step {step:,}, from {run.path}/samples.jsonl:"), examples]
            else:
                blocks.append(Folded(f"{name}, step {step:,}", [examples]))
    return blocks


def configuration(runs: Named, base: Run | None) -> list[Block]:
    """Which keys of the configurations differ from the base's; of one run all of them besides."""
    blocks: list[Block] = []
    first = next(iter(runs.values()))
    if base is not None or len(runs) > 1:
        blocks += differing_keys(runs, base or first)
    else:
        blocks.append(Text("Nothing to compare with; name a run by --base RUN_DIR."))
    if len(runs) == 1 and first.config is not None:
        rows = [
            (key, json.dumps(value, ensure_ascii=False))
            for key, value in flatten(first.config).items()
        ]
        table = Table("configuration", f"{first.path}/config.json", ("key", "value"), rows)
        blocks.append(Folded("The whole configuration", [table]))
    elif first.config is None and len(runs) == 1:
        blocks.append(Text(f"{first.path}/config.json cannot be read.", notice=True))
    return blocks


def differing_keys(runs: Named, base: Run) -> list[Block]:
    """A table of the keys of config.json in which runs differ from a base."""
    blocks: list[Block] = [
        Text(f"{name}: config.json cannot be read, so nothing is known of it here.", notice=True)
        for name, run in runs.items()
        if run.config is None and run.state != "waiting"
    ]
    if base.config is None:
        return [
            *blocks,
            Text(f"The base {base.path} has no config.json that can be read.", notice=True),
        ]
    configs = {
        name: _configuration(run.config)
        for name, run in runs.items()
        if run.config is not None and run.path != base.path
    }
    own = _configuration(base.config)
    keys = dict.fromkeys([*own, *(key for config in configs.values() for key in config)])
    rows = []
    for key in keys:
        others: dict[str, list[str]] = {}
        for name, config in configs.items():
            if config.get(key, _ABSENT) != own.get(key, _ABSENT):
                others.setdefault(_shown_value(config, key), []).append(name)
        rows += [
            (key, _shown_value(own, key), value, _joined(where)) for value, where in others.items()
        ]
    if not rows:
        return [*blocks, Text(f"No key differs from {base.path} (model_dir aside).")]
    caption = f"Keys of config.json that differ from {base.path}; model_dir aside."
    return [
        *blocks,
        Table("configuration_differences", caption, ("key", "base", "value", "in"), rows),
    ]


def provenance(runs: Named) -> list[Block]:
    """Packages, revision, devices, mesh and command of each run, alike ones together."""
    blocks: list[Block] = [
        Text(f"{name}: versions.json cannot be read.", notice=True)
        for name, run in runs.items()
        if run.versions is None and run.state != "waiting"
    ]
    found: dict[str, dict[str, list[str]]] = {}
    for name, run in runs.items():
        versions = {key: value for key, value in (run.versions or {}).items() if key != "command"}
        for key, value in flatten(versions).items():
            if isinstance(value, list):
                kinds = [str(each) for each in value]
                value = ", ".join(f"{kinds.count(kind)} × {kind}" for kind in dict.fromkeys(kinds))
            found.setdefault(key, {}).setdefault(str(value), []).append(name)
    rows = [
        (key, value, "all" if len(where) == len(runs) else _joined(where))
        for key, values in found.items()
        for value, where in values.items()
    ]
    if rows:
        blocks.append(
            Table("versions", "From versions.json of each run.", ("what", "value", "in"), rows)
        )
    commands = []
    for name, run in runs.items():
        command = (run.versions or {}).get("command")
        if isinstance(command, list):
            commands.append(f"# {name}\npython {shlex.join(map(str, command))}")
    if commands:
        listing = Listing("\n".join(commands))
        blocks.append(Folded("Commands", [listing]) if len(commands) > 4 else listing)
    return blocks


_DENSE = "No statistics of routers in metrics.jsonl: nothing logged yet, or a dense model."
_ABSENT = object()


def _configuration(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in flatten(config).items() if key != "model_dir"}


def _shown_value(config: Mapping[str, Any], key: str) -> str:
    return json.dumps(config[key], ensure_ascii=False) if key in config else "absent"


def _devices(run: Run) -> str | None:
    found = (run.versions or {}).get("devices")
    kinds = [str(each) for each in found] if isinstance(found, list) else []
    return ", ".join(f"{kinds.count(kind)} × {kind}" for kind in dict.fromkeys(kinds)) or None


def _joined(found: Sequence[str]) -> str:
    return ", ".join(found)


def _shown(found: Sequence[Figure | None], otherwise: str) -> list[Block]:
    there = [figure for figure in found if figure is not None]
    return [Figures(there)] if there else [Text(otherwise, notice=True)]


def _chosen(run: Run) -> list[dict[str, Any]]:
    """Rows that statistics of layers are taken from: evaluations if they have any, or training."""
    for split in (main_split([run], "router_entropy"), "train"):
        rows = [row for row in run.rows if row["split"] == split]
        if any(isinstance(row.get("expert_load"), dict) for row in rows):
            return figures.thinned(rows)
    return []


def _source(run: Run) -> str:
    rows = _chosen(run)
    return f"From {rows[0]['split']} in {run.path}/metrics.jsonl." if rows else ""


def _layer_loads(row: Mapping[str, Any], layers: Sequence[str]) -> list[tuple[str, list[float]]]:
    load = row.get("expert_load")
    found = [(layer, shares(load.get(layer))) for layer in layers] if isinstance(load, dict) else []
    return [(layer, each) for layer, each in found if each is not None]


def _analysis(name: str, run: Run, analysis: Mapping[str, Any]) -> list[Block]:
    layers = [layer for layer in analysis["layers"] if isinstance(layer, dict)]
    source = f"{analysis.get('source') or 'a text'}, {analysis.get('tokens') or '?'} tokens"
    tokens, shown, bars, told = [], [], [], []
    for layer in layers:
        where = str(layer.get("name", "?"))
        load = shares(layer.get("load")) or []
        tops = layer.get("top_tokens")
        for expert, top in enumerate(tops if isinstance(tops, list) else []):
            top = [each for each in top if isinstance(each, dict)] if isinstance(top, list) else []
            tokens += [
                (
                    where,
                    expert,
                    each.get("token"),
                    each.get("count"),
                    each.get("share"),
                    str(run.path),
                )
                for each in top
            ]
            words = " · ".join(_token(each) for each in top[:10])
            shown.append(
                (where, expert, load[expert] if expert < len(load) else None, words or "no token")
            )
        bars += _confidence(where, layer.get("confidence_histogram"))
        mutual = layer.get("mutual_information")
        mutual = numbers(mutual) if isinstance(mutual, dict) else {}
        told.append(
            (
                where,
                *(numbers(layer).get(key) for key in ("entropy", "confidence", "dropped_fraction")),
                *(mutual.get(key) for key in ("token", "position", "domain")),
            )
        )
    prefix = f"{name}: step {analysis.get('step', '?')}, {source}, in {run.path}/router_analysis."
    blocks: list[Block] = [Text(prefix)]
    stem = "specialisation"
    blocks.append(
        Table(
            f"{stem}_mutual_information",
            "How sure the router is; how many nats token, position and domain tell of the expert.",
            (
                "layer",
                "entropy (nats)",
                "confidence",
                "dropped fraction",
                "I(expert; token)",
                "I(expert; position)",
                "I(expert; domain)",
            ),
            told,
        )
    )
    if bars:
        blocks.append(Figures(bars))
    heads = ("layer", "expert", "share of tokens", "top tokens, × count (share)")
    caption = "The commonest tokens that each expert was given."
    for where in dict.fromkeys(row[0] for row in shown):
        rows = [row[1:] for row in shown if row[0] == where]
        table = Table(f"{stem}_{anchor(where)}", f"{where}: {caption}", heads[1:], rows)
        blocks.append(
            Folded(f"{where}: top tokens of each expert", [table])
            if where != shown[0][0]
            else table
        )
    return blocks


def _token(entry: Mapping[str, Any]) -> str:
    share = entry.get("share")
    part = f" ({share:.0%})" if isinstance(share, int | float) else ""
    return f"{entry.get('token')} ×{entry.get('count')}{part}"


def _confidence(layer: str, found: Any) -> list[Figure]:
    edges = shares(found.get("edges")) if isinstance(found, dict) else None
    counts = shares(found.get("counts")) if isinstance(found, dict) else None
    if not edges or not counts or len(edges) != len(counts) + 1:
        return []
    rows = [
        {"low": low, "high": high, "count": count}
        for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
    ]
    return [figures.histogram(layer, rows, x_title="largest probability of a token")]
