"""Tokens on their way: rows, statistics against slow loops, sources, and mistakes."""

import collections
import contextlib
import dataclasses
import functools
import json
import shutil
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as parquet
import pytest

from switchx import command_line, scorecard, sharding
from switchx.data import pipeline, vocabulary
from switchx.data.mixtures import Mixture
from switchx.data.pipeline import DataConfig
from switchx.data.tasks import FileTask
from switchx.errors import UserError
from switchx.experiment import Experiment, plan_state
from switchx.models.t5 import T5
from switchx.moe.config import MoeConfig
from switchx.research import router_analysis
from switchx.research.mutual_information import corrected
from switchx.run_directory import RunDirectory
from switchx.trained import Trained
from switchx.training.checkpoint import Checkpointer
from tests.test_run import MODEL

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "fat", "rat"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Experiment:
    """A run directory with two checkpoints, of nothing but the initialisation."""
    folder = tmp_path_factory.mktemp("analysed")
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice(WORDS, 12)) for _ in range(200)]
    (folder / "text.txt").write_text("\n\n".join(lines))
    experiment = Experiment(
        model=MODEL,
        data=DataConfig(
            mixture_or_task_name="mine",
            task_feature_lengths={"inputs": 40, "targets": 16},
            vocabulary="bytes",
            batch_size=8,
            tasks=(FileTask(name="mine", files=str(folder / "text.txt")),),
        ),
        model_dir=str(folder / "run"),
        eval_steps=1,
    )
    with contextlib.closing(RunDirectory(experiment.model_dir)) as directory:
        mesh = sharding.make_mesh(experiment.mesh)
        with sharding.use(mesh, experiment.rules):
            state = plan_state(experiment, mesh).create()
        checkpointer = Checkpointer(
            directory.checkpoints, keep=2, keep_best=0, criterion=experiment.criterion
        )
        for step in (2, 4):
            checkpointer.save(dataclasses.replace(state, step=jnp.int32(step)), {"row": step})
        checkpointer.close()
        directory.write_json("config.json", dataclasses.asdict(experiment))
    return experiment


def run(*flags: str) -> None:
    sys.argv = ["analyze_router.py", *flags]
    router_analysis.run(*command_line.parse(router_analysis.flag_parser("")))


def test_a_run_is_analysed_into_itself(finished, capsys):
    run(finished.model_dir)
    folder = f"{finished.model_dir}/router_analysis/4"
    summary = json.loads(open(f"{folder}/summary.json").read())
    assert set(summary) == {"step", "source", "tokens", "layers"}
    assert (summary["step"], summary["source"]) == (4, "validation/mine")
    assert [layer["name"] for layer in summary["layers"]] == ["encoder/1", "decoder/1"]
    for layer in summary["layers"]:
        assert set(layer) == {
            *("name", "num_experts", "load", "dropped_fraction", "entropy", "confidence"),
            *("confidence_histogram", "top_tokens", "mutual_information"),
        }
        assert set(layer["mutual_information"]) == {"token", "position", "domain"}
        assert layer["mutual_information"]["domain"] is None
    # The same as an evaluation has it.
    want = next(scorecard.evaluate(finished, metrics=("loss",))).row
    assert summary["tokens"] == want["num_tokens"]
    for layer in summary["layers"]:
        expected = want["by_layer"][layer["name"]]
        assert layer["dropped_fraction"] == pytest.approx(expected["dropped_fraction"], abs=1e-6)
        assert layer["entropy"] == pytest.approx(expected["router_entropy"], rel=1e-5)
        assert layer["confidence"] == pytest.approx(expected["router_confidence"], rel=1e-5)
        assert layer["load"] == pytest.approx(want["expert_load"][layer["name"]], abs=1e-6)
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"step 4, validation/mine: {summary['tokens']:,} tokens")
    assert said[1].split()[:2] == ["layer", "experts"] and len(said) == 6


