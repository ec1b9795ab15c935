import json

import pytest

from switchx.data import eval_tasks, pipeline
from switchx.data.mixtures import Mixture
from switchx.data.pipeline import DataConfig
from switchx.data.tasks import FileTask
from switchx.errors import UserError


@pytest.fixture
def config(tmp_path) -> DataConfig:
    lines = [{"q": "ab", "a": "c"}, {"q": "abcdefgh", "a": "longer"}, {"q": "", "a": "e"}]
    (tmp_path / "all.jsonl").write_text("\n".join(map(json.dumps, lines)))
    mine = FileTask(
        name="mine",
        files=str(tmp_path / "all.jsonl"),
        validation_files=str(tmp_path / "all.jsonl"),
        objective="supervised",
        inputs_field="q",
        targets_field="a",
    )
    return DataConfig(
        mixture_or_task_name="both",
        task_feature_lengths={"inputs": 6, "targets": 4},
        vocabulary="bytes",
        tasks=(mine, Mixture(name="both", tasks=("wn_syn_ant", "mine"))),
    )


def test_examples_are_cut_to_rows_and_end_in_eos(config):
    task = eval_tasks.build(config, "mine", split="validation")
    byte = {letter: ord(letter) + 3 for letter in "abcdefghlongr"}
    first, second, third = task.examples
    assert first.inputs.tolist() == [byte["a"], byte["b"], 1]
    assert first.targets.tolist() == [byte["c"], 1] and first.target == ["c"]
    assert (first.cut_inputs, first.cut_targets) == (0, 0)
    assert second.inputs.tolist() == [byte[letter] for letter in "abcde"] + [1]
    assert second.targets.tolist() == [byte[letter] for letter in "lon"] + [1]
    assert (second.cut_inputs, second.cut_targets) == (3, 3)
    # Metrics compare with all of the target.
    assert second.target == ["longer"] and second.targets_text == "longer"
    assert third.inputs.tolist() == [1]
    assert task.measure(["c", "longer", "x"]) == {"exact_match": pytest.approx(200 / 3)}
    assert task.options is None and task.task_id == 1


def test_embedded_tasks_have_references_and_options(config):
    task = eval_tasks.build(config, "wn_reverse_dictionary", split="validation", num_examples=2)
    assert task.examples[0].target == ["motorcycle", "bike"]
    assert task.measure(["bike", "?"]) == {"exact_match": 50.0}
    labels = eval_tasks.build(config, "wn_syn_ant", split="validation", num_examples=5)
    assert labels.options == ("antonyms", "synonyms") and labels.task_id == 0
    assert pipeline.label_options(config, "date_iso") is None


def test_text_has_no_right_answer(config):
    assert eval_tasks.build(config, "embedded_span_corruption", split="validation") is None


def test_mistakes(config):
    with pytest.raises(UserError, match="'mine' has no split 'test'; valid: train, validation"):
        eval_tasks.build(config, "mine", split="test")
    with pytest.raises(UserError, match="'date_iso' has no split 'tst'; did you mean 'test'"):
        eval_tasks.build(config, "date_iso", split="tst")
