"""Random facts: what one looks like, that they stay the same, and that nothing is held out."""

import collections
import math

import numpy as np
import pytest

from switchx.data import catalog, facts, pipeline
from switchx.data.facts import FactsTask
from switchx.data.pipeline import DataConfig
from switchx.errors import UserError

RECALL = facts.TASKS["recall"]
LENGTHS = {"inputs": 4, "targets": 3}
# Key and value of the first three and of the last.
GOLDEN = [("ouk", "Kn"), ("k2a", "JB"), ("fkq", "N+"), ("5vq", "8z")]


def config(tmp_path, **changes) -> DataConfig:
    values = {
        "mixture_or_task_name": "recall",
        "task_feature_lengths": LENGTHS,
        "vocabulary": "bytes",
        "batch_size": 512,
        "pack": False,
        "token_cache_dir": str(tmp_path),
    }
    return DataConfig(**values | changes)


def test_the_facts_are_always_the_same():
    # Written down once: whoever compares two runs relies on them.
    rows = RECALL.examples("train")
    assert [(row["inputs"], row["targets"]) for row in (*rows[:3], rows[-1])] == GOLDEN
    assert RECALL.examples("train") == FactsTask("another").examples("train")
    other = FactsTask("recall", seed=1).examples("train")
    same = sum(a["targets"] == b["targets"] for a, b in zip(rows, other, strict=True))
    assert same < 3 * 32768 / 4096


def test_every_key_is_there_once():
    rows = RECALL.examples("train")
    keys = [row["inputs"] for row in rows]
    assert len(keys) == len(set(keys)) == 32768 == 32**3
    # In base 32 as Python reads it: every number below 32,768.
    assert {int(key, 32) for key in keys} == set(range(32768))
    assert {len(key) for key in keys} == {3} and keys != sorted(keys)


def test_values_are_drawn_evenly_and_apart():
    rows = RECALL.examples("train")
    for place in range(2):
        counts = collections.Counter(row["targets"][place] for row in rows)
        assert set(counts) == set(facts.SYMBOLS)
        # 512 of each expected; chi-squared of 63 degrees has mean 63 and deviation 11.2.
        assert sum((count - 512) ** 2 / 512 for count in counts.values()) < 63 + 4 * 11.2
    pairs = collections.Counter(row["targets"] for row in rows)
    # 4,096 pairs, 8 of each expected.
    assert sum((pairs[a + b] - 8) ** 2 / 8 for a in facts.SYMBOLS for b in facts.SYMBOLS) < 4458


@pytest.mark.parametrize(("num_facts", "width"), [(1, 1), (32, 1), (33, 2), (1025, 3)])
def test_keys_are_as_long_as_they_must_be(num_facts, width):
    rows = FactsTask("few", num_facts, num_symbols=2).examples("train")
    assert sorted(int(row["inputs"], 32) for row in rows) == list(range(num_facts))
    assert {len(row["inputs"]) for row in rows} == {width}
    assert {symbol for row in rows for symbol in row["targets"]} <= {"a", "b"}


def test_chance_is_the_entropy_of_a_target():
    assert pytest.approx(2.7726, abs=1e-4) == RECALL.chance
    # ln 64 for either symbol, nothing for the EOS.
    assert RECALL.chance == pytest.approx((math.log(64) + math.log(64) + 0) / 3)


def test_a_fact_is_a_row_of_bytes(tmp_path):
    (batch,) = pipeline.build_eval(config(tmp_path), num_batches=1)
    key, value = (RECALL.examples("validation")[0][side] for side in ("inputs", "targets"))
    # 3 + byte, and EOS = 1.
    assert batch.encoder_tokens[0].tolist() == [*(3 + ord(digit) for digit in key), 1]
    assert batch.decoder_target_tokens[0].tolist() == [*(3 + ord(symbol) for symbol in value), 1]
    assert batch.decoder_input_tokens[0].tolist() == [0, *(3 + ord(symbol) for symbol in value)]
    assert (batch.decoder_loss_weights == 1).all() and batch.encoder_tokens.all()


def test_validation_asks_for_what_is_trained_on(tmp_path, capsys):
    def pairs(batches):
        return {
            (tuple(inputs), tuple(targets))
            for batch in batches
            for inputs, targets in zip(
                batch.encoder_tokens.tolist(), batch.decoder_target_tokens.tolist(), strict=True
            )
        }

    train = pipeline.build_train(config(tmp_path))
    epoch = pairs(next(train) for _ in range(64))
    assert "validation asks for the 32,768 facts that are trained on" in capsys.readouterr().out
    assert len(epoch) == 32768
    assert pairs(pipeline.build_eval(config(tmp_path))) == epoch


def test_neighbours_are_not_alike():
    # Evaluation keeps the order, and rows with one first digit would fill one expert.
    first = [int(row["inputs"][0], 32) for row in RECALL.examples("validation")]
    repeats = np.mean(np.diff(first) == 0)
    assert repeats == pytest.approx(1 / 32, abs=0.005)


def test_facts_of_a_users_own(tmp_path):
    own = FactsTask("hard", num_facts=1000, num_symbols=10, seed=3)
    found = config(tmp_path, mixture_or_task_name="hard", tasks=[own], batch_size=500)
    assert catalog.find_task(found, "hard") is own
    assert not catalog.needs_tensorflow(own)
    assert len(list(pipeline.build_eval(found))) == 2
    assert pipeline.metric_names(found, "hard") == ("exact_match",)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_facts": 0}, "FactsTask.num_facts = 0: should be from 1 to 1,048,576"),
        ({"num_facts": 2**20 + 1}, "FactsTask.num_facts = 1048577: should be from 1 to 1,048,576"),
        ({"num_symbols": 65}, "FactsTask.num_symbols = 65: should be from 2 to 64"),
        ({"num_symbols": 6.5}, "FactsTask.num_symbols = 6.5: a float"),
        ({"seed": -1}, "FactsTask.seed = -1: should be at least 0"),
        ({"name": "my facts"}, "FactsTask.name = 'my facts': should be letters"),
    ],
)
def test_mistakes(unchecked, values, message):
    with pytest.raises(UserError, match=message) as caught:
        FactsTask(**{"name": "facts", **values})
    assert "\n" not in str(caught.value)
