"""Plans of small models: ranked, refused, mended; and the compiled step beside the formulas."""

import argparse
import dataclasses
import json

import jax
import pytest

from switchx import configuration
from switchx.errors import UserError
from switchx.moe.config import MoeConfig
from switchx.research import planning, topologies
from switchx.research.planning import Planner, mesh_shape
from switchx.research.topologies import Accelerator, Topology, parse
from tests.research.test_benchmark import EXPERIMENT as SMALL

# 8 rows of 40 + 24 tokens; 4 experts, 2 + 2 layers of width 16; groups of a row.
EXPERIMENT = SMALL
PLANNER = Planner(EXPERIMENT)
CPU = Accelerator("cpu", "cpu", 2**30, 1e10, 1e10, 1e10, 1e10)


def total(plan: planning.Plan, kind: str, *, more_than: int = 0) -> int:
    return sum(
        each.collective.bytes
        for each in plan.exchanges
        if each.collective.kind == kind and each.collective.group > more_than
    )


def test_the_two_engines_agree():
    experiment = dataclasses.replace(EXPERIMENT, model=_larger())
    planner, topology = Planner(experiment), Topology("cpu:2", CPU, (1, 2))
    shape = {"expert": 2}
    expected, compiled = planner.analytic(topology, shape), planner.exact(topology, shape)
    # Slots to experts and back, and their gradients, to the byte.
    assert total(compiled, "all-to-all") == total(expected, "all-to-all") > 0
    # Gradients, within an embedding's that the compiler sums once more.
    assert total(compiled, "all-reduce") == pytest.approx(total(expected, "all-reduce"), rel=0.2)
    assert total(compiled, "all-gather") == 0
    assert compiled.peak == pytest.approx(expected.peak, rel=0.15)
    assert compiled.memory == expected.memory and compiled.parts == expected.parts
    assert compiled.flops == expected.flops > expected.model_flops / 2


def _larger():
    moe = MoeConfig(num_experts=4, group_size="row", jitter_noise=0.0)
    return dataclasses.replace(EXPERIMENT.model, d_model=64, d_ff=96, head_dim=32, moe=moe)


def test_an_exact_plan_for_a_tpu_that_is_not_there():
    pytest.importorskip("libtpu")
    model = dataclasses.replace(_larger(), num_encoder_layers=1, dtype="bfloat16")
    planner = Planner(dataclasses.replace(EXPERIMENT, model=model))
    plan = planner.exact(parse("v5e:2x2"), {"expert": 4})
    assert plan.kind == "TPU v5 lite" and plan.fits
    assert total(plan, "all-to-all") > 0 and total(plan, "all-gather") == 0


def test_meshes_are_ranked_and_the_impossible_ones_explained():
    shapes = [{"data": 8}, {"expert": 4, "data": 2}, {"data": 3}, {"expert": 8}, {"fsdp": 8}]
    plans, refused = planning.plan(EXPERIMENT, parse("h100:8"), shapes, "analytic")
    assert len(plans) == 3 and len(refused) == 2
    seconds = [each.seconds for each in plans]
    assert seconds == sorted(seconds)
    assert "does not fill 8" in refused[0] and "num_experts = 4" in refused[1]
    # By default, the experiment's own.
    (plan,), _ = planning.plan(EXPERIMENT, parse("h100:8"), [], "analytic")
    assert plan.mesh == {"data": 8, "fsdp": 1, "expert": 1, "model": 1}


def test_another_mesh_is_found_where_the_own_one_does_not_fill_the_devices():
    experiment = dataclasses.replace(EXPERIMENT, mesh={"data": 3})
    plans, refused = planning.plan(experiment, parse("v5e:2x2"), [], "analytic")
    assert 1 < len(plans) <= planning.BEST
    assert len({str(each.mesh) for each in plans}) == len(plans)
    assert len(refused) == 1 and "MESH = {'data': 3} does not fill 4" in refused[0]


def test_seconds_are_those_of_a_roofline():
    plan = PLANNER.analytic(parse("h100:8"), {"data": 8})
    # float32 is multiplied in TF32.
    for part, seconds in zip(plan.parts, plan.part_seconds, strict=True):
        assert seconds == max(part.flops / 494e12, part.bytes / 3350e9)
    assert plan.seconds == plan.compute_seconds + plan.communication_seconds
    assert plan.mfu == pytest.approx(EXPERIMENT.train_flops / 8 / 494e12 / plan.seconds)


def test_rules_that_do_not_divide_are_named():
    model = dataclasses.replace(EXPERIMENT.model, d_model=20)
    plan = Planner(dataclasses.replace(EXPERIMENT, model=model)).analytic(
        parse("h100:8"), {"fsdp": 8}
    )
    assert "embed = 20 does not divide by fsdp = 8" in "\n".join(map(str, plan.dropped))
    assert plan.parameters_here == plan.parameters


