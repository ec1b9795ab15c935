import dataclasses
import json
import pathlib
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from switchx import harness, sharding
from switchx.data.pipeline import DataConfig
from switchx.errors import UserError
from switchx.experiment import Experiment, plan_state
from switchx.inference.scoring import score
from switchx.training.checkpoint import Checkpointer, restore_from
from tests.test_run import MODEL

LENGTHS = {"inputs": 12, "targets": 8}
ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("harness")
    data = DataConfig(vocabulary="bytes", task_feature_lengths=LENGTHS, batch_size=4)
    experiment = Experiment(model=MODEL, data=data, model_dir=str(folder), mesh={"data": 4})
    mesh = sharding.make_mesh(experiment.mesh, jax.devices()[:4])
    with sharding.use(mesh):
        state = plan_state(experiment, mesh).create()
        # Louder than at the beginning of training, so that greedy decoding says several things.
        state = dataclasses.replace(state, params=jax.tree.map(lambda x: x * 3, state.params))
        checkpointer = Checkpointer(folder / "checkpoints")
        checkpointer.save(state, {"batch": 0})
        checkpointer.close()
    # All 8 devices, as a run on this machine would have.
    recorded = dataclasses.asdict(dataclasses.replace(experiment, mesh={"data": -1}))
    recorded["data"]["batch_size"] = 8
    (folder / "config.json").write_text(json.dumps(recorded))
    return str(folder)


@pytest.fixture(scope="module")
def answers(run_directory) -> harness.Answers:
    return harness.Answers(run_directory)


def requests(*arguments) -> list[SimpleNamespace]:
    """What the harness gives, as far as a model looks at it."""
    return [SimpleNamespace(args=each) for each in arguments]


def text_ids(text: str) -> list[int]:
    return [letter + 3 for letter in text.encode()]


def slow(run_directory: str, inputs: list[int], targets: list[int]) -> float:
    """log p(targets | inputs) of one row, without the harness's part of the code."""
    data = DataConfig(vocabulary="bytes", task_feature_lengths=LENGTHS, batch_size=4)
    experiment = Experiment(model=MODEL, data=data)
    mesh = sharding.make_mesh({"data": 1}, jax.devices()[:1])
    with sharding.use(mesh):
        abstract = plan_state(experiment, mesh).abstract
        params = restore_from(run_directory, abstract, optimizer=False).params
        rows = (np.array([tokens], np.int32) for tokens in (inputs, targets))
        return float(score(MODEL, params, *rows).log_likelihood[0])


def test_continuations_are_what_the_decoder_says(answers, run_directory):
    pairs = [("abc", " de"), ("abc ", "de"), ("", "xyz"), ("a" * 20, "b")]
    found = answers.loglikelihood(requests(*pairs))
    want = slow(run_directory, [*text_ids("abc"), 1], text_ids("de"))
    assert found[0][0] == pytest.approx(want, rel=1e-4)
    assert found[1] == found[0]  # the space between them belongs to neither
    assert found[2][0] == pytest.approx(slow(run_directory, [1], text_ids("xyz")), rel=1e-4)
    # The last tokens of a long context.
    want = slow(run_directory, [*text_ids("a" * 11), 1], text_ids("b"))
    assert found[3][0] == pytest.approx(want, rel=1e-4)
    assert all(isinstance(greedy, bool) for _, greedy in found)


def test_the_end_is_scored_if_asked_for(run_directory):
    with_end = harness.Answers(run_directory, score_eos=True, batch_size=16)
    (found,) = with_end.loglikelihood(requests(("abc", "de")))
    want = slow(run_directory, [*text_ids("abc"), 1], [*text_ids("de"), 1])
    assert found[0] == pytest.approx(want, rel=1e-4)


def test_what_is_generated_is_greedy_and_stops(answers):
    contexts = [letter * 3 for letter in "abcdefghij"]
    asked = requests(*((context, {"until": ["\n\n"]}) for context in contexts))
    said = answers.generate_until(asked)
    plain = [(context, text) for context, text in zip(contexts, said, strict=True) if text]
    plain = [(context, text) for context, text in plain if "<" not in text and text == text.strip()]
    assert plain
    assert all(greedy for _, greedy in answers.loglikelihood(requests(*plain)))
    context, text = max(plain, key=lambda pair: len(pair[1]))
    stops = [({"until": text[1]}, text.split(text[1])[0]), ({"until": [], "max_gen_toks": 1}, text)]
    for settings, before in stops:
        (short,) = answers.generate_until(requests((context, settings)))
        assert before.startswith(short) and len(short) < len(text)


def test_every_token_of_a_text_is_predicted_once(answers, run_directory):
    text = "the cat sat on the mat"
    short, long = answers.loglikelihood_rolling(requests(("the cat",), (text,)))
    assert short == pytest.approx(slow(run_directory, [1], text_ids("the cat")), rel=1e-4)
    ids = text_ids(text)
    want = (
        slow(run_directory, [1], ids[:8])
        + slow(run_directory, [*ids[:8], 1], ids[8:16])
        + slow(run_directory, [*ids[5:16], 1], ids[16:])
    )
    assert long == pytest.approx(want, rel=1e-4)
    assert answers.loglikelihood_rolling(requests(("",))) == [0.0]


def test_mistakes_are_one_line(answers, run_directory, monkeypatch):
    with pytest.raises(
        UserError, match="a continuation has 9 tokens, more than targets_length = 8"
    ):
        answers.loglikelihood(requests(("a", "b" * 9)))
    longer = harness.Answers(run_directory, targets_length=9)
    assert len(longer.loglikelihood(requests(("a", "b" * 9)))) == 1
    with pytest.raises(UserError, match="decodes greedily; set do_sample: false"):
        answers.generate_until(requests(("a", {"do_sample": True})))
    with pytest.raises(UserError, match="checkpoint 'newest'; there are"):
        harness.Answers(run_directory, checkpoint="newest")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    harness.register.cache_clear()
    with pytest.raises(UserError, match="not installed .*pip install 'switchx.lm_eval.'"):
        harness.register()


@pytest.mark.filterwarnings("ignore")
def test_the_harness_takes_it(run_directory, monkeypatch):
    evaluator = pytest.importorskip("lm_eval.evaluator")
    tasks = pytest.importorskip("lm_eval.tasks")
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    harness.register.cache_clear()
    harness.register()
    manager = tasks.TaskManager(include_path="docs/lm_eval")
    results = evaluator.simple_evaluate(
        "switchx",
        {"run_directory": run_directory, "inputs_length": 64, "targets_length": 32},
        ["syn_ant", "inflection", "prose"],
        limit=7,
        task_manager=manager,
    )["results"]
    assert 0 <= results["syn_ant"]["acc,none"] <= 1
    assert 0 <= results["inflection"]["exact_match,none"] <= 1
    assert results["prose"]["bits_per_byte,none"] > 0


def test_examples_of_the_documentation_are_whole():
    for name, fields in (("syn_ant", 2), ("inflection", 2), ("prose", 1)):
        assert (ROOT / f"docs/lm_eval/{name}.yaml").exists()
        lines = (ROOT / f"docs/lm_eval/{name}.jsonl").read_text().splitlines()
        assert lines and all(len(json.loads(line)) == fields for line in lines)
