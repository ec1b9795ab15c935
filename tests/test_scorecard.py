import dataclasses
import json
import pathlib
import shutil
import sys

import numpy as np
import pytest

from switchx import command_line, scorecard, trained
from switchx.data.mixtures import Mixture
from switchx.data.pipeline import DataConfig
from switchx.data.tasks import FileTask
from switchx.errors import UserError
from switchx.experiment import Experiment
from switchx.run import train
from tests.test_run import MODEL


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Experiment:
    """Four steps on a file's task, in a mixture with an embedded one besides."""
    folder = tmp_path_factory.mktemp("scorecard")
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), 5)) for _ in range(60)]
    for name, part in (("train", words[:41]), ("held", words[41:])):
        lines = [json.dumps({"inputs": word, "targets": word[::-1]}) for word in part]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    reverse = FileTask(
        name="reverse",
        files=str(folder / "train.jsonl"),
        validation_files=str(folder / "held.jsonl"),
        objective="supervised",
        metrics=("exact_match", "chrf"),
    )
    experiment = Experiment(
        model=MODEL,
        data=DataConfig(
            mixture_or_task_name="reverse",
            task_feature_lengths={"inputs": 40, "targets": 12},
            vocabulary="bytes",
            batch_size=8,
            tasks=(reverse, Mixture(name="both", tasks=("reverse", "wn_syn_ant"))),
        ),
        model_dir=str(folder / "run"),
        train_steps=4,
        eval_period=2,
        checkpoint_period=2,
        num_samples=0,
        eval_steps=1,
    )
    train(experiment)
    return experiment


def lines(path) -> list[dict]:
    return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]


def test_the_loss_is_the_row_that_training_wrote(finished):
    (found,) = scorecard.evaluate(finished, metrics=("loss",))
    assert found.row["step"] == 4 and found.row["split"] == "validation/reverse"
    assert found.answers == [] and found.checkpoint.name == "4"
    rows = lines(f"{finished.model_dir}/metrics.jsonl")
    (want,) = (row for row in rows if row["split"] == "eval/reverse" and row["step"] == 4)
    for name in ("loss", "cross_entropy", "accuracy", "dropped_fraction"):
        assert found.row[name] == pytest.approx(want[name], rel=1e-5), name


def test_a_mixture_is_evaluated_task_by_task(finished):
    both = list(scorecard.evaluate(finished, metrics=("loss",), tasks=("both", "reverse")))
    assert [each.row["split"] for each in both] == ["validation/reverse", "validation/wn_syn_ant"]
    assert both[0].row["cross_entropy"] != both[1].row["cross_entropy"]


def test_every_kind_of_metric_of_every_task_that_has_it(finished):
    kinds = ("decoded", "ranked", "scored")
    found = scorecard.evaluate(finished, metrics=kinds, tasks=("both",), num_examples=11)
    reverse, pairs = found
    assert set(reverse.row) == {
        *("step", "split", "num_examples", "decoded_exact_match", "decoded_chrf"),
        *("scored_log_likelihood", "scored_perplexity"),
    }
    assert {"decoded_accuracy", "ranked_accuracy", "num_cut_inputs"} <= set(pairs.row)
    assert reverse.row["num_examples"] == pairs.row["num_examples"] == 11
    assert len(reverse.answers) == len(pairs.answers) == 11
    for answer in pairs.answers:
        likely = answer["log_likelihoods"]
        assert answer["ranked"] == max(likely, key=likely.get)
        assert answer["target_log_likelihood"] == pytest.approx(likely[answer["target"][0]])
    hits = sum(answer["ranked"] in answer["target"] for answer in pairs.answers)
    assert pairs.row["ranked_accuracy"] == pytest.approx(100 * hits / 11)


def test_the_batch_size_changes_no_metric(finished):
    kinds = ("decoded", "ranked", "scored")

    def rows(batch_size: int) -> list[dict]:
        data = dataclasses.replace(finished.data, batch_size=batch_size)
        experiment = dataclasses.replace(finished, data=data)
        found = scorecard.evaluate(experiment, metrics=kinds, tasks=("both",), num_examples=11)
        return [each.row for each in found]

    # 11 of 8: the last batch has 3 examples; 16: the only one is not full.
    for few, many in zip(rows(8), rows(16), strict=True):
        assert few.keys() == many.keys()
        for name in few.keys() - {"split"}:
            assert few[name] == pytest.approx(many[name], rel=1e-5), name


def run(*flags: str) -> None:
    sys.argv = ["evaluate.py", *flags]
    scorecard.run(*command_line.parse(scorecard.flag_parser("")))


def test_a_run_directory_is_evaluated_into_itself(finished, tmp_path, capsys):
    copy = shutil.copytree(finished.model_dir, tmp_path / "run")
    before = lines(copy / "metrics.jsonl")
    run(str(copy), "--tasks=reverse", "--checkpoint=all", "--gin.EVAL_STEPS=None")
    text = capsys.readouterr().out.splitlines()
    assert [line.split()[:4] for line in text] == [
        ["task", "split", "step", "examples"],
        ["reverse", "validation", "2", "19"],
        ["reverse", "validation", "4", "19"],
    ]
    added = lines(copy / "metrics.jsonl")[len(before) :]
    assert lines(copy / "metrics.jsonl")[: len(before)] == before
    assert [(row["step"], row["split"]) for row in added] == [
        (2, "validation/reverse"),
        (4, "validation/reverse"),
    ]
    assert f"{added[1]['cross_entropy']:.4f}" in text[2]
    answers = lines(copy / "predictions/4/reverse.validation.jsonl")
    assert len(answers) == 19
    assert answers[0]["inputs"] == answers[0]["target"][0][::-1]
    assert isinstance(answers[0]["prediction"], str)
    # Once more, on fewer: rows and predictions of the same step and split are replaced.
    run(str(copy), "--tasks=reverse", "--metrics=decoded", "--num_examples=3")
    again = lines(copy / "metrics.jsonl")[len(before) :]
    assert [row["step"] for row in again] == [2, 4]
    assert again[0] == added[0] and again[1]["num_examples"] == 3
    assert len(lines(copy / "predictions/4/reverse.validation.jsonl")) == 3
    # The run goes on as if nothing had happened.
    experiment = dataclasses.replace(finished, model_dir=str(copy), train_steps=6)
    train(experiment)
    after = lines(copy / "metrics.jsonl")
    assert after[: len(before) + 2] == before + again
    assert {row["step"] for row in after[len(before) + 2 :]} == {6}


