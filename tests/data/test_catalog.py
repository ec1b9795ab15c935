"""What names stand for, and what a task says of itself."""

import pytest

from switchx.data import catalog, pipeline, tasks
from switchx.data.glue import GlueTask
from switchx.data.instructions import InstructionTask
from switchx.data.mixtures import Mixture
from switchx.data.pipeline import DataConfig
from switchx.data.tasks import FileTask, TfdsTask
from switchx.errors import UserError


def test_names_and_what_they_are():
    own = FileTask("mine", "a.jsonl"), TfdsTask("data", "glue/rte"), Mixture("both", ["mine"])
    config = DataConfig(tasks=own, tfds_data_dir="/x")
    assert catalog.find_task(config, "mine") is own[0]
    assert catalog.find_mixture(config, "both") is own[2]
    assert (
        catalog.find_task(config, "both") is None and catalog.find_mixture(config, "mine") is None
    )
    assert catalog.find_task(config, "date_iso") is tasks.EMBEDDED["date_iso"]
    found = catalog.find_task(config, "glue_rte_v002")
    assert isinstance(found, GlueTask) and found.data_dir == "/x"
    assert isinstance(catalog.find_task(config, "date_iso_instructions"), InstructionTask)
    for unknown in ("date", "mine_instructions", "date_iso_instructions_instructions"):
        assert catalog.find_task(config, unknown) is None
    assert {"mine", "both", "glue", "date_iso_instructions"} <= catalog.names(config)


def test_what_needs_tensorflow():
    config = DataConfig(tasks=[FileTask("mine", "a.jsonl"), TfdsTask("data", "glue/rte")])
    for name, needs in (
        ("mine", False),
        ("data", True),
        ("date_iso_instructions", False),
        ("glue_rte_v002", True),
    ):
        found = catalog.find_task(config, name)
        assert found is not None and catalog.needs_tensorflow(found) is needs


@pytest.mark.parametrize("name", ["glue", "glue_rte_v002", "recall", "date_iso_instructions"])
def test_names_that_ship_are_not_hidden(name):
    with pytest.raises(UserError, match=f"hides the embedded '{name}'; rename"):
        DataConfig(tasks=[FileTask(name, "a.jsonl")])


def test_what_tasks_say_of_themselves():
    own = FileTask("mine", "a.jsonl", objective="supervised", options=["b", "a"], metrics="f1")
    config = DataConfig(tasks=[own])
    assert pipeline.label_options(config, "mine") == ("b", "a")
    assert pipeline.label_options(config, "wn_syn_ant") == ("antonyms", "synonyms")
    assert pipeline.label_options(config, "wn_syn_ant_instructions") == ("antonyms", "synonyms")
    assert pipeline.label_options(config, "date_iso") is None
    assert pipeline.metric_names(config, "wn_define") == ("rouge_l", "chrf")
    assert pipeline.metric_names(config, "super_glue_cb_v102") == ("mean_multiclass_f1", "accuracy")
    assert pipeline.splits(config, "mine") == ("train", "validation")
    (metric,) = pipeline.metric_functions(config, "mine")
    assert metric(["a", "b"], ["a", "a"]) == {"f1": pytest.approx(200 / 3)}
    row = pipeline.examples(config, "wn_reverse_dictionary", "validation")[0]
    assert row["targets"] == "motorcycle" and row["references"] == "motorcycle\nbike"
    for call in (pipeline.label_options, pipeline.metric_names, pipeline.splits):
        with pytest.raises(UserError, match="called 'date_is'; did you mean 'date_iso'"):
            call(config, "date_is")
    with pytest.raises(UserError, match="task 'date_iso' has no split 'dev'"):
        pipeline.examples(config, "date_iso", "dev")
