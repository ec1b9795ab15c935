"""Declarations of tasks, and reading the files behind a `FileTask`."""

import json
import os
import re

import pytest

from switchx.data import corpus, tasks
from switchx.data.tasks import FileTask, TfdsTask
from switchx.errors import UserError


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_embedded_tasks_are_those_shipped():
    shipped = {path.name.split(".")[0] for path in (corpus.EMBEDDED / "tasks").iterdir()}
    supervised = {n for n, task in tasks.EMBEDDED.items() if task.objective == "supervised"}
    assert supervised == shipped
    assert len(shipped) == 11


def test_options_are_the_labels_of_the_shipped_tasks():
    counts = {}
    for name, task in tasks.EMBEDDED.items():
        if task.options is not None:
            rows = [row for split in task.splits for row in task.examples(split)]
            assert {row["targets"] for row in rows} == set(task.options)
            counts[name] = len(task.options)
    assert counts == {"sotu_period": 4, "wn_hypernym_nli": 2, "wn_supersense": 25, "wn_syn_ant": 2}


# What the rows of a task were grouped by before they were split, read off their inputs.
GROUPS = {
    "cldr_names": r"Translate the (.* name) from English to \w+(: .*)",
    "cmudict_g2p": r'Pronounce the word "(.*)" in ARPAbet phonemes\.',
    "date_iso": None,
    "inflection": r'Give the .* of the \w+ "(.*)"\.',
    "num2words": r"Write the number (.*) in \w+ words\.",
    "wn_define": r'Define the \w+ "(.*?)" as used in: .*',
    "wn_hypernym_nli": r"Premise: this is an? (.*?) \(.*",
    "wn_reverse_dictionary": None,
    "wn_supersense": r'What kind of thing is "(.+?)" \(.*',
    "wn_syn_ant": r'Are "(.*)" and ".*" synonyms or antonyms\?',
}


@pytest.mark.parametrize("name", GROUPS)
def test_no_group_is_in_two_splits(name):
    pattern = GROUPS[name]
    groups = {}
    for split in corpus.SPLITS:
        for row in corpus.embedded_task(name, split):
            # Dates by the day, definitions by the word.
            match = pattern and re.fullmatch(pattern, row["inputs"], re.DOTALL)
            assert match or pattern is None, row["inputs"]
            group = match.groups() if match else row["targets"]
            groups.setdefault(group, set()).add(split)
    assert len(groups) > 1000
    assert not [group for group, splits in groups.items() if len(splits) > 1]


@pytest.mark.parametrize("name", [*GROUPS, "sotu_period"])
def test_nothing_says_the_same_in_two_splits(name):
    train, validation, test = (
        {tuple(sorted(re.findall(r"\w+", row["inputs"].lower()))) for row in rows}
        for rows in (corpus.embedded_task(name, split) for split in corpus.SPLITS)
    )
    assert not train & validation and not train & test and not validation & test


def test_pairs_of_words_the_other_way_round_are_left_out():
    counts = {split: len(corpus.embedded_task("wn_syn_ant", split)) for split in corpus.SPLITS}
    assert counts == {"train": 5793, "validation": 495, "test": 500}
    assert len(corpus.embedded_rows("wn_syn_ant", "train")) == 6000
    assert len(corpus.embedded_task("sotu_period", "train")) == 5999


