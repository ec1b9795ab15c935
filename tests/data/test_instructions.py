"""Templates: what they make of real rows, deterministically, and mistakes in a user's own file."""

import collections
import json
import re
import subprocess
import sys

import pytest

from switchx.data import catalog, instructions, pipeline, tasks, vocabulary
from switchx.data.instructions import InstructionTask, TaskTemplates, Template
from switchx.data.pipeline import DataConfig
from switchx.data.tasks import FileTask
from switchx.errors import UserError

TEMPLATED = sorted(name for name, task in tasks.EMBEDDED.items() if task.objective == "supervised")


def config(name="date_iso", inputs=128, **options):
    return DataConfig(name, {"inputs": inputs, "targets": 32}, "spm8k", **options)


def templated(name, **options):
    found = catalog.find_task(config(**options), f"{name}_instructions")
    assert isinstance(found, InstructionTask)
    return found


@pytest.mark.parametrize("name", TEMPLATED)
def test_templates_fit_every_shipped_row(name):
    found = instructions.load(None)[name]
    assert 4 <= len(found.templates) <= 8
    assert sum(template.inverted for template in found.templates) <= 3
    assert len({template.inputs for template in found.templates}) == len(found.templates)
    task = templated(name)
    for split in task.splits:
        for row in task.base.examples(split):
            fields = task._fields(row)
            assert all(fields.values())
            if found.pattern is not None and name != "wn_supersense":
                # What the pattern takes apart makes up the prompt again.
                assert all(value in row["inputs"] for k, value in fields.items() if k != "targets")


def test_held_out_definitions_are_asked_of_no_other_task():
    # An inverted template of wn_reverse_dictionary, say, would train on the held-out wn_define.
    for task in pipeline.task_names(config("embedded_instructions")):
        base = task.removesuffix("_instructions")
        for template in instructions.load(None)[base].templates:
            assert template.targets in ("{targets}", "{word}", "{second}", "{name}")


class Rows:
    """A base task in memory."""

    objective, metrics, splits = "supervised", ("exact_match",), ("train", "validation")

    def __init__(self, train, validation=(), options=None):
        self.name, self.options = "rows", options
        self._rows = {"train": train, "validation": validation}

    def examples(self, split):
        return [{"inputs": i, "targets": t, "references": t} for i, t in self._rows[split]]

    def content(self):
        return {}


def under(base, *templates, inputs_length=1000, **options):
    defaults = {"seed": 0, "inputs_length": inputs_length, "vocabulary": "bytes"}
    return InstructionTask(base, TaskTemplates(templates), **{**defaults, **options})


def test_formats_by_hand():
    base = Rows([("q1", "a"), ("q2", "b")], [("q3", "a")], options=("a", "b"))
    ask = Template("ask", "Answer {inputs}!")

    def text(evaluation):
        (row,) = under(base, ask, evaluation=evaluation).examples("validation")
        assert row["targets"] == row["references"] == "a"
        return row["inputs"]

    assert text(None) == text("ask") == "Answer q3!"
    assert text("ask+options") == "Answer q3!\n\nOPTIONS:\n- a\n- b"
    shots = {
        "Answer q1!\n\nA: a\n\n\n| Answer q2!\n\nA: b\n\n\n| Answer q3!\n\nA:",
        "Answer q2!\n\nA: b\n\n\n| Answer q1!\n\nA: a\n\n\n| Answer q3!\n\nA:",
    }
    assert text("ask+few_shot") in shots
    both = text("ask+few_shot+options")
    assert both.count("OPTIONS:\n- a\n- b\n\nA:") == 3


def test_the_seams_survive_the_vocabulary():
    text = f"one{instructions.ANSWER} two{instructions.SEPARATOR}three{instructions.OPTIONS}yes"
    ids, _ = vocabulary.encode("spm8k", [text])
    assert vocabulary.decode("spm8k", ids) == "one A: two | three OPTIONS: - yes"


def test_inverted_templates_are_for_training_only():
    base = Rows([("q1", "a"), ("q2", "b")], [("q3", "c")])
    back = Template("back", "Ask for {targets}.", "{inputs}")
    task = under(base, back, Template("ask", "{inputs}?"))
    (row,) = task.examples("validation")
    assert (row["inputs"], row["targets"]) == ("q3?", "c")
    for seed in range(20):
        for row, (inputs, targets) in zip(
            under(base, back, Template("ask", "{inputs}?"), seed=seed).examples("train"),
            (("q1", "a"), ("q2", "b")),
            strict=True,
        ):
            assert row["references"] == row["targets"]
            assert row["targets"] in (inputs, targets)
    with pytest.raises(UserError, match="rows_instructions' has inverted templates only"):
        under(base, back)


