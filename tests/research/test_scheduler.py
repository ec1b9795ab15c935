"""The scheduler with trials that a script only plays: order, retries, pruning, stopping."""

import dataclasses
import json
import os
import pathlib
import signal
import threading

import pytest

from switchx.errors import UserError
from switchx.research import trial as trials
from switchx.research.scheduler import Follower, Scheduler
from switchx.research.sweep import Sweep, Trial
from switchx.training.loop import Interrupted


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr("switchx.research.scheduler.POLL_SECONDS", 0.001)


def make(name, state="waiting", **fields):
    made = Trial(
        name=name,
        kind="train",
        settings={"A": name},
        seed=0,
        hash="h" + name,
        gin_files=[],
        bindings=[],
        eval_settings=[],
        run_directory=".",
        task="task",
        steps=40,
        state=state,
    )
    return dataclasses.replace(made, **fields)


class Played:
    """Ends at the nth look with the codes that it is given, one an attempt."""

    def __init__(self, looks=1, **codes):
        self.max_parallel, self.looks, self.codes = 2, looks, codes
        self.started, self.running, self.most = [], 0, 0

    def start(self, command, log):
        folder = pathlib.Path(command[-1])
        self.started.append(folder.name)
        self.running += 1
        self.most = max(self.most, self.running)
        code = self.codes.get(folder.name, [0])
        return PlayedJob(self, folder, code.pop(0) if len(code) > 1 else code[0], self.looks)

    def close(self):
        pass


class PlayedJob:
    def __init__(self, executor, folder, code, looks):
        self.executor, self.folder, self.code, self.looks = executor, folder, code, looks
        self.say("running")

    def say(self, state):
        trials.write(self.folder, dataclasses.replace(trials.read(self.folder), state=state))

    def poll(self):
        self.looks -= 1
        if self.looks > 0:
            return None
        if self.code == 0:
            self.say("done")
        elif self.code == 3:
            self.say("diverged")
        elif self.code in (1, 2):
            self.say("failed")
        self.executor.running -= 1
        return self.code

    def stop(self):
        self.looks, self.code = 0, -signal.SIGTERM


def scheduler(tmp_path, executor, **options):
    return Scheduler(Sweep(base=[], model_dir=str(tmp_path)), executor, **options)


def states(made):
    return {name: trial.state for name, trial in made.trials.items()}


def test_all_run_in_order_and_no_more_at_once_than_there_are_places(tmp_path):
    executor = Played(looks=3)
    made = scheduler(tmp_path, executor)
    for name in "abcde":
        made.add(make(name))
    made.run()
    assert executor.started == list("abcde")
    assert executor.most == 2
    assert set(states(made).values()) == {"done"}


def test_what_is_over_is_not_started_again_and_the_rest_is(tmp_path):
    before = ("done", "diverged", "pruned", "failed", "stopped", "running")
    for name, state in zip("abcdef", before, strict=True):
        trials.write(tmp_path / "trials" / name, make(name, state, attempts=5))
    executor = Played()
    made = scheduler(tmp_path, executor)
    for name in "abcdefg":
        made.add(make(name))
    made.run()
    assert executor.started == list("defg")
    assert made.trials["d"].attempts == 5


def test_a_crash_is_tried_again_within_a_limit_and_a_mistake_is_not(tmp_path):
    executor = Played(a=[-9, 1, 0], b=[1], c=[2], d=[3])
    made = scheduler(tmp_path, executor, max_attempts=3)
    for name in "abcd":
        made.add(make(name))
    made.run()
    assert states(made) == {"a": "done", "b": "failed", "c": "failed", "d": "diverged"}
    assert [executor.started.count(name) for name in "abcd"] == [3, 3, 1, 1]


def test_a_trial_that_could_not_say_how_it_ended_has_its_signal_for_a_reason(tmp_path):
    made = scheduler(tmp_path, Played(a=[-9]), max_attempts=1)
    made.add(make("a"))
    made.run()
    assert made.trials["a"].error == "ended by SIGKILL"
    assert trials.read(tmp_path / "trials/a").state == "failed"


def test_another_configuration_in_the_folder_is_refused(tmp_path):
    trials.write(tmp_path / "trials/a", make("a", "done", hash="other"))
    with pytest.raises(UserError, match="another configuration"):
        scheduler(tmp_path, Played()).add(make("a"))


