"""Whatever happens to a run: the same bits in the end, or one line that says what to do."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests.e2e.faults import CHECKPOINT_PERIOD, FAULTS, LAST_STEP, PHASES

ROOT = pathlib.Path(__file__).parents[2]
KILLS = 20


@pytest.fixture(scope="module")
def report() -> dict:
    command = [sys.executable, "-m", "tests.e2e.faults", f"--kills={KILLS}", "--seed=1"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("JAX_")}
    completed = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert completed.returncode == 0, completed.stderr
    print(completed.stderr)
    return json.loads(completed.stdout.splitlines()[-1])


def outcomes(report: dict, fault: str) -> list[dict]:
    found = report["faults"][fault]
    for outcome in found:
        # TensorStore's threads complain of every write that fails; nobody can stop them.
        if fault not in ("file_size_limit", "full_disk"):
            assert "Traceback" not in outcome["output"], outcome["output"]
    return found


def assert_refused(outcome: dict, *parts: str) -> None:
    """Exit code 2 and one line with these parts."""
    errors = [line for line in outcome["output"].splitlines() if line.startswith("error:")]
    assert outcome["code"] == 2 and len(errors) == 1, outcome["output"]
    for part in parts:
        assert part in errors[0]


def assert_exact(outcome: dict) -> None:
    assert (outcome["code"], outcome["differing_bits"]) == (0, 0), outcome["output"]


def test_twenty_kills_at_random_moments_change_no_bit(report):
    kills = report["kills"]
    assert kills["kills"] == KILLS and kills["differing_bits"] == 0
    assert kills["resumes"] > 0
    for phase in ("saving", "evaluation", "data", "compilation", "restoring"):
        assert kills["kills_by_phase"][phase] > 0, kills
    assert set(kills["kills_by_phase"]) == set(PHASES)


def test_every_fault_is_reported(report):
    assert set(report["faults"]) == set(FAULTS)


@pytest.mark.parametrize(
    ("fault", "wrong"),
    [
        ("truncated_and_missing_files", ["bytes instead of", "No such file"]),
        ("flipped_bit", ["SHA-256 differs"]),
        ("flipped_bit_in_a_complete_run", ["SHA-256 differs"]),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(report, fault, wrong):
    (outcome,) = outcomes(report, fault)
    assert_exact(outcome)
    warnings = [line for line in outcome["output"].splitlines() if "is damaged" in line]
    for checkpoint, what, warning in zip(outcome["checkpoints"], wrong, warnings, strict=True):
        assert checkpoint in warning and what in warning
        assert f"{pathlib.Path(checkpoint).name}.damaged" in warning
    good = int(pathlib.Path(outcome["checkpoints"][-1]).name) - CHECKPOINT_PERIOD
    assert f"from step {good}" in outcome["output"]


def test_without_a_good_checkpoint_nothing_is_lost(report):
    for outcome in outcomes(report, "no_good_checkpoint"):
        assert_refused(outcome, "no checkpoint in", f"step {LAST_STEP}: data/metadata has 3 bytes")
        assert outcome["kept"]


def test_a_nan_batch_stops_the_run_or_is_skipped(report):
    stopped, skipped = outcomes(report, "nan")
    assert_refused(stopped, "step 10: cross_entropy is nan", "on_nonfinite")
    assert "from step 8" in skipped["output"]
    assert_exact(skipped)
    assert "step 10: cross_entropy is nan; update skipped" in skipped["output"]


def test_data_that_changes_under_a_run_does_not_change_the_run(report):
    (outcome,) = outcomes(report, "data_changes_under_a_run")
    assert_exact(outcome)


def test_data_that_vanished_is_named_and_once_back_the_run_goes_on(report):
    without, back = outcomes(report, "data_vanishes")
    assert_refused(without, "own.txt")
    assert_exact(back)


def test_data_that_changed_between_is_refused_and_once_back_the_run_goes_on(report):
    changed, back = outcomes(report, "data_changes_between")
    assert_refused(changed, "data")
    assert_exact(back)


def test_a_second_process_is_turned_away(report):
    second, first = outcomes(report, "two_processes")
    assert_refused(second, "MODEL_DIR", "in use by another process")
    assert_exact(first)


def test_the_wall_clock_changes_nothing(report):
    (outcome,) = outcomes(report, "clock")
    assert_exact(outcome)
    assert outcome["kept"]  # the same checkpoints, the latest and the best


def test_a_checkpoint_that_cannot_be_written_leaves_those_before(report):
    failed, resumed = outcomes(report, "file_size_limit")
    assert_refused(failed, "checkpoint could not be written", "is intact")
    assert failed["kept"]
    assert_exact(resumed)


def test_a_full_disk_is_one_line_and_with_room_the_run_goes_on(report):
    found = outcomes(report, "full_disk")
    if not found:
        pytest.skip("this system lets no process mount a small file system of its own")
    *full, resumed = found
    for outcome in full:
        assert outcome["code"] == 2
        assert_refused(outcome)
    assert_exact(resumed)