def test_shares_and_exemplars_of_a_shipped_task():
    task = templated("wn_hypernym_nli", inputs=512)
    base = task.base.examples("train")
    rows = task.examples("train")
    assert len(rows) == len(base) == 6000
    # Half few-shot, half with options; 4 standard deviations of 6000 fair draws are 155.
    few_shot = [row for row in rows if row["inputs"].endswith(instructions.ANSWER)]
    assert len(few_shot) == pytest.approx(3000, abs=155)
    assert sum("OPTIONS:" in row["inputs"] for row in rows) == pytest.approx(3000, abs=155)
    known = {template.name for template in task.templates.templates}
    assert len(known) == 5
    # An exemplar is a training example with its own answer, and never the one that is asked.
    plain = under_plain(task)
    answers = {row["inputs"]: row["targets"] for row in base}
    counts = collections.Counter()
    for row, asked in zip(plain.examples("train"), base, strict=True):
        *shots, query = row["inputs"].split(instructions.SEPARATOR)
        counts[len(shots)] += 1
        assert query.removesuffix(instructions.ANSWER).startswith(asked["inputs"])
        for shot in shots:
            question, answer = shot.split(f"{instructions.ANSWER} ")
            question = question.split(instructions.OPTIONS)[0]
            assert answers[question] == answer and question != asked["inputs"]
    assert set(counts) == {0, 1, 2, 3, 4, 5}


def under_plain(task):
    plain = TaskTemplates(task.templates.templates[:1], task.templates.pattern)
    return InstructionTask(task.base, plain, 0, 512, "spm8k")


@pytest.mark.parametrize("name", ["wn_supersense", "sotu_period", "date_iso"])
@pytest.mark.parametrize("inputs", [48, 128])
def test_nothing_is_added_that_does_not_fit(name, inputs):
    task = templated(name, inputs=inputs)
    rows = task.examples("train")
    added = [r["inputs"] for r in rows if "OPTIONS:" in r["inputs"] or "\n| " in r["inputs"]]
    lengths = vocabulary.encode("spm8k", added)[1] + 1 if added else [0]
    assert max(lengths) <= inputs


def test_choices_are_those_of_seed_task_and_example_alone():
    pairs = [(f"question {i}", f"answer {i}") for i in range(40)]
    ask, tell = Template("ask", "{inputs}?"), Template("tell", "Tell me {inputs}")

    def kinds(rows, seed=0):
        found = under(Rows(rows), ask, tell, inputs_length=20, seed=seed).examples("train")
        return {row["targets"]: row["inputs"] for row in found}

    assert kinds(pairs) == kinds(pairs[::-1])
    assert {k: v for k, v in kinds(pairs).items() if k in dict(map(reversed, pairs[:9]))} == (
        kinds(pairs[:9])
    )
    assert kinds(pairs) != kinds(pairs, seed=1)


OFFLINE = """
import sys
from switchx.data.pipeline import DataConfig, build_train, decode_tokens
config = {config!r}
batch = next(build_train(config))
print(*(hash(row.tobytes()) for row in batch.encoder_tokens), "tensorflow" in sys.modules)
"""


def test_mixtures_of_templates_train_without_tensorflow(tmp_path):
    settings = config(
        "embedded_instructions", batch_size=4, pack=False, token_cache_dir=str(tmp_path)
    )
    code = OFFLINE.format(config=settings)
    outputs = []
    for _ in range(2):
        outputs.append(
            subprocess.run(
                [sys.executable, "-c", code],
                capture_output=True,
                text=True,
                check=True,
                env={"PYTHONHASHSEED": "0", "PYTHONPATH": ":".join(sys.path)},
            ).stdout.splitlines()[-1]
        )
    assert outputs[0] == outputs[1] and outputs[0].endswith("False")
    assert len(list(tmp_path.glob("[!.]*_instructions-*"))) == 8


def test_seqio_gets_the_same_texts():
    from switchx.data import registry

    settings = config(inputs=512)
    task = registry.find(settings, "wn_syn_ant_instructions")
    assert [metric.__name__ for metric in task.metric_fns] == ["accuracy"]
    (example,) = (
        task.get_dataset(None, "train", shuffle=False, num_epochs=1).take(1).as_numpy_iterator()
    )
    assert (
        example["inputs_pretokenized"].decode()
        == (pipeline.examples(settings, "wn_syn_ant_instructions", "train")[0]["inputs"])
    )