def test_mistakes_are_one_line(finished, capsys):
    folder, short = finished.model_dir, {"inputs": 40, "targets": 6}
    for flags, message in (
        (["--tasks=revers"], "no task or mixture is called 'revers'; did you mean 'reverse'"),
        (["--split=tests", "--tasks=wn_syn_ant"], "no split 'tests'; did you mean 'test'"),
        (["--split=test", "--tasks=reverse"], "task 'reverse' has no split 'test'; valid: train"),
        (["--checkpoint=7"], "no checkpoint '7'; there are: last, best, all, 2, 4"),
        (["--metrics=decodet"], "--metrics: 'decodet' is unknown; did you mean 'decoded'"),
        (["--metrics=ranked", "--tasks=reverse"], "--metrics=ranked: none of reverse has any"),
        (["--num_examples=0"], "--num_examples=0 should be at least 1"),
        (["--gin.BATCH_SISE=4"], "nothing is called 'BATCH_SISE'; did you mean 'batch_size'"),
        (
            ["--metrics=ranked", "--tasks=wn_syn_ant", f"--gin.TASK_FEATURE_LENGTHS={short}"],
            "option 'antonyms' of task 'wn_syn_ant' has 9 tokens, more than",
        ),
    ):
        with pytest.raises(UserError) as error:
            run(folder, *flags)
        assert message in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(SystemExit):
        run(folder, "--spilt=test")
    assert "unknown flag '--spilt=test'; did you mean '--split'" in capsys.readouterr().err
    assert not [row for row in lines(f"{folder}/metrics.jsonl") if "validation/" in row["split"]]


def test_a_damaged_checkpoint_leaves_what_was_found(finished, tmp_path, capsys):
    copy = shutil.copytree(finished.model_dir, tmp_path / "run")
    shutil.rmtree(copy / "checkpoints/4/params")
    with pytest.raises(UserError, match="params is missing"):
        run(str(copy), "--tasks=reverse", "--metrics=decoded", "--checkpoint=all")
    assert "reverse  validation     2        19" in capsys.readouterr().out
    assert (copy / "predictions/2/reverse.validation.jsonl").exists()


def test_text_has_a_loss_only(finished):
    only = {"tasks": ("embedded_span_corruption",)}
    data = dataclasses.replace(finished.data, batch_size=16)
    experiment = dataclasses.replace(finished, data=data)
    (found,) = scorecard.evaluate(experiment, **only)
    assert "cross_entropy" in found.row and "num_examples" not in found.row
    with pytest.raises(UserError, match="none of embedded_span_corruption has any"):
        list(scorecard.evaluate(experiment, metrics=("decoded",), **only))


def test_a_checkpoint_of_another_run(finished):
    (path,) = trained.find_checkpoints(finished.model_dir, "2")
    started = dataclasses.replace(finished, initial_checkpoint_path=str(path))
    (found,) = scorecard.evaluate(started, metrics=("scored",), tasks=("reverse",), num_examples=2)
    assert found.row["step"] == 2


def test_training_decodes_and_judges_each_task(finished, tmp_path, capsys):
    data = dataclasses.replace(finished.data, mixture_or_task_name="both")
    experiment = dataclasses.replace(
        finished,
        data=data,
        num_decoded_examples=5,
        model_dir=str(tmp_path / "run"),
        train_steps=2,
    )
    train(experiment)
    rows = {row["split"]: row for row in lines(tmp_path / "run/metrics.jsonl")}
    kinds = {"decoded_exact_match", "decoded_chrf", "decoded_accuracy"}
    assert kinds < set(rows["eval/both"]) and "loss" in rows["eval/both"]
    assert set(rows["eval/reverse"]) == {"step", "split", "decoded_exact_match", "decoded_chrf"}
    assert set(rows["eval/wn_syn_ant"]) == {"step", "split", "decoded_accuracy"}
    # As evaluate.py does on the same examples.
    found = scorecard.evaluate(experiment, metrics=("decoded",), num_examples=5)
    for each in found:
        split = each.row["split"].replace("validation", "eval")
        for name in kinds & set(each.row):
            assert rows[split][name] == each.row[name] == rows["eval/both"][name]
    assert "step 2: wn_syn_ant, decoded accuracy 0.00" in capsys.readouterr().out
    means = scorecard.Decoded({"decoded_chrf": 1.234}, {}).means
    assert scorecard.describe(means) == ", decoded chrf 1.23"


def test_text_cannot_be_decoded_and_judged(finished):
    data = dataclasses.replace(finished.data, mixture_or_task_name="embedded_prefix_lm")
    asked = dataclasses.replace(finished, data=data, num_decoded_examples=5)
    with pytest.raises(UserError, match="num_decoded_examples = 5: 'embedded_prefix_lm' has no"):
        scorecard.decoded_tasks(asked)
    assert scorecard.decoded_tasks(finished) == []
