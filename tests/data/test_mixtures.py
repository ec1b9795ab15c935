"""Mixing rates worked by hand, and mistakes in mixtures."""

import pytest

from switchx.data import mixtures, tasks
from switchx.data.mixtures import EMBEDDED, Mixture, mixing_rates
from switchx.errors import UserError

COUNTS = {"a": 100, "b": 400, "c": 10_000}


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({}, (100, 400, 10_000)),
        ({"rates": "capped", "maximum": 900}, (100, 400, 900)),
        ({"rates": "tempered", "temperature": 2.0}, (10, 20, 100)),
        ({"rates": "tempered", "temperature": 2.0, "maximum": 900}, (10, 20, 30)),
        ({"rates": {"a": 3, "b": 2.0, "c": 1}}, (3, 2, 1)),
        # So cold that the largest is all there is.
        ({"rates": "tempered", "temperature": 1e-3}, (0, 0, 1)),
    ],
)
def test_rates_by_hand(options, weights):
    rates = mixing_rates(Mixture("m", ["a", "b", "c"], **options), COUNTS)
    expected = [weight / sum(weights) for weight in weights]
    assert list(rates.values()) == pytest.approx(expected)
    assert sum(rates.values()) == pytest.approx(1.0)


@pytest.mark.parametrize("maximum", [None, 900, 65536])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_rates_are_those_of_seqio(maximum, temperature):
    from switchx.data.backend import seqio

    class Counted:
        name, cache_dir = "counted", None

        def __init__(self, count):
            self.num_input_examples = lambda split: count

    weights = [
        seqio.mixing_rate_num_examples(
            Counted(count), maximum=maximum, temperature=temperature, scale=1.0
        )
        for count in COUNTS.values()
    ]
    mixture = Mixture("m", list(COUNTS), rates="tempered", maximum=maximum, temperature=temperature)
    expected = [weight / sum(weights) for weight in weights]
    assert list(mixing_rates(mixture, COUNTS).values()) == pytest.approx(expected)


def test_a_mixture_without_examples():
    with pytest.raises(UserError, match="'m': no task has a training example"):
        mixing_rates(Mixture("m", ["a", "b"]), {"a": 0, "b": 0})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"maximum": 900}, "Mixture.maximum needs Mixture.rates = 'capped' or 'tempered'"),
        ({"temperature": 2.0}, "Mixture.temperature needs Mixture.rates = 'tempered'"),
    ],
)
def test_what_would_be_ignored_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        Mixture("m", ["a", "b"], **options)


def test_glue_mixtures_go_by_the_sizes_of_their_training_sets():
    glue, super_glue = mixtures.GLUE["glue"], mixtures.GLUE["super_glue"]
    # Raffel et al.'s weights: 949,101 rows without WNLI, 184,351 with 259 of WSC.
    for mixture, total, trained in ((glue, 949_101, 8), (super_glue, 184_351, 8)):
        rates = mixing_rates(mixture, {})
        assert sum(mixture.rates.values()) == total
        assert sum(rate > 0 for rate in rates.values()) == trained
    assert "glue_wnli_v002" not in glue.tasks and "glue_mnli_mismatched_v002" in glue.tasks
    assert mixing_rates(super_glue, {})["super_glue_record_v102"] == 138_854 / 184_351


def test_embedded_mixtures_hold_the_transfer_tasks_out():
    assert set(EMBEDDED) == {
        "embedded_instructions",
        "embedded_pretrain_and_tasks",
        "embedded_tasks",
    }
    for mixture in mixtures.NAMED.values():
        for held_out in ("sotu_period", "wn_define"):
            assert not any(task.startswith(held_out) for task in mixture.tasks)
    plain = EMBEDDED["embedded_tasks"].tasks
    assert len(plain) == 8 and set(plain) < set(tasks.EMBEDDED)
    templated = EMBEDDED["embedded_instructions"].tasks
    assert templated == tuple(f"{name}_instructions" for name in plain)
    rates = mixing_rates(EMBEDDED["embedded_pretrain_and_tasks"], {})
    assert rates["embedded_span_corruption"] == 0.5
    assert rates["date_iso"] == 0.0625


MISTAKES = [
    ({"name": "my mix"}, "Mixture.name = 'my mix'"),
    ({"tasks": []}, "Mixture.tasks = \\[\\]: should be strings"),
    ({"tasks": ["a", "a"]}, "Mixture.tasks = .*none of them twice"),
    ({"tasks": ["a", 3]}, "Mixture.tasks = \\['a', 3\\]"),
    ({"rates": "temperd"}, "'temperd' is unknown; did you mean 'tempered'"),
    ({"rates": "capped"}, "'capped' needs Mixture.maximum"),
    ({"rates": {"first": 1}}, "has no rate for 'second'"),
    ({"rates": {"first": 1, "secnd": 1}}, "'secnd', not a task.*did you mean 'second'"),
    ({"rates": {"first": -1, "second": 1}}, "rates\\['first'\\] = -1 must be a number from 0 on"),
    ({"rates": {"first": True, "second": 1}}, "rates\\['first'\\] = True must be a number"),
    ({"rates": {"first": 0, "second": 0.0}}, "rates of 'm' sum to zero: nothing is left"),
    ({"maximum": "3"}, "Mixture.maximum = '3'"),
    ({"temperature": 0}, "Mixture.temperature = 0"),
]


@pytest.mark.parametrize(("options", "message"), MISTAKES)
def test_user_mistakes(unchecked, options, message):
    with pytest.raises(UserError, match=message) as caught:
        Mixture(**{"name": "m", "tasks": ["first", "second"], **options})
    assert "\n" not in str(caught.value)