def test_texts_are_domains_and_formats_hold_the_same(finished, tmp_path, capsys):
    copy = shutil.copytree(finished.model_dir, tmp_path / "run")
    files = [tmp_path / "letters.txt", tmp_path / "digits.data"]
    files[0].write_text("abc defg hij " * 30)
    files[1].write_text("012 3456 789 " * 10)
    texts = [str(file) for file in files]
    run(str(copy), "--checkpoint=2", "--format=jsonl", "--text", *texts)
    folder = copy / "router_analysis/2"
    rows = [json.loads(line) for line in (folder / "assignments.jsonl").open()]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["source"] == ", ".join(texts) and summary["step"] == 2
    # Each real token once in the sparse layer of either stack, and no padding.
    assert len(rows) == summary["tokens"]
    assert len({(r["stack"], r["row"], r["segment"], r["position"]) for r in rows}) == len(rows)
    written = collections.defaultdict(set)
    for row in rows:
        if row["token"].isascii() and row["token"].isalnum():
            written[row["domain"]].add(row["token"])
        assert row["token"] != "<pad>" or (row["stack"], row["position"]) == ("decoder", 0)
        assert row["layer"] == 1 and len(row["experts"]) == len(row["gates"]) == 1
    assert written == {texts[0]: set("abcdefghij"), texts[1]: set("0123456789")}
    assert all(layer["mutual_information"]["domain"] >= 0 for layer in summary["layers"])
    run(str(copy), "--checkpoint=2", "--text", *texts)
    assert sorted(path.name for path in folder.iterdir()) == ["assignments.parquet", "summary.json"]
    again = parquet.read_table(folder / "assignments.parquet")
    assert again.schema.equals(router_analysis.SCHEMA)
    for row, other in zip(rows, again.to_pylist(), strict=True):
        assert row.keys() == other.keys() and row["experts"] == other["experts"]
        assert row["entropy"] == pytest.approx(other["entropy"]) and row["token"] == other["token"]
    run(str(copy), "--checkpoint=2", "--num_batches=1", "--text", texts[0])
    fewer = parquet.read_table(folder / "assignments.parquet", columns=["row", "domain"])
    assert set(fewer["domain"].to_pylist()) == {texts[0]}
    assert max(fewer["row"].to_pylist()) < 8
    capsys.readouterr()


ROUTERS = {
    "switch": {"eval_capacity_factor": 0.5, "min_capacity": 1},
    "top_k": {"top_k": 2, "eval_capacity_factor": 1.0},
    "expert_choice": {"eval_capacity_factor": 1.0, "load_balance_weight": 0.0},
    "soft_moe": {"expert_capacity": 2, "load_balance_weight": 0.0},
}


class Collected(list):
    """Rows of an analysis."""

    def write(self, rows):
        self.extend(rows.to_pylist())


@pytest.mark.parametrize("router", ROUTERS)
def test_equals_a_slow_loop(router, finished, tmp_path, monkeypatch):
    moe = MoeConfig(num_experts=4, group_size="row", router=router, **ROUTERS[router])
    plain = dataclasses.replace(MODEL.moe, eval_capacity_factor=1.0)
    # The encoder's only: the decoder is dense.
    model = dataclasses.replace(MODEL, moe=moe, decoder_moe=plain, decoder_sparse_layers=())
    pairs = "\n".join(json.dumps({"inputs": w, "targets": w[::-1]}) for w in WORDS)
    (tmp_path / "pairs.jsonl").write_text(pairs)
    path = str(tmp_path / "pairs.jsonl")
    other = FileTask("pairs", path, validation_files=path, objective="supervised")
    data = dataclasses.replace(
        finished.data,
        mixture_or_task_name="both",
        tasks=(*finished.data.tasks, other, Mixture("both", ["mine", "pairs"])),
    )
    experiment = dataclasses.replace(finished, model=model, data=data, eval_steps=None)
    mesh = sharding.make_mesh({"data": 1}, jax.devices()[:1])
    token = jnp.zeros((1, 1), jnp.int32)
    shapes = jax.eval_shape(lambda: T5(model).init(jax.random.key(0), token, token))["params"]
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), nn.unbox(shapes)
    )
    trained = Trained(params, tmp_path / "3", mesh)
    monkeypatch.setattr(router_analysis, "load", lambda experiment, checkpoint: trained)
    rows = Collected()
    source = router_analysis.run_source(experiment, "validation")
    summary = router_analysis.analyze(experiment, tmp_path / "3", source, rows)
    (layer,) = summary["layers"]

    names = vocabulary.pieces("bytes")
    load, choices, dropped, tokens = np.zeros(4), 0, 0, 0
    experts_of, information = collections.defaultdict(collections.Counter), []
    occurrences, entropy, found = collections.Counter(), 0.0, iter(rows)
    apply = jax.jit(functools.partial(T5(model).apply, capture_router=True, method="features"))
    for index, batch in enumerate(pipeline.build_eval(data)):
        segments = (batch.encoder_segment_ids, batch.decoder_segment_ids)
        output = apply(
            {"params": params},
            batch.encoder_tokens,
            batch.decoder_input_tokens,
            encoder_segment_ids=segments[0],
            decoder_segment_ids=segments[1],
        )
        stats = jax.device_get(output.router["encoder"][0])
        for b, t in np.argwhere(batch.encoder_segment_ids > 0).tolist():
            row = next(found)
            name = names[batch.encoder_tokens[b, t]]
            assert (row["row"], row["token"], row["layer"]) == (8 * index + b, name, 1)
            assert row["position"] == batch.encoder_positions[b, t]
            assert row["domain"] == ("mine", "pairs")[batch.encoder_task_ids[b, t]]
            made = [k for k, e in enumerate(stats.expert_index[b, t]) if e < 4]
            assert row["experts"] == [int(stats.expert_index[b, t, k]) for k in made]
            assert row["gates"] == pytest.approx([float(stats.gate[b, t, k]) for k in made], 1e-5)
            assert row["kept"] == [bool(stats.kept[b, t, k]) for k in made]
            p = stats.probs[b, t].astype(np.float64)
            assert row["confidence"] == pytest.approx(p.max(), rel=1e-5)
            entropy -= (p * np.log(np.maximum(p, 1e-300))).sum()
            for k, expert in zip(made, row["experts"], strict=True):
                weight = float(stats.gate[b, t, k]) if router == "soft_moe" else 1
                load[expert] += weight
                experts_of[expert][name] += weight
            occurrences[name] += 1
            choices += len(made)
            tokens += 1
            if router == "expert_choice":
                dropped += not made
            else:
                dropped += sum(not kept for kept in row["kept"])
            information.append((int(batch.encoder_tokens[b, t]), row["experts"]))
    assert next(found, None) is None and tokens == summary["tokens"] == len(rows)
    assert layer["load"] == pytest.approx((load / load.sum()).tolist(), rel=1e-4)
    whole = tokens if router == "expert_choice" else choices
    assert layer["dropped_fraction"] == pytest.approx(dropped / whole, abs=1e-9)
    assert (dropped > 0) == (router != "soft_moe")
    assert layer["entropy"] == pytest.approx(entropy / tokens, rel=1e-4)
    histogram = layer["confidence_histogram"]
    assert sum(histogram["counts"]) == tokens and len(histogram["edges"]) == 21
    for expert, top in enumerate(layer["top_tokens"]):
        counts = experts_of[expert]
        want = [pytest.approx(count, rel=1e-4) for count in sorted(counts.values())[::-1][:10]]
        assert [each["count"] for each in top] == want
        for each in top:
            assert each["count"] == pytest.approx(counts[each["token"]], rel=1e-4)
            share = counts[each["token"]] / occurrences[each["token"]]
            assert each["share"] == pytest.approx(share, rel=1e-4)
    if router != "soft_moe":
        ids = np.array([token for token, _ in information])
        whose = np.repeat(np.arange(tokens), [len(experts) for _, experts in information])
        experts = np.concatenate([np.array(each, int) for _, each in information])
        assert layer["mutual_information"]["token"] == corrected(ids, whose, experts)
    # Rows are of one domain, and experts that choose take as many tokens of each.
    assert (layer["mutual_information"]["domain"] > 0) == (router != "expert_choice")