def test_the_largest_batch_is_the_last_that_fits():
    def need(rows: int) -> planning.Plan:
        data = dataclasses.replace(EXPERIMENT.data, batch_size=rows)
        return Planner(dataclasses.replace(EXPERIMENT, data=data)).analytic(small, {"data": 2})

    small = Topology("cpu:2", CPU._replace(memory=2**24), (1, 2))
    rows = need(8).largest_batch
    assert need(rows).fits and not need(2 * rows).fits
    nothing = Topology("cpu:2", CPU._replace(memory=2**18), (1, 2))
    assert PLANNER.analytic(nothing, {"data": 2}).largest_batch == 0


def test_what_would_fit_instead():
    plan = PLANNER.analytic(parse("v5e:2x2"), {"data": 4})
    short = Topology("v5e:2x2", plan_accelerator(plan.peak - 1), (2, 2))
    mends = PLANNER.what_fits(PLANNER.analytic(short, {"data": 4}), short)
    assert "ModelConfig.remat = 'full'" in mends
    assert any(each.startswith("BATCH_SIZE = ") for each in mends)
    assert any(each.startswith("MESH = ") for each in mends)


def plan_accelerator(memory: int) -> Accelerator:
    return topologies.ACCELERATORS["v5e"]._replace(memory=memory)


def test_the_compilers_refusal_says_how_much_it_needs():
    message = "RESOURCE_EXHAUSTED: Ran out (57.40G) exceeds available HBM (15.75G)."
    assert planning._needed(message) == round(57.4 * 2**30)
    with pytest.raises(UserError, match="no room: RESOURCE_EXHAUSTED: why"):
        planning._needed("RESOURCE_EXHAUSTED: why")


def test_a_step_that_the_compiler_refuses_is_planned_all_the_same(monkeypatch):
    def refuse(*_):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: the total memory (2.50G) exceeds available HBM (1.00G)."
        )

    monkeypatch.setattr(planning, "compile_step", refuse)
    plan = PLANNER.exact(Topology("cpu:2", CPU, (1, 2)), {"expert": 2})
    assert plan.peak == 2.5 * 2**30 and not plan.fits
    assert total(plan, "all-to-all") > 0


@pytest.mark.parametrize("text", ["{'data': 2", "8", "{1: 2}", "data=2"])
def test_a_mesh_that_is_none(text):
    with pytest.raises(UserError, match="write a mesh as in"):
        mesh_shape(text)


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["plan.py", *arguments])
        planning.run(configuration.flag_parser(""))
        return capsys.readouterr().out

    monkeypatch.setattr(planning.configuration, "parse", lambda *_: (EXPERIMENT, None))
    return call


def test_the_command_line(run, tmp_path):
    page = tmp_path / "plan.html"
    text = run("--topology=v5e:2x2", "--mesh={'data': 4}", "--mesh={'data': 5}", f"--html={page}")
    assert "mesh         4 data" in text and "impossible: MESH = {'data': 5}" in text
    assert "<h2>4 data</h2>" in page.read_text()
    (plan,) = json.loads(run("--topology=v5e:2x2", "--json"))
    assert plan["parameters"] == EXPERIMENT.model.num_params and plan["fits"]
    assert sum(each["bytes"] for each in plan["exchanges"]) > 0


def test_what_does_not_fit_is_an_error_after_the_plan(run, monkeypatch):
    small = topologies.ACCELERATORS["v5e"]._replace(memory=2**18)
    monkeypatch.setitem(topologies.ACCELERATORS, "v5e", small)
    with pytest.raises(UserError, match="v5e:2x2: .* are missing; what fits: .*--topology=v4"):
        run("--topology=v5e:2x2", "--mesh={'data': 4}")
    with pytest.raises(UserError, match="does not fill 4 tpu"):
        run("--topology=v5e:2x2", "--mesh={'data': 5}")


def test_calibration_puts_prediction_beside_measurement(monkeypatch):
    measured = {"step_seconds": 0.25, "temp_mb": 2}
    monkeypatch.setattr(planning.benchmark, "train", lambda experiment, steps: measured)
    monkeypatch.setattr(topologies, "measure", lambda: (1e10, 1e10))
    row = planning.calibrate(EXPERIMENT)
    assert row["measured_seconds"] == 0.25 and 0 < row["predicted_seconds"] < 1
    assert row["compiled_peak"] - 2 * 2**20 > 4 * EXPERIMENT.model.num_params


def test_flags_have_defaults():
    parser = argparse.ArgumentParser()
    planning.add_flags(parser)
    flags = parser.parse_args([])
    assert (flags.topology, flags.meshes, flags.engine) == ("local", [], "analytic")
