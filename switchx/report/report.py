"""Run and sweep directories → one page of HTML, and its tables as files."""

import argparse
import importlib.util
import json
import os
import pathlib
import shlex
import sys
from collections.abc import Sequence

from switchx.errors import UserError, closest
from switchx.report.runs import Run, is_run, metric_names, read_object, read_run
from switchx.report.sweeps import Sweep, is_sweep, read_sweep
from switchx.report.tables import Table
from switchx.training.selection import DIRECTIONS, Criterion

PACKAGES = ("altair", "jinja2", "vl_convert")


def run(parser: argparse.ArgumentParser) -> None:
    """Flags → files.

    Raises:
      UserError: no such directory, metric, split or setting, or `--out` cannot be written.
    """
    add = parser.add_argument
    add("directories", nargs="+", metavar="RUN_OR_SWEEP_DIR")
    add("--out", default="report.html", help="the page; tables lie in <name>_tables beside it")
    add("--metric", help="of the evaluations; default: the sweep's, else the run's best_metric")
    add("--direction", choices=DIRECTIONS, help="of --metric; default: by its name")
    add("--split", help="such as eval/TASK; default: the evaluation of the task trained on")
    add(
        "--base", metavar="RUN_DIR", help="run whose configuration is compared with; default: first"
    )
    add(
        "--base_arm", metavar="NAME=VALUE,…", help="setting that differences are to; default: first"
    )
    add("--title", help="default: the names of the directories")
    flags = parser.parse_args()
    write(
        [pathlib.Path(each) for each in flags.directories],
        pathlib.Path(flags.out),
        metric=flags.metric,
        direction=flags.direction,
        split=flags.split,
        base=pathlib.Path(flags.base) if flags.base else None,
        base_arm=flags.base_arm,
        title=flags.title,
    )


def write(
    directories: Sequence[pathlib.Path],
    out: pathlib.Path,
    *,
    metric: str | None = None,
    direction: str | None = None,
    split: str | None = None,
    base: pathlib.Path | None = None,
    base_arm: str | None = None,
    title: str | None = None,
) -> None:
    """Write the page and its tables; the arguments are the flags of `scripts/report.py`.

    Raises:
      UserError: as `run`. Nothing is written then.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"reports need {', '.join(missing)}: pip install 'switchx[report]'")
    # Only now, because they are not there without the extra.
    from switchx.report import page, run_sections, sweep_sections

    _check_writable(out)
    given = list({path.resolve(): path for path in reversed(directories)}.values())[::-1]
    sweeps = [read_sweep(path) for path in given if _kind(path) == "sweep"]
    runs = [read_run(path) for path in given if _kind(path) == "run"]
    reference = read_run(base) if base is not None and _kind(base) == "run" else None
    if base is not None and reference is None:
        raise UserError(f"--base={base} is a sweep; name a run directory")
    everything = [*runs, *(run for sweep in sweeps for run in sweep.runs)]
    _check_known("metric", metric, metric_names(everything))
    _check_known("split", split, {row["split"] for run in everything for row in run.rows})
    chosen = Criterion(metric, direction) if metric else None
    chapters = [
        sweep_sections.chapter(
            sweep, chosen or sweep.metric, split=split, base_arm=base_arm, base=reference
        )
        for sweep in sweeps
    ]
    if runs:
        criterion = chosen or _best_metric(runs[0])
        chapters.append(run_sections.chapter(runs, criterion, split=split, base=reference))
    title = title or (chapters[0].title if len(chapters) == 1 else _title(sweeps, runs))
    command = f"python {shlex.join(sys.argv)}"
    html = page.render(title, chapters, command=command)
    tables = [
        (f"{page.anchor(chapter.title)}-" if len(chapters) > 1 else "", table)
        for chapter in chapters
        for table in chapter.tables()
    ]
    folder = out.with_name(f"{out.stem}_tables")
    try:
        names = _write_tables(folder, tables)
        temporary = out.with_name(f".{out.name}.tmp")
        temporary.write_text(html, encoding="utf-8")
        os.replace(temporary, out)
    except OSError as error:
        raise UserError(f"cannot write {error.filename or out}: {error.strerror}") from None
    problems = sum(len(chapter.problems) for chapter in chapters)
    named = f"; {problems} thing(s) missing or broken, named on the page" if problems else ""
    size = f"{out.stat().st_size / 1e6:.1f} MB"
    print(f"{out} ({size}); {names} tables in {folder} as CSV, Markdown and LaTeX{named}")


def _kind(path: pathlib.Path) -> str:
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if not path.is_dir():
        raise UserError(f"{path} is no directory; name a run or a sweep directory")
    if is_sweep(path):
        return "sweep"
    if is_run(path):
        return "run"
    raise UserError(
        f"{path} is neither a run directory (it has no config.json, metrics.jsonl, …) nor a sweep "
        "(no sweep.json)"
    )


def _check_known(flag: str, value: str | None, known: set[str]) -> None:
    if value is not None and value not in known:
        hint = closest(value, known) if known else "; no directory has metrics yet"
        raise UserError(f"--{flag}={value} is in no row of the directories{hint}")


def _check_writable(out: pathlib.Path) -> None:
    if out.is_dir():
        raise UserError(f"--out={out} is a directory; name a file, such as {out / 'report.html'}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        probe = out.with_name(f".{out.name}.tmp")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--out={out} cannot be written: {error.strerror}") from None


def _best_metric(run: Run) -> Criterion:
    config = run.config or {}
    metric, direction = config.get("best_metric"), config.get("best_direction")
    return Criterion(
        metric if isinstance(metric, str) else "cross_entropy",
        direction if direction in DIRECTIONS else None,
    )


def _title(sweeps: Sequence[Sweep], runs: Sequence[Run]) -> str:
    names = [sweep.name for sweep in sweeps] + [run.path.resolve().name for run in runs]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _write_tables(folder: pathlib.Path, tables: Sequence[tuple[str, Table]]) -> int:
    """Write each table under a name of its own, and an index; files of an earlier index go."""
    folder.mkdir(parents=True, exist_ok=True)
    index: dict[str, str] = {}
    files: dict[str, str] = {}
    for prefix, table in tables:
        name = prefix + table.name
        same = sum(other == name or other.startswith(f"{name}_") for other in index)
        name += f"_{same + 1}" if name in index else ""
        index[name] = table.caption
        files |= {f"{name}.csv": table.csv(), f"{name}.md": table.markdown()}
        files[f"{name}.tex"] = table.latex()
    earlier = read_object(folder / "tables.json", []) or {}
    for name in earlier.keys() - index.keys():
        for suffix in ("csv", "md", "tex"):
            if pathlib.PurePath(name).name == name:
                (folder / f"{name}.{suffix}").unlink(missing_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "tables.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return len(index)