def test_supervised_runs_read_text_as_a_prefix(finished):
    path = finished.data.tasks[0].files[0]
    assert router_analysis.text_source(finished, [path]).data.tasks[0].objective == (
        "span_corruption"
    )
    data = dataclasses.replace(finished.data, mixture_or_task_name="date_iso")
    experiment = dataclasses.replace(finished, data=data)
    assert router_analysis.text_source(experiment, [path]).data.tasks[0].objective == "prefix_lm"


def test_mistakes_are_one_line_and_leave_nothing(finished, tmp_path):
    copy = shutil.copytree(
        finished.model_dir, tmp_path / "run", ignore=shutil.ignore_patterns("router_analysis")
    )
    run_directory, text = str(copy), str(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_text("some words " * 20)
    (tmp_path / "empty.txt").write_text("")
    for flags, message in (
        (["--text", str(tmp_path / "no.txt")], "no.txt' does not exist"),
        (["--text", str(tmp_path / "empty.txt")], "empty.txt' holds no example; it is empty"),
        (["--text", text, text], "--text names .*a.txt' twice"),
        (["--text", text, "--split=train"], "--split is of the run's own data"),
        (["--checkpoint=7"], "has no checkpoint '7'; there are: last, best, all, 2, 4"),
        (["--checkpoint=all"], "--checkpoint=all: one at a time; give a step"),
        (["--split=tset"], "has no split 'tset'"),
        (["--num_batches=0"], "--num_batches=0 should be at least 1"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            run(run_directory, *flags)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="is no folder; give a run directory"):
        run(str(tmp_path / "none"))
    dense = dataclasses.replace(finished, model=dataclasses.replace(MODEL, moe=None))
    source = router_analysis.run_source(dense, "validation")
    with pytest.raises(UserError, match="is a dense model: it has no routers to analyse"):
        router_analysis.analyze(dense, copy / "checkpoints/4", source, Collected())
    assert not (copy / "router_analysis").exists()
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(UserError, match="no checkpoint|checkpoints"):
        run(run_directory)
