import dataclasses
import json

import pytest

from switchx.data.facts import FactsTask
from switchx.data.mixtures import Mixture
from switchx.data.pipeline import DataConfig
from switchx.data.tasks import FileTask, TfdsTask
from switchx.errors import UserError
from switchx.experiment import Experiment
from switchx.models.config import ModelConfig
from switchx.moe.config import MoeConfig
from switchx.reconstruction import change, reconstruct

EXPERIMENT = Experiment(
    model=ModelConfig(
        activations=("gelu", "linear"),
        moe=MoeConfig(num_experts=4),
        decoder_moe=MoeConfig(num_experts=8),
        decoder_sparse_layers=(1, 3),
    ),
    data=DataConfig(
        mixture_or_task_name="both",
        tasks=(
            FileTask(name="mine", files=["a.jsonl", "b.jsonl"], metrics=["chrf"]),
            TfdsTask(name="rte", tfds_name="glue/rte", splits={"train": "train[:1%]"}),
            FactsTask(name="facts", num_facts=100),
            Mixture(name="both", tasks=["mine", "rte"], rates={"mine": 1, "rte": 2.5}),
        ),
    ),
    mesh={"data": 2, "expert": 4},
)


def plain(config) -> dict:
    return json.loads(json.dumps(dataclasses.asdict(config)))


def test_a_configuration_survives_json():
    assert reconstruct(Experiment, plain(EXPERIMENT), "config.json") == EXPERIMENT


def test_missing_fields_take_their_defaults():
    values = plain(EXPERIMENT)
    del values["seed"], values["data"]["pack"], values["data"]["tasks"][0]["text_field"]
    assert reconstruct(Experiment, values, "config.json") == EXPERIMENT


def test_what_does_not_fit_is_named():
    values = plain(EXPERIMENT)
    with pytest.raises(UserError, match=r"^here: Experiment has no field 'sead'; did you mean 's"):
        reconstruct(Experiment, values | {"sead": 1}, "here")
    with pytest.raises(UserError, match="here: should be fields of Experiment, has no 'model'"):
        reconstruct(Experiment, {"data": values["data"]}, "here")
    with pytest.raises(UserError, match="here: no object with the fields of Experiment"):
        reconstruct(Experiment, [], "here")
    with pytest.raises(UserError, match="train_steps = 'many'"):
        reconstruct(Experiment, values | {"train_steps": "many"}, "here")
    values["data"]["tasks"] = [{"name": "x", "colour": "red"}]
    with pytest.raises(UserError, match="TfdsTask or FactsTask or Mixture, has other keys: na"):
        reconstruct(Experiment, values, "here")


def test_changes_by_field_class_or_macro():
    changed = change(
        EXPERIMENT,
        [
            "BATCH_SIZE=3",
            "Experiment.eval_steps=None",
            "eval_capacity_factor=1.5",
            "TASK_FEATURE_LENGTHS={'inputs': 9, 'targets': 7}",
            "DataConfig.vocabulary=/a/b.model",
        ],
    )
    assert changed.data.batch_size == 3 and changed.eval_steps is None
    assert changed.data.vocabulary == "/a/b.model"
    assert changed.data.task_feature_lengths == {"inputs": 9, "targets": 7}
    # Wherever the class appears.
    assert {moe.eval_capacity_factor for moe in changed.model.stack_moe.values()} == {1.5}
    assert changed.data.tasks == EXPERIMENT.data.tasks
    assert change(EXPERIMENT, []) == EXPERIMENT


def test_changes_that_do_not_fit():
    with pytest.raises(UserError, match="nothing is called 'BATCH_SISE'; did you mean 'batch_size"):
        change(EXPERIMENT, ["BATCH_SISE=3"])
    with pytest.raises(UserError, match="which one. write DataConfig.seed or Experiment.seed"):
        change(EXPERIMENT, ["seed=3"])
    with pytest.raises(UserError, match="batch_size = 0: should be at least 1"):
        change(EXPERIMENT, ["BATCH_SIZE=0"])
