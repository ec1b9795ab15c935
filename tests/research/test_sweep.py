"""Arms and trials of a sweep: counted by hand, the same for the same file."""

import dataclasses
import json
import math
import pathlib

import pytest

from switchx import configuration
from switchx.errors import UserError
from switchx.experiment import Experiment
from switchx.research.sweep import (
    Grid,
    Random,
    Search,
    Sweep,
    Zip,
    arms,
    combine,
    describe,
    fingerprint,
    make_trials,
)

BASE = ["gin_configs/switch_tiny.gin"]
SHIPPED = [
    path
    for path in sorted(pathlib.Path("gin_configs/sweeps").glob("*.gin"))
    if path.stem not in ("base", "minute")
]


def test_a_grid_is_every_combination_the_first_name_slowest():
    grid = Grid({"CAPACITY_FACTOR": [0.5, 2.0], "NUM_EXPERTS": [4, 8, 16]})
    assert [tuple(each.values()) for each in grid.settings()] == [
        (0.5, 4), (0.5, 8), (0.5, 16), (2.0, 4), (2.0, 8), (2.0, 16),
    ]  # fmt: skip


def test_a_zip_goes_side_by_side():
    zipped = Zip({"NUM_EXPERTS": [4, 8], "BATCH_SIZE": [32, 16]})
    assert zipped.settings() == [
        {"NUM_EXPERTS": 4, "BATCH_SIZE": 32},
        {"NUM_EXPERTS": 8, "BATCH_SIZE": 16},
    ]


def test_axes_multiply_and_a_condition_adds_only_where_it_holds():
    axes = [
        Grid({"gin_file": ["dense.gin", "sparse.gin"]}),
        Grid({"NUM_EXPERTS": [2, 4]}, when={"gin_file": "sparse.gin"}),
        Grid({"BATCH_SIZE": [8, 16]}),
    ]
    found = combine(axes)
    assert len(found) == 2 + 2 * 2
    assert found[0] == {"gin_file": "dense.gin", "BATCH_SIZE": 8}
    assert found[-1] == {"gin_file": "sparse.gin", "NUM_EXPERTS": 4, "BATCH_SIZE": 16}


def test_random_draws_lie_where_they_should_and_come_again():
    values = {
        "LEARNING_RATE": ("log_uniform", 1e-4, 1e-1),
        "DROPOUT_RATE": ("uniform", 0.1, 0.3),
        "NUM_EXPERTS": ("integer", 2, 5),
        "router": ("choice", ["switch", "top_k"]),
    }
    drawn = Random(values, num_samples=400, seed=3).settings()
    assert drawn == Random(values, num_samples=400, seed=3).settings()
    assert drawn != Random(values, num_samples=400, seed=4).settings()
    rates = [each["LEARNING_RATE"] for each in drawn]
    assert all(1e-4 <= rate <= 1e-1 for rate in rates)
    # Of a logarithm that is uniform, the median is the geometric mean of the ends.
    assert math.log10(sorted(rates)[200]) == pytest.approx(-2.5, abs=0.25)
    assert {each["NUM_EXPERTS"] for each in drawn} == {2, 3, 4, 5}
    assert all(0.1 <= each["DROPOUT_RATE"] <= 0.3 for each in drawn)
    assert {each["router"] for each in drawn} == {"switch", "top_k"}


def test_max_arms_spreads_over_the_list():
    axes = [Grid({"NUM_EXPERTS": [1, 2, 3, 4, 5, 6, 7]})]
    chosen = arms(Sweep(base=BASE, axes=axes, max_arms=3))
    assert [each["NUM_EXPERTS"] for each in chosen] == [1, 3, 5]


def test_trials_are_arms_times_seeds_all_arms_of_a_seed_first():
    sweep = Sweep(
        base=BASE,
        axes=[Grid({"CAPACITY_FACTOR": [1.0, 1.5]})],
        seeds=[3, 5],
        bindings={"TRAIN_STEPS": 70},
        eval_axes=[Grid({"EVAL_CAPACITY_FACTOR": ["%CAPACITY_FACTOR", 4.0]})],
    )
    found = list(make_trials(sweep, arms(sweep)))
    assert [(t.seed, t.settings["CAPACITY_FACTOR"]) for t, _ in found] == [
        (3, 1.0), (3, 1.5), (5, 1.0), (5, 1.5),
    ]  # fmt: skip
    trial, experiment = found[1]
    assert experiment.seed == experiment.data.seed == 3
    assert experiment.train_steps == trial.steps == 70
    assert experiment.model.moe.capacity_factor == 1.5
    assert trial.task == "embedded_span_corruption"
    assert trial.eval_settings == [{"EVAL_CAPACITY_FACTOR": 1.5}, {"EVAL_CAPACITY_FACTOR": 4.0}]
    assert trial.name == f"capacity_factor=1.5-s3-{trial.hash[:8]}"
    assert len({each.hash for each, _ in found}) == 4
    assert [t.hash for t, _ in make_trials(sweep, arms(sweep))] == [t.hash for t, _ in found]


