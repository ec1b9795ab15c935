import json

import pytest

from switchx.report import run_sections
from switchx.report.page import Examples, Figures, Folded, Text
from switchx.report.runs import read_run
from switchx.report.tables import Table
from switchx.training.selection import Criterion
from tests.report.directories import (
    TASK,
    eval_row,
    train_row,
    write_analysis,
    write_rows,
    write_run,
)

METRIC = Criterion()


@pytest.fixture
def two(tmp_path):
    return [
        read_run(
            write_run(tmp_path / "one" / "run", final=2.0, config={"model": {"e": 8, "f": 1}})
        ),
        read_run(write_run(tmp_path / "two" / "run", final=1.5, config={"model": {"e": 4}})),
    ]


def sections(chapter):
    return {section.title: section.blocks for section in chapter.sections}


def figures_of(blocks):
    return [f for block in blocks if isinstance(block, Figures) for f in block.figures]


def notices(blocks):
    return [block.text for block in blocks if isinstance(block, Text) and block.notice]


def test_a_whole_run(tmp_path):
    run = read_run(write_run(tmp_path / "a", final=2.0))
    chapter = run_sections.chapter([run], METRIC, split=None, base=None)
    found = sections(chapter)
    assert chapter.counts == {"done": 1} and not chapter.problems
    assert chapter.summary == [
        "a: done at step 20, 5 s of training at 0.25 s a step; "
        f"cross_entropy on eval/{TASK} 2.000 at step 20."
    ]
    titles = {name: [f.title for f in figures_of(blocks)] for name, blocks in found.items()}
    assert titles["Loss"][:2] == ["Loss", "Cross-entropy"]
    assert titles["Learning rate and throughput"] == ["Learning rate", "Throughput", "Step time"]
    assert titles["Dropped tokens"] == ["Dropped", "Dropped by layer"]
    assert titles["Expert load"] == ["encoder/1", "decoder/1"]
    assert "Router confidence by layer" in titles["Router entropy and confidence"]
    assert any(isinstance(block, Examples) for block in found["Samples"])
    assert notices(found["What the experts specialise in"]) == [
        f"a has not been analysed: python scripts/analyze_router.py {run.path}"
    ]
    for blocks in found.values():
        for figure in figures_of(blocks):
            runs = {row["run"] for rows in figure.spec["datasets"].values() for row in rows}
            assert runs == {str(run.path)}


def test_expert_load_is_that_of_the_rows(tmp_path):
    run = read_run(write_run(tmp_path / "a"))
    encoder, _ = run_sections.load_figures(run)
    assert encoder.spec["datasets"]["rows"] == [
        {"y": 10, "load": [0.49, 0.3, 0.16, 0.05], "run": str(run.path)},
        {"y": 20, "load": pytest.approx([0.48, 0.3, 0.17, 0.05]), "run": str(run.path)},
    ]


def test_heat_maps_of_many_experts_have_fewer_columns(tmp_path):
    write_run(tmp_path / "a")
    load = {f"encoder/{layer}": [1 / 500] * 500 for layer in range(2)}
    rows = [eval_row(step, 2.0, expert_load=load) for step in range(1, 101)]
    write_rows(tmp_path / "a/metrics.jsonl", rows)
    kept = run_sections.load_figures(read_run(tmp_path / "a"))[0].spec["datasets"]["rows"]
    assert len(kept) == 12 and (kept[0]["y"], kept[-1]["y"]) == (1, 100)


def test_names_tell_runs_apart(two, tmp_path):
    assert list(run_sections.names(two)) == ["one/run", "two/run"]
    assert list(run_sections.names(two[:1])) == ["run"]
    assert len(run_sections.names([two[0], two[0]])) == 1


def test_the_split_is_the_tasks_own_evaluation(tmp_path):
    write_run(tmp_path / "a")
    rows = [train_row(1, 3.0), eval_row(2, 2.5, split="eval/other"), eval_row(2, 2.0, rouge=0.5)]
    write_rows(tmp_path / "a/metrics.jsonl", rows)
    run = read_run(tmp_path / "a")
    assert run_sections.main_split([run], "cross_entropy") == f"eval/{TASK}"
    assert run_sections.main_split([run], "cross_entropy", "eval/other") == "eval/other"
    assert run_sections.main_split([run], "learning_rate") == "train"
    assert run_sections.main_split([run], "bleu") is None