def test_new_axes_of_evaluation_reopen_what_is_done(tmp_path):
    trials.write(tmp_path / "trials/a", make("a", "done"))
    executor = Played()
    made = scheduler(tmp_path, executor)
    made.add(make("a", eval_settings=[{"EVAL_CAPACITY_FACTOR": 2.0}]))
    made.run()
    assert executor.started == ["a"]


def test_pruning_ends_what_runs_and_what_waits(tmp_path):
    executor = Played(looks=10**6)
    executor.max_parallel = 1
    made = scheduler(tmp_path, executor)
    for name in "ab":
        made.add(make(name))

    def between():
        if executor.started:
            made.prune("a")
            made.prune("b")

    made.run(between)
    assert states(made) == {"a": "pruned", "b": "pruned"}
    assert executor.started == ["a"]
    assert made.ended(list(made.trials.values()))


def test_a_signal_stops_the_trials_and_is_passed_on(tmp_path):
    executor = Played(looks=10**6)
    made = scheduler(tmp_path, executor)
    for name in "abc":
        made.add(make(name))
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(Interrupted) as interrupted:
        made.run()
    assert interrupted.value.signum == signal.SIGTERM
    assert states(made) == {"a": "stopped", "b": "stopped", "c": "waiting"}


def row(step, split, **values):
    return json.dumps({"step": step, "split": split, **values}) + "\n"


def test_a_growing_file_is_followed_and_read_again_when_it_shrinks(tmp_path):
    path = tmp_path / "metrics.jsonl"
    follower = Follower(path, "task", "accuracy")
    assert follower.look().step == 0
    first = row(10, "train", loss=2.5, step_seconds=0.5)
    path.write_text(first + row(10, "eval/task", accuracy=0.25) + '{"step": 20, "spl')
    seen = follower.look()
    assert (seen.step, seen.loss, seen.step_seconds) == (10, 2.5, 0.5)
    assert seen.evaluations == {10: 0.25}
    with open(path, "a") as file:
        file.write('it": "eval/task", "accuracy": 0.5}\n' + row(20, "eval/other", accuracy=0.9))
    assert follower.look().evaluations == {10: 0.25, 20: 0.5}
    path.write_text(first + "no json\n")
    assert follower.look().evaluations == {}


def test_a_file_that_was_cut_off_and_has_grown_past_where_it_was_is_read_again(tmp_path):
    path, fresh = tmp_path / "metrics.jsonl", tmp_path / "fresh"
    follower = Follower(path, "task", "accuracy")
    path.write_text(row(10, "train", loss=2.5) + row(10, "eval/task", accuracy=0.25))
    follower.look()
    # Every line is longer than it was, so that none ends where the first look did.
    fresh.write_text(
        row(10, "train", loss=2.53125) + row(10, "eval/task", accuracy=0.75) + row(11, "train")
    )
    fresh.replace(path)
    assert follower.look().evaluations == {10: 0.75}


def test_a_metric_that_evaluations_lack_is_named_and_one_that_is_not_finite_is_not(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(row(10, "eval/task", cross_entropy=1.5, accuracy=None))
    assert Follower(path, "task", "accuracy").look().evaluations == {}
    with pytest.raises(UserError, match="'cros_entropy'.*did you mean 'cross_entropy'"):
        Follower(path, "task", "cros_entropy").look()


def test_the_time_left_may_be_days(tmp_path):
    made = scheduler(tmp_path, Played(looks=10**6))
    made.add(make("a"))
    (tmp_path / "trials/a/metrics.jsonl").write_text(row(30, "train", step_seconds=9000.0))
    made._start("a")
    assert list(made.table().columns[5].cells) == ["1 day, 1:00:00"]


def test_the_table_has_what_has_begun(tmp_path):
    made = scheduler(tmp_path, Played(looks=2))
    for name in "ab":
        made.add(make(name))
    (tmp_path / "trials/a/metrics.jsonl").write_text(
        row(30, "train", loss=1.5, step_seconds=2.0) + row(30, "eval/task", cross_entropy=1.25)
    )
    made.run()
    table = made.table()
    assert table.title == "2 done"
    assert [list(column.cells)[0] for column in table.columns] == [
        "A = a, seed 0", "done", "30 of 40", "1.5000", "1.2500", "",
    ]  # fmt: skip