def test_the_fingerprint_is_of_everything_but_places():
    one = configuration.build(Experiment, BASE)
    elsewhere = dataclasses.replace(one, model_dir="elsewhere", compilation_cache_dir="there")
    assert fingerprint(one) == fingerprint(elsewhere)
    assert fingerprint(one) != fingerprint(dataclasses.replace(one, eval_steps=7))
    deep = dataclasses.replace(one, data=dataclasses.replace(one.data, seed=1))
    assert fingerprint(one) != fingerprint(deep)


def test_settings_in_a_line():
    assert describe({}) == "the base"
    settings = {"gin_file": "gin_configs/routers/top_k.gin", "LEARNING_RATE": 0.0123456}
    assert describe(settings) == "gin_file = top_k, LEARNING_RATE = 0.01235"
    assert describe({"INITIAL_CHECKPOINT_PATH": "/data/long/runs/tiny"}).endswith("= runs/tiny")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Grid({}), "Grid.values is empty"),
        (lambda: Grid({"NUM_EXPERTS": []}), "NUM_EXPERTS has no values"),
        (lambda: Grid({"NUM_EXPERTS": "8"}), "should be a list"),
        (lambda: Grid(["NUM_EXPERTS"]), r"Grid.values = \['NUM_EXPERTS'\] should be"),  # type: ignore
        (lambda: Grid({"NUM_EXPERTS": [Grid]}), "NUM_EXPERTS has <class .*cannot hold"),
        (lambda: Grid({"MESH": [{1: 2}]}), "MESH has {1: 2}, which trial.json cannot hold"),
        (lambda: Grid({"A": [1]}, when=["B"]), "Grid.when"),  # type: ignore
        (lambda: Random({"A": ("uniform", 0, 1)}, num_samples=2.5), "a float, should be int"),  # type: ignore
        (lambda: Zip({"A": [1], "B": [1, 2]}), "A 1, B 2"),
        (lambda: Random({"A": ("normal", 0, 1)}), "no distribution"),
        (lambda: Random({"A": ("log_uniform", 0, 1)}), r"\('log_uniform', low, high\)"),
        (lambda: Search({"A": ("integer", 5, 2)}), r"\('integer', low, high\)"),
        (lambda: Search({"A": ("choice", 1)}), r"\('choice', \[a, b"),
        (lambda: Sweep(base=BASE, seeds=[]), "one or more different seeds"),
        (lambda: Sweep(base=BASE, seeds=[1, 1]), "one or more different seeds"),
        (lambda: Sweep(base=BASE, axes=[7]), "no Grid, Zip or Random"),
        (lambda: Sweep(base=BASE, kind="tune"), "did you mean 'finetune'"),
        (
            lambda: Sweep(base=BASE, axes=[Grid({"A": [1]}), Zip({"A": [2]})]),
            "A is bound twice",
        ),
        (lambda: Sweep(base=BASE, axes=[Grid({"A": [1]})], bindings={"A": 2}), "A is bound twice"),
        (
            lambda: Sweep(
                base=BASE,
                axes=[Grid({"MoeConfig.top_k": [1]}), Grid({"layer.MoeConfig.top_k": [2]})],
            ),
            r"layer.MoeConfig.top_k is bound twice \(as MoeConfig.top_k too\)",
        ),
        (
            lambda: Sweep(base=BASE, axes=[Grid({"moe.layer.C.a": [1], "layer.C.a": [2]})]),
            r"moe.layer.C.a is bound twice \(as layer.C.a too\)",
        ),
        (lambda: Sweep(base=BASE, axes=[Grid({"A\nB": [1]})]), r"'A\\nB' is no name"),
        (
            lambda: Sweep(
                base=BASE, axes=[Grid({"A": [1]})], eval_axes=[Grid({"A": [2], "B": [1]})]
            ),
            "eval_axes: A is one of the axes too",
        ),
        (lambda: Sweep(base=BASE, axes=[Grid({"RANDOM_SEED": [1]})]), "for Sweep.seeds to say"),
        (lambda: Sweep(base=BASE, bindings={"MODEL_DIR": "x"}), "for Sweep.model_dir to say"),
        (
            lambda: Sweep(base=BASE, axes=[Grid({"experiment.Experiment.model_dir": ["x"]})]),
            "Experiment.model_dir is for Sweep.model_dir to say",
        ),
        (
            lambda: Sweep(base=BASE, axes=[Grid({"first/Experiment.seed": [1]})]),
            "first/Experiment.seed is for Sweep.seeds to say",
        ),
        (
            lambda: Sweep(
                base=BASE, axes=[Grid({"router": ["a"]}), Grid({"B": [1]}, when={"rooter": "a"})]
            ),
            "did you mean 'router'",
        ),
        (
            lambda: Sweep(
                base=BASE, axes=[Grid({"A": [1]})], search=Search({"B": ("uniform", 0, 1)})
            ),
            "search",
        ),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_a_condition_that_never_holds_is_named():
    axes = [Grid({"CAPACITY_FACTOR": [1.0]}), Grid({"B": [1]}, when={"CAPACITY_FACTOR": 2.0})]
    with pytest.raises(UserError, match="holds for no arm, and B would never be set"):
        arms(Sweep(base=BASE, axes=axes))


