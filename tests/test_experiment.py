import dataclasses
import pathlib

import jax
import pytest

from switchx import sharding
from switchx.data.pipeline import DataConfig
from switchx.errors import UserError
from switchx.experiment import Experiment, check_fits, use_compilation_cache
from switchx.models.config import ModelConfig
from switchx.moe.config import MoeConfig

EXPERIMENT = Experiment(
    model=ModelConfig(vocab_size=384, moe=MoeConfig(num_experts=6, group_size=512)),
    data=DataConfig(
        task_feature_lengths={"inputs": 128, "targets": 30}, batch_size=24, vocabulary="bytes"
    ),
)


def check(mesh: dict[str, int] | None = None, *, moe=None, model=None, data=None, **changes):
    shape = mesh or {"data": 1}
    devices = 1
    for size in shape.values():
        devices *= size
    config = dataclasses.replace(EXPERIMENT.model, **(model or {}))
    if moe:
        config = dataclasses.replace(config, moe=dataclasses.replace(config.moe, **moe))
    experiment = dataclasses.replace(
        EXPERIMENT,
        model=config,
        data=dataclasses.replace(EXPERIMENT.data, **(data or {})),
        **changes,
    )
    check_fits(experiment, sharding.make_mesh(shape, jax.devices()[:devices]))


def test_train_flops_are_three_forwards_of_every_row():
    flops = EXPERIMENT.model.flops_per_sequence(128, 30)
    assert EXPERIMENT.train_flops == 3 * 24 * flops


def test_what_fits():
    check()
    check({"data": 2})
    check({"data": 1, "expert": 2})
    check(num_microbatches=2)
    check({"data": 2}, num_microbatches=3, moe={"group_size": "row"})


def test_compiled_programs_are_kept_unless_the_environment_says_where(monkeypatch, tmp_path):
    given = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        for folder, expected in ((None, given), (str(tmp_path / "own"), given)):
            use_compilation_cache(dataclasses.replace(EXPERIMENT, compilation_cache_dir=folder))
            assert jax.config.jax_compilation_cache_dir == expected  # of tests/conftest.py
        for folder, expected in ((None, tmp_path / "switchx/compiled"), ("~/own", None)):
            jax.config.update("jax_compilation_cache_dir", None)
            use_compilation_cache(dataclasses.replace(EXPERIMENT, compilation_cache_dir=folder))
            expected = expected or pathlib.Path.home() / "own"
            assert jax.config.jax_compilation_cache_dir == str(expected)
    finally:
        jax.config.update("jax_compilation_cache_dir", given)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(model={"vocab_size": 300}), "vocab_size = 300 is too small .* 359 ids"),
        (dict(num_microbatches=5), r"BATCH_SIZE = 24 .* NUM_MICROBATCHES = 5; 20 and 25 are"),
        (dict(mesh={"data": 7}), r"BATCH_SIZE = 24 .* 7 data x fsdp x expert .*; 21 and 28 are"),
        (dict(mesh={"expert": 4}), r"moe.num_experts = 6 .* 4 devices of mesh axis 'expert'"),
        (dict(mesh={"model": 8}), r"num_heads = 12 .* mesh axis 'model'"),
        (dict(mesh={"data": 8}), r"group_size = 512: .* 1 microbatch\(es\) x 8 device\(s\)"),
        (dict(moe={"group_size": 100}), r"group_size = 100: .* what fits: row, 128"),
    ],
)
def test_what_does_not_fit_says_so(arguments, message):
    with pytest.raises(UserError, match=message) as error:
        check(**arguments)
    assert "\n" not in str(error.value)


def test_routing_by_task_needs_to_know_the_tasks(monkeypatch):
    data = {"mixture_or_task_name": "embedded_pretrain_and_tasks"}
    check(moe={"router": "task", "num_tasks": 99}, data=data)
    with pytest.raises(UserError, match="num_tasks = 1: the mixture .* has [0-9]+ tasks; set"):
        check(moe={"router": "task"}, data=data)
    monkeypatch.setattr("switchx.data.pipeline.knows_tasks", lambda config: False)
    with pytest.raises(UserError, match=r"router = 'task': .* streams .*scripts/cache.py"):
        check(moe={"router": "task", "num_tasks": 99}, data=data)


def test_the_sizes_that_are_offered_fit():
    with pytest.raises(UserError) as error:
        check({"data": 4})
    sizes = str(error.value).rsplit(": ", 1)[1].split(", ")
    assert sizes[0] == "row" and len(sizes) > 1
    for size in sizes:
        check({"data": 4}, moe={"group_size": int(size) if size.isdigit() else size})
