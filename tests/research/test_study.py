"""What a sweep's command says before and after its trials; the trials themselves are in e2e."""

import dataclasses
import json
import pathlib

import pytest

from switchx.errors import UserError
from switchx.research import study
from switchx.research import trial as trials
from switchx.research.scheduler import Scheduler
from switchx.research.sweep import Grid, Sweep, arms, make_trials


def test_a_plan_adds_up_what_trials_cost():
    sweep = Sweep(
        base=["gin_configs/t5_tiny.gin"],
        axes=[Grid({"BATCH_SIZE": [16, 32]})],
        seeds=[0, 1, 2],
        bindings={"TRAIN_STEPS": 30},
    )
    trials = list(make_trials(sweep, arms(sweep)))
    table = study.plan(sweep, trials)
    names, steps, flops, *_ = [list(column.cells) for column in table.columns]
    assert len(names) == 6
    assert set(steps) == {"30"}
    one = 30 * trials[0][1].train_flops
    assert [float(each) for each in flops[:2]] == pytest.approx([one, 2 * one], 0.01)
    assert table.title is not None and table.title.startswith("6 trials")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["num_gpus=1", "name=a=b"], {"num_gpus": 1, "name": "a=b"}),
        (["timeout_min=90"], {"timeout_min": 90}),
    ],
)
def test_options_are_literals_or_strings(given, expected):
    assert study._options(given) == expected


def test_an_option_without_a_value_is_named():
    with pytest.raises(UserError, match="NAME=VALUE"):
        study._options(["num_gpus"])


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["sweep.py", *arguments])
    study.run(study.flag_parser("description"))


def test_a_folder_that_holds_a_run_is_refused(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    file = "gin_configs/sweeps/capacity_factor.gin"
    with pytest.raises(UserError, match="holds a run"):
        run(monkeypatch, file, f"--gin.MODEL_DIR={tmp_path}", "--gin.MAX_ARMS=1")


def test_a_failed_trial_is_the_commands_error_and_the_rest_is_there(tmp_path, monkeypatch, capsys):
    class Failing:
        max_parallel = 2

        def start(self, command, log):
            return self

        def poll(self):
            return 2

        def close(self):
            pass

    monkeypatch.setattr(study.executors, "make", lambda *_: Failing())
    monkeypatch.setattr("switchx.research.scheduler.POLL_SECONDS", 0.001)
    with pytest.raises(UserError, match=r"2 of 2 trials failed; the first: .*exit code 2.*\.log"):
        run(
            monkeypatch,
            "gin_configs/sweeps/capacity_factor.gin",
            "gin_configs/sweeps/minute.gin",
            f"--gin.MODEL_DIR={tmp_path}",
        )
    written = json.loads((tmp_path / "sweep.json").read_text())
    assert written["name"] == "capacity_factor"
    assert written["axes"] == ["CAPACITY_FACTOR"]
    assert written["eval_axes"] == ["EVAL_CAPACITY_FACTOR"]
    assert written["direction"] == "lowest"
    assert [trial["settings"] for trial in written["trials"]] == [
        {"CAPACITY_FACTOR": 0.5},
        {"CAPACITY_FACTOR": 1.0},
    ]
    assert "sweep.Sweep.max_arms" in (tmp_path / "sweep.gin").read_text()
    assert "1 failed" in capsys.readouterr().out


class Instant:
    """Every trial is done at once, with one evaluation."""

    max_parallel = 2

    def start(self, command, log):
        folder = pathlib.Path(command[-1])
        row = {"step": 9, "split": "eval/embedded_span_corruption", "cross_entropy": 1.0}
        (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        trials.write(folder, dataclasses.replace(trials.read(folder), state="done"))
        return self

    def poll(self):
        return 0

    def close(self):
        pass


@pytest.fixture
def search(tmp_path, monkeypatch):
    """Runs a search of two arms, with a seed each and some flags."""
    monkeypatch.setattr(study.executors, "make", lambda *_: Instant())
    monkeypatch.setattr("switchx.research.scheduler.POLL_SECONDS", 0.001)
    file = tmp_path / "search.gin"
    file.write_text(
        "from __gin__ import dynamic_registration\n"
        "from switchx.research import sweep\n"
        "SPACE = {'CAPACITY_FACTOR': ('uniform', 1, 2)}\n"
        f"sweep.Sweep.model_dir = '{tmp_path / 'sweep'}'\n"
        "sweep.Sweep.base = ['gin_configs/switch_tiny.gin']\n"
        "sweep.Sweep.seeds = [0]\n"
        "sweep.Sweep.search = @sweep.Search()\n"
        "sweep.Search.values = %SPACE\n"
        "sweep.Search.num_arms = 2\n"
    )
    return lambda *flags: run(monkeypatch, str(file), *flags)


def test_a_search_that_goes_on_takes_up_what_is_done(search, tmp_path, capsys):
    search()
    search("--gin.Search.num_arms=3")
    assert capsys.readouterr().out.count("starts") == 3
    written = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert len(written["trials"]) == 3


def test_a_search_of_another_configuration_is_refused(search):
    search()
    with pytest.raises(UserError, match="results of another configuration"):
        search("--gin.Sweep.bindings={'TRAIN_STEPS': 7}")


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ("{'CAPACITY_FACTR': ('uniform', 1, 2)}", "did you mean 'CAPACITY_FACTOR'"),
        ("{'CAPACITY_FACTOR': ('uniform', -1, 2)}", "arm CAPACITY_FACTOR = -1"),
        ("{'CAPACITY_FACTOR': ('choice', [1, 'two'])}", "arm CAPACITY_FACTOR = two"),
    ],
)
def test_a_search_beyond_what_can_be_built_ends_before_it_begins(search, tmp_path, space, message):
    with pytest.raises(UserError, match=message):
        search(f"--gin.SPACE={space}")
    assert not (tmp_path / "sweep").exists()


def test_arms_that_round_to_the_same_are_summed_up_apart(tmp_path):
    sweep = Sweep(
        base=["gin_configs/switch_tiny.gin"],
        axes=[Grid({"CAPACITY_FACTOR": [1.0, 1.00001]})],
        seeds=[0, 1],
        model_dir=str(tmp_path),
    )
    scheduler = Scheduler(sweep, Instant())
    for trial, _ in make_trials(sweep, arms(sweep)):
        scheduler.add(trial)
    assert list(study.summary(sweep, scheduler).columns[4].cells) == ["2 waiting", "2 waiting"]