def test_two_axes_may_share_a_name_where_their_conditions_exclude_each_other():
    router = Grid({"router": ["a", "b"]})
    first = Grid({"LEARNING_RATE": [1.0]}, when={"router": "a"})
    second = Grid({"LEARNING_RATE": [2.0, 3.0]}, when={"router": "b"})
    assert len(arms(Sweep(base=BASE, axes=[router, first, second]))) == 3


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"base": ["gin_configs/switch_tinny.gin"]}, "switch_tiny.gin"),
        ({"axes": [Grid({"CAPACITY_FACTR": [1.0]})]}, "did you mean 'CAPACITY_FACTOR'.*arm CAP"),
        ({"axes": [Grid({"CAPACITY_FACTOR": [-1.0]})]}, "arm CAPACITY_FACTOR = -1"),
        ({"axes": [Grid({"gin_file": [3]})]}, "gin_file = 3 should be a gin file"),
        ({"eval_axes": [Grid({"EVAL_CAPACITY_FACTOR": ["%CAPACITY"]})]}, "CAPACITY"),
        ({"eval_axes": [Grid({"EVAL_CAPACTY_FACTOR": [2.0]})]}, "did you mean 'eval_capacity_f"),
        ({"eval_axes": [Grid({"EVAL_CAPACITY_FACTOR": ["two"]})]}, "eval_axes: .*should be float"),
        ({"eval_axes": [Grid({"MIXTURE_OR_TASK_NAME": ["recal"]})]}, "did you mean 'recall'"),
        ({"eval_axes": [Grid({"NUM_EXPERTS": [4]})]}, "make it one of axes"),
    ],
)
def test_arms_that_cannot_be_built_are_named(changed, message):
    sweep = Sweep(base=changed.pop("base", BASE), **changed)
    with pytest.raises(UserError, match=message):
        list(make_trials(sweep, arms(sweep)))


def test_arms_that_are_the_same_are_refused():
    sweep = Sweep(base=BASE, axes=[Grid({"CAPACITY_FACTOR": [1, 1.0]})])
    with pytest.raises(UserError, match="same"):
        list(make_trials(sweep, arms(sweep)))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """What a configuration reads of runs that fine-tuning starts from: no parameters."""
    for name in ("switch_tiny", "t5_tiny"):
        experiment = configuration.build(Experiment, [f"gin_configs/{name}.gin"])
        folder = tmp_path_factory.getbasetemp() / name
        folder.mkdir()
        (folder / "model.json").write_text(experiment.model.to_json())
        (folder / "config.json").write_text(json.dumps(dataclasses.asdict(experiment)))
    return tmp_path_factory.getbasetemp()


@pytest.mark.parametrize("file", SHIPPED, ids=lambda path: path.stem)
def test_every_sweep_that_ships_is_built(file, pretrained):
    text = file.read_text()
    for word in ("Hypothesis:", f"Command: python scripts/sweep.py {file}", "result:"):
        assert word in text
    runs = {"CHECKPOINT": "switch_tiny", "SPARSE": "switch_tiny", "DENSE": "t5_tiny"}
    bindings = [
        f"{macro}={pretrained / name}"
        for macro, name in runs.items()
        if f"{macro} = 'runs/{name}'" in text
    ]
    sweep = configuration.build(Sweep, [str(file)], bindings)
    assert len(sweep.seeds) >= 3
    one_seed = dataclasses.replace(sweep, seeds=sweep.seeds[:1])
    assert len(list(make_trials(one_seed, arms(one_seed)))) == len(arms(sweep)) >= 2
    small = configuration.build(Sweep, [str(file), "gin_configs/sweeps/minute.gin"], bindings)
    assert len(list(make_trials(small, arms(small)))) == 2
