"""Scripts as a user starts them, and what they leave in a run directory."""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
TIMING = ("tokens_per_second", "step_seconds", "mfu")


def start(script: str, *flags: str) -> subprocess.Popen:
    """A script of scripts/, on the one CPU device that users have."""
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    return subprocess.Popen(
        [sys.executable, f"scripts/{script}.py", *flags],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    """What it printed; it ends well."""
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def rows(directory: pathlib.Path, name: str = "metrics.jsonl") -> list[dict]:
    """Whole rows of a file of JSON lines, without the clock, which no run repeats."""
    path = directory / name
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{key: row[key] for key in row if key not in TIMING} for row in found]
