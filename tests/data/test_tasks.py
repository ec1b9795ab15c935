"""Declarations of tasks, and reading the files behind a `FileTask`."""

import json
import os

import pytest

from switchx.data import corpus, tasks
from switchx.data.tasks import FileTask, TfdsTask
from switchx.errors import UserError


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_embedded_tasks_are_those_shipped():
    shipped = {path.name.split(".")[0] for path in (corpus.EMBEDDED / "tasks").iterdir()}
    assert set(tasks.EMBEDDED_SUPERVISED) == shipped
    assert len(shipped) == 11


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
    ({"metrics": "rouge"}, "metrics has the unknown 'rouge'; did you mean 'rouge_l'"),
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
