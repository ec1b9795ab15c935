"""Mixing rates worked by hand, and mistakes in mixtures."""

import pytest

from switchx.data.mixtures import EMBEDDED, Mixture, mixing_rates
from switchx.data.tasks import EMBEDDED_SUPERVISED
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
        # A maximum without capped or tempered rates changes nothing.
        ({"maximum": 900}, (100, 400, 10_000)),
    ],
)
def test_rates_by_hand(options, weights):
    rates = mixing_rates(Mixture("m", ["a", "b", "c"], **options), COUNTS)
    expected = [weight / sum(weights) for weight in weights]
    assert list(rates.values()) == pytest.approx(expected)
    assert sum(rates.values()) == pytest.approx(1.0)


def test_embedded_mixtures_hold_the_transfer_tasks_out():
    assert set(EMBEDDED) == {"embedded_instructions", "embedded_pretrain_and_tasks"}
    for mixture in EMBEDDED.values():
        assert not {"sotu_period", "wn_define"} & set(mixture.tasks)
    assert len(EMBEDDED["embedded_instructions"].tasks) == 8
    assert set(EMBEDDED["embedded_instructions"].tasks) < set(EMBEDDED_SUPERVISED)
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
    ({"rates": {"first": 0, "second": 1}}, "rates\\['first'\\] = 0 must be a positive"),
    ({"maximum": "3"}, "Mixture.maximum = '3'"),
    ({"temperature": 0}, "Mixture.temperature = 0"),
]


@pytest.mark.parametrize(("options", "message"), MISTAKES)
def test_user_mistakes(unchecked, options, message):
    with pytest.raises(UserError, match=message) as caught:
        Mixture(**{"name": "m", "tasks": ["first", "second"], **options})
    assert "\n" not in str(caught.value)
