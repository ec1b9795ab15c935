import argparse
import dataclasses
import pathlib

import numpy as np
import pytest

from switchx import configuration
from switchx.data.pipeline import DataConfig
from switchx.errors import UserError
from switchx.experiment import Experiment
from switchx.research import benchmark
from tests.test_run import MODEL

ROOT = pathlib.Path(__file__).parents[2]
EXPERIMENT = Experiment(
    model=MODEL,
    data=DataConfig(
        mixture_or_task_name="wn_define",
        task_feature_lengths={"inputs": 40, "targets": 24},
        vocabulary="bytes",
        batch_size=8,
    ),
)


def test_a_training_step_is_measured():
    figures = benchmark.train(EXPERIMENT, steps=2)
    assert figures["num_params"] == EXPERIMENT.model.num_params
    assert figures["model_flops"] == EXPERIMENT.train_flops
    # Padding of the experts' capacity, softmax and optimizer come on top of the matmuls.
    assert 1 < figures["xla_flops"] / figures["model_flops"] < 3
    for name in ("cpu_seconds_per_step", "step_seconds", "compile_seconds", "peak_rss_mb"):
        assert figures[name] > 0, name
    rows = 8 * (40 + 24) / figures["step_seconds"]
    assert figures["tokens_per_second"] == pytest.approx(rows, rel=0.05)
    assert figures["steps"] == 2 and np.isfinite(figures["loss"])


def test_drawing_batches_is_measured():
    data = dataclasses.replace(EXPERIMENT.data, task_feature_lengths={"inputs": 80, "targets": 60})
    figures = benchmark.data(dataclasses.replace(EXPERIMENT, data=data), steps=3)
    assert 0.3 < figures["fill"] <= 1
    assert figures["tokens_per_second"] > 0 and figures["tokens_per_cpu_second"] > 0


def test_the_loss_is_measured_in_both_forms():
    figures = benchmark.loss(EXPERIMENT, steps=1)
    assert figures["tokens"] == 8 * 24
    for form in ("fused", "plain"):
        assert figures[form]["cpu_seconds"] > 0 and figures[form]["temp_mb"] >= 0


def test_decoding_is_measured():
    figures = benchmark.decode(EXPERIMENT, steps=1)
    assert figures["tokens_per_cpu_second"] > 0 and figures["first_token_cpu_seconds"] > 0
    assert figures["num_params"] == EXPERIMENT.model.num_params


@pytest.mark.parametrize("steps", ["0", "-1", "2.5", "many"])
def test_no_steps_to_measure(steps):
    parser = argparse.ArgumentParser()
    benchmark.add_flags(parser)
    assert parser.parse_args(["data", "--steps=3"]).steps == 3
    with pytest.raises(UserError, match=f"--steps={steps}: should be an integer, 1 or more"):
        parser.parse_args(["data", f"--steps={steps}"])


def test_a_report_is_one_line_of_json(monkeypatch, capsys):
    def noisy(experiment, *, steps):
        print("a note")
        return {"steps": steps}

    monkeypatch.setitem(benchmark.BENCHMARKS, "data", noisy)
    benchmark.report("data", EXPERIMENT, steps=3)
    assert capsys.readouterr() == ('{"steps": 3}\n', "a note\n")


def test_the_command_line_says_what_is_measured(monkeypatch):
    done = []
    monkeypatch.setattr(benchmark, "report", lambda *args, **kwargs: done.append((args, kwargs)))
    monkeypatch.setattr(benchmark.moe_benchmark, "report", lambda *args, **kw: done.append(args))
    monkeypatch.setattr("sys.argv", ["bench.py", "data", "--steps=3"])
    benchmark.run(argparse.ArgumentParser(), lambda: EXPERIMENT)
    # A MoE layer needs no experiment.
    monkeypatch.setattr("sys.argv", ["bench.py", "moe", "--cases=cpu_e8"])
    benchmark.run(argparse.ArgumentParser(), lambda: pytest.fail("no experiment is needed"))
    assert done == [(("data", EXPERIMENT), {"steps": 3}), (["cpu_e8"],)]


def test_the_random_batch_is_whole_and_shifted_right():
    batch = benchmark.random_batch(EXPERIMENT)
    assert batch.encoder_tokens.shape == (8, 40) and batch.decoder_target_tokens.shape == (8, 24)
    np.testing.assert_array_equal(
        batch.decoder_input_tokens[:, 1:], batch.decoder_target_tokens[:, :-1]
    )
    assert not batch.decoder_input_tokens[:, 0].any()
    assert batch.encoder_tokens.min() >= 2 and batch.encoder_tokens.max() < 384


CASES = sorted(path.stem for path in (ROOT / "gin_configs/bench").glob("*.gin"))


@pytest.mark.parametrize("case", CASES)
def test_every_case_resolves(case):
    assert configuration.build(Experiment, [benchmark.case_file(case)]).model.num_params > 1e6


def test_case_a_is_what_it_says():
    experiment = configuration.build(Experiment, [benchmark.case_file("A")])
    model = experiment.model
    assert (model.d_model, model.d_ff, model.num_heads, model.head_dim) == (256, 1024, 4, 64)
    assert (model.num_encoder_layers, model.num_decoder_layers) == (4, 4)
    assert model.encoder_sparse == model.decoder_sparse == (False, True, False, True)
    assert model.moe is not None
    assert (model.moe.num_experts, model.moe.capacity_factor) == (8, 1.25)
    assert (model.vocab_size, model.tie_embeddings, model.dtype) == (32128, True, "float32")
    assert experiment.lengths == (256, 64) and experiment.data.batch_size == 8
    assert experiment.optimizer.name == "adafactor"
    assert model.num_params == 30_258_944


def test_an_unknown_case_names_those_there_are():
    with pytest.raises(UserError, match="there is no case 'Z'; valid: A"):
        benchmark.case_file("Z")