def test_configurations_are_compared_with_the_base(two):
    blocks = run_sections.configuration(run_sections.names(two), None)
    (table,) = [block for block in blocks if isinstance(block, Table)]
    assert list(table.rows) == [
        ("model.e", "8", "4", "two/run"),
        ("model.f", "1", "absent", "two/run"),
    ]
    blocks = run_sections.configuration(run_sections.names(two[:1]), two[1])
    assert ("model.f", "absent", "1", "run") in next(b for b in blocks if isinstance(b, Table)).rows


def test_a_run_alone_shows_its_whole_configuration(two):
    blocks = run_sections.configuration(run_sections.names(two[:1]), None)
    folded = next(block for block in blocks if isinstance(block, Folded))
    assert any(isinstance(b, Table) and ("model.e", "8") in b.rows for b in folded.blocks)


def test_what_was_analysed_is_shown(tmp_path):
    write_analysis(write_run(tmp_path / "a"))
    run = read_run(tmp_path / "a")
    blocks = run_sections.specialisation({"a": run})
    told, tokens = [block for block in blocks if isinstance(block, Table)]
    assert told.rows == [("encoder/1", 0.5, 0.875, 0.125, 0.31, 0.07, None)]
    assert tokens.rows == [(0, 0.75, "▁the ×12 (93%)"), (1, 0.25, "no token")]
    (figure,) = figures_of(blocks)
    assert [row["count"] for row in figure.spec["datasets"]["rows"]] == [3.0, 9.0]


@pytest.mark.parametrize(
    "layers", [[3], [{}], [{"name": 1, "top_tokens": [None, [3]], "load": "x"}]]
)
def test_a_strange_analysis_does_no_harm(tmp_path, layers):
    write_analysis(write_run(tmp_path / "a"))
    path = tmp_path / "a/router_analysis/20/summary.json"
    path.write_text(json.dumps({"layers": layers}))
    assert run_sections.specialisation({"a": read_run(tmp_path / "a")})


def test_a_diverged_run_is_shown(tmp_path):
    write_run(tmp_path / "a", done=False)
    write_rows(
        tmp_path / "a/metrics.jsonl", [train_row(1, 3.0), train_row(5, 4.0), train_row(9, None)]
    )
    chapter = run_sections.chapter([read_run(tmp_path / "a")], METRIC, split=None, base=None)
    assert chapter.summary[-1] == "Diverged or failed: a. Their curves end in a cross."
    loss = figures_of(sections(chapter)["Loss"])[0]
    ends = loss.spec["datasets"]["ends"]
    assert [(row["step"], row["end"]) for row in ends] == [(5, "diverged")]
    assert "Gaps are values that were not finite." in loss.caption


def test_an_empty_run_says_so_in_every_section(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    chapter = run_sections.chapter([read_run(tmp_path)], METRIC, split=None, base=None)
    found = sections(chapter)
    assert chapter.summary[0].endswith("empty; no metrics yet.")
    for name in ("Loss", "Dropped tokens", "Expert load", "Samples", "Configuration"):
        assert notices(found[name]), name
    assert len(chapter.problems) == 3


def test_strange_values_in_rows_do_no_harm(tmp_path):
    write_run(tmp_path / "a")
    strange = [
        eval_row(1, 2.0, expert_load=3, by_layer=[1]),
        eval_row(2, 2.0, expert_load={"encoder/1": "x", "odd": [None]}, by_layer={"encoder/1": 4}),
        {"step": 3, "split": "train", "loss": "low", "step_seconds": "fast", "expert_load": None},
    ]
    write_rows(tmp_path / "a/metrics.jsonl", strange)
    (tmp_path / "a/versions.json").write_text('{"devices": 3, "command": "x", "mesh": []}')
    (tmp_path / "a/config.json").write_text('{"data": 3, "best_metric": 4}')
    chapter = run_sections.chapter([read_run(tmp_path / "a")], METRIC, split=None, base=None)
    assert len(chapter.sections) == 10


def test_alike_versions_are_told_once(two):
    blocks = run_sections.provenance(run_sections.names(two))
    table = next(block for block in blocks if isinstance(block, Table))
    assert ("packages.jax", "0.10.2", "all") in table.rows
    assert ("devices", "1 × cpu", "all") in table.rows