def own_file(tmp_path, content):
    path = tmp_path / "mine.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_a_file_of_ones_own_extends_what_ships(tmp_path):
    (tmp_path / "a.tsv").write_text("inputs\ttargets\n" + "".join(f"n {i}\tp\n" for i in range(9)))
    own = FileTask("mine", str(tmp_path / "a.tsv"), objective="supervised")
    path = own_file(
        tmp_path,
        {
            "tasks": {
                "mine": {
                    "pattern": "n (?P<n>\\d+)",
                    "templates": [{"name": "number", "inputs": "Number {n}"}],
                },
                "date_iso": {"templates": [{"name": "mine", "inputs": "{date}: ISO?"}]},
            }
        },
    )
    settings = config(templates=path, tasks=[own], evaluation_template="mine")
    found = pipeline.examples(settings, "date_iso_instructions", "validation")
    assert all(re.fullmatch(r".* \d{4}: ISO\?|.*\d: ISO\?", row["inputs"]) for row in found)
    settings = config(templates=path, tasks=[own])
    found = pipeline.examples(settings, "mine_instructions", "validation")
    assert found and all(re.fullmatch(r"Number \d", row["inputs"]) for row in found)
    assert "mine_instructions" in catalog.names(settings)


def entry(**template):
    return {"tasks": {"date_iso": {"templates": [{"name": "x", "inputs": "{date}", **template}]}}}


MISTAKES = [
    ("{", "line 1: not valid JSON"),
    ([], 'expected {"tasks"'),
    ({"tasks": {"dat_iso": entry()["tasks"]["date_iso"]}}, "no task is called 'dat_iso'; did you"),
    ({"tasks": {"date_iso": []}}, "task 'date_iso': expected {\"templates\""),
    ({"tasks": {"date_iso": {"templates": []}}}, "task 'date_iso' has no template"),
    ({"tasks": {"date_iso": {"templates": [{"name": "x"}]}}}, "template 1 needs the strings"),
    ({"tasks": {"date_iso": {"templates": [], "patern": ""}}}, "unknown 'patern'; did you mean"),
    (entry(input="x"), "unknown 'input'; did you mean 'inputs'"),
    (entry(inputs="{dat}"), "'x' of task 'date_iso' has no field 'dat'; did you mean 'date'"),
    (entry(inputs="{date.year}"), "no field 'date.year'"),
    (entry(inputs="{date!r}"), "no field 'date'"),
    (entry(inputs="{date"), "write {{ for a brace"),
    (entry(inputs="date"), "has no {field} of the example"),
    (entry(name="plain"), "a name is letters, digits and underscores, and used once"),
    (entry(name="a b"), "a name is letters"),
    (
        {"tasks": {"date_iso": {**entry()["tasks"]["date_iso"], "pattern": ".*"}}},
        "'date_iso' has its pattern already",
    ),
    (
        {"tasks": {"sotu_period": {**entry()["tasks"]["date_iso"], "pattern": "("}}},
        "pattern '(' is no regular expression",
    ),
]


@pytest.mark.parametrize(("content", "message"), MISTAKES, ids=range(len(MISTAKES)))
def test_mistakes_in_a_template_file(tmp_path, content, message):
    path = own_file(tmp_path, content)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        pipeline.build_train(config(templates=path))
    assert "\n" not in str(caught.value) and "mine.json" in str(caught.value)


def test_other_mistakes(tmp_path):
    with pytest.raises(UserError, match="nothing.json' cannot be read: No such file"):
        pipeline.build_train(config(templates=str(tmp_path / "nothing.json")))
    for evaluation, message in (
        ("plan", "no such template of task 'date_iso'; did you mean 'plain'"),
        ("plain+option", "unknown 'option'; did you mean 'options'"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            templated("date_iso", evaluation_template=evaluation)
    with pytest.raises(UserError, match="called 'date_iso_instruction'.*'date_iso_instructions'"):
        pipeline.build_train(config("date_iso_instruction"))
    task = TaskTemplates((Template("x", "{inputs}"),), "only (?P<this>x)")
    with pytest.raises(UserError, match="templates of task 'rows': the pattern does not fit 'y'"):
        InstructionTask(Rows([("y", "z")]), task, 0, 99, "bytes").examples("train")
    with pytest.raises(UserError, match="templates are for supervised tasks"):
        InstructionTask(tasks.EMBEDDED["embedded_prefix_lm"], task, 0, 99, "bytes")