def test_text_files_are_held_out_by_content(tmp_path):
    rows = [{"text": f"piece {i}"} for i in range(200)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    task = FileTask("mine", str(tmp_path / "*.jsonl"), validation_fraction=0.1)
    train, validation = task.examples("train"), task.examples("validation")
    assert len(validation) > 5
    assert sorted(map(str, [*train, *validation])) == sorted(map(str, rows))
    # The same rows over two files, in another order, are split alike.
    write_jsonl(tmp_path / "a.jsonl", rows[150:])
    write_jsonl(tmp_path / "b.jsonl", rows[:150])
    again = FileTask("mine", [path, str(tmp_path / "b.jsonl")], validation_fraction=0.1)
    assert {e["text"] for e in again.examples("validation")} == {e["text"] for e in validation}


def test_labels_must_be_options(tmp_path):
    rows = [{"inputs": str(i), "targets": label} for i, label in enumerate(["yes", "no"] * 10)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    task = FileTask("mine", path, objective="supervised", options=["no", "yes"])
    assert len(task.examples("train")) + len(task.examples("validation")) == 20
    write_jsonl(tmp_path / "a.jsonl", [*rows, {"inputs": "x", "targets": "yess"}])
    with pytest.raises(UserError, match="a.jsonl:21: targets 'yess' is none of the options; did"):
        task.examples("train")
    # The cache of tokens must not be taken for one that was checked against other labels.
    plain = FileTask("mine", path, objective="supervised")
    assert {**plain.content(), "options": ["no", "yes"]} == task.content()


@pytest.mark.parametrize("name", ["a.jsonl", "a.tsv", "a.csv"])
def test_twenty_lines_are_split(tmp_path, name):
    pairs = [(f"question {i}", f"answer {i}") for i in range(20)]
    if name == "a.jsonl":
        write_jsonl(tmp_path / name, [{"inputs": a, "targets": b} for a, b in pairs])
    else:
        mark = "," if name == "a.csv" else "\t"
        lines = [mark.join(row) for row in [("inputs", "targets"), *pairs]]
        (tmp_path / name).write_text("\n".join(lines))
    task = FileTask("mine", str(tmp_path / name), objective="supervised")
    train, validation = task.examples("train"), task.examples("validation")
    assert 1 <= len(validation) <= 3 and len(train) + len(validation) == 20
    assert not {row["inputs"] for row in train} & {row["inputs"] for row in validation}


def test_validation_files_are_used_as_they_are(tmp_path):
    train = write_jsonl(tmp_path / "a.jsonl", [{"q": "1", "a": 2}])
    validation = write_jsonl(tmp_path / "b.jsonl", [{"q": "3", "a": 4}])
    task = FileTask(
        "mine",
        [train],
        validation_files=validation,
        objective="supervised",
        inputs_field="q",
        targets_field="a",
    )
    assert task.examples("train") == [{"inputs": "1", "targets": "2"}]
    assert task.examples("validation") == [{"inputs": "3", "targets": "4"}]


def test_a_changed_file_is_read_again(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\n\n" * 400)
    task = FileTask("mine", str(path), validation_files=str(path))
    assert len(task.examples("train")) == 1
    assert task.examples("train") is task.examples("train")
    path.write_text("two\n\n" * 500)
    os.utime(path, ns=(1, 1))
    assert task.examples("train")[0]["text"].startswith("two")


def test_format_overrides_the_extension(tmp_path):
    path = tmp_path / "a.data"
    path.write_text("text\tn\nhello\t1\nworld\t2\n")
    with pytest.raises(UserError, match="cannot tell the format"):
        FileTask("mine", str(path)).examples("train")
    task = FileTask("mine", str(path), validation_files=str(path), format="tsv")
    assert [e["text"] for e in task.examples("train")] == ["hello", "world"]


def test_files_that_do_not_do(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("only one piece")
    with pytest.raises(UserError, match="a.txt' .task 'mine'.: one example cannot be split"):
        FileTask("mine", str(text)).examples("train")
    with pytest.raises(UserError, match="a.txt' is plain text; objective 'supervised' needs"):
        FileTask("mine", str(text), objective="supervised").examples("train")
    with pytest.raises(UserError, match="b.txt' does not exist"):
        FileTask("mine", str(tmp_path / "b.txt")).examples("train")


FILE_MISTAKES = [
    ({"name": "my-text"}, "FileTask.name = 'my-text': should be letters"),
    ({"name": 3}, "FileTask.name = 3: a int, should be str"),
    ({"files": []}, "FileTask.files = \\[\\]: should be strings"),
    ({"files": ["a", None]}, "FileTask.files = "),
    ({"validation_files": ""}, "FileTask.validation_files = ''"),
    ({"validation_fraction": 1}, "validation_fraction = 1: should be between 0 and 1"),
    ({"validation_fraction": "0.1"}, "validation_fraction = '0.1': a str"),
    ({"format": "json"}, "FileTask.format = 'json' is unknown; did you mean 'jsonl'"),
    ({"objective": "span_corupt"}, "objective = .* did you mean 'span_corruption'"),
    ({"objective": "supervised", "format": "text"}, "has no inputs and targets"),
    ({"text_field": ""}, "FileTask.text_field = ''"),
    ({"metrics": "rouge"}, "metrics has the unknown 'rouge'; did you mean 'rouge_"),
    ({"options": ["a", "b"]}, "options are the labels of objective 'supervised', not of 'span"),
    ({"objective": "supervised", "options": ["a", "a"]}, "at least two labels, none of them twice"),
    ({"objective": "supervised", "options": ["a"]}, "FileTask.options = .*at least two labels"),
    ({"objective": "supervised", "options": []}, "FileTask.options = "),
]


@pytest.mark.parametrize(("options", "message"), FILE_MISTAKES)
def test_file_task_mistakes(unchecked, options, message):
    with pytest.raises(UserError, match=message) as caught:
        FileTask(**{"name": "mine", "files": "a.txt", **options})
    assert "\n" not in str(caught.value)


TFDS_MISTAKES = [
    ({"name": ""}, "TfdsTask.name = ''"),
    ({"tfds_name": ""}, "TfdsTask.tfds_name = ''"),
    ({"objective": "supervise"}, "did you mean 'supervised'"),
    ({"inputs_fields": ()}, "TfdsTask.inputs_fields = "),
    ({"splits": {"validation": "test"}}, "a mapping with 'train' in it"),
    ({"splits": {"train": "train", "valid": "test"}}, "'valid'; did you mean 'validation'"),
    ({"splits": {"train": ""}}, "TfdsTask.splits = "),
    ({"download": "yes"}, "TfdsTask.download = 'yes': a str, should be bool"),
    ({"metrics": ["exact"]}, "metrics has the unknown 'exact'"),
]


@pytest.mark.parametrize(("options", "message"), TFDS_MISTAKES)
def test_tfds_task_mistakes(unchecked, options, message):
    with pytest.raises(UserError, match=message) as caught:
        TfdsTask(**{"name": "mine", "tfds_name": "glue/rte", **options})
    assert "\n" not in str(caught.value)


def test_declarations_hash():
    assert (
        len({FileTask("a", ["x"]), FileTask("a", "x"), TfdsTask("a", "b"), TfdsTask("a", "b")}) == 2
    )
