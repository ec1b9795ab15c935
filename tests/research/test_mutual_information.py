import collections
import math

import numpy as np
import pytest

from switchx.research.mutual_information import corrected, plug_in


def loop(pairs) -> float:
    """Σ p(x, y) ln(p(x, y) / (p(x) p(y))), a pair at a time."""
    joint, total = collections.Counter(pairs), len(pairs)
    x_counts = collections.Counter(x for x, _ in pairs)
    y_counts = collections.Counter(y for _, y in pairs)
    return sum(
        count / total * math.log(count * total / (x_counts[x] * y_counts[y]))
        for (x, y), count in joint.items()
    )


def test_independent_values_say_nothing():
    x, y = np.divmod(np.arange(12), 4)
    assert plug_in(x, y) == pytest.approx(0, abs=1e-12)
    assert plug_in(np.zeros(5, int), np.arange(5)) == pytest.approx(0, abs=1e-12)
    assert plug_in(np.zeros(0, int), np.zeros(0, int)) == 0


def test_a_function_says_all_there_is():
    # Experts 0, 0, 1, 2: entropy (1/2) ln 2 + (1/4) ln 4 + (1/4) ln 4 = 1.5 ln 2.
    expert = np.array([0, 0, 1, 2])
    assert plug_in(np.array([7, 3, 5, 1]), expert) == pytest.approx(1.5 * math.log(2))
    assert plug_in(expert, expert) == pytest.approx(1.5 * math.log(2))


def test_by_hand():
    # p = 3/8, 1/8, 1/8, 3/8 with margins 1/2: (3/4) ln(3/2) + (1/4) ln(1/2).
    x = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    y = np.array([0, 0, 0, 1, 0, 1, 1, 1])
    want = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert plug_in(x, y) == pytest.approx(want)
    # The same as weights.
    weighted = plug_in(
        np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1]), np.array([0.6, 0.2, 0.2, 0.6])
    )
    assert weighted == pytest.approx(want)


def test_equals_a_loop():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 50, 400)
    y = (x + rng.integers(0, 3, 400)) % 7
    assert plug_in(x, y) == pytest.approx(loop(list(zip(x.tolist(), y.tolist(), strict=True))))


def test_chance_is_taken_off():
    rng = np.random.default_rng(0)
    tokens = np.arange(2000)
    experts = rng.integers(0, 8, 2000)
    # 300 values that say nothing: (300 - 1)(8 - 1) / 2N is 0.52 nats of nothing.
    values = rng.integers(0, 300, 2000)
    assert plug_in(values, experts) > 0.4
    assert corrected(values, tokens, experts) < 0.03
    # Values seen once say nothing that any other would not.
    assert plug_in(tokens, experts) > 2.0
    assert corrected(tokens, tokens, experts) == pytest.approx(0, abs=1e-9)
    # What an expert is a function of, with few values, keeps nearly all.
    assert corrected(experts, tokens, experts) == pytest.approx(plug_in(experts, experts), abs=0.03)
    assert corrected(experts, tokens, experts) == corrected(experts, tokens, experts)


def test_several_choices_and_none():
    # Tokens 0 to 999 choose two experts by their value, the others none at all.
    values = np.arange(2000) % 2
    tokens = np.repeat(np.arange(1000), 2)
    experts = 2 * values[tokens] + np.tile([0, 1], 1000)
    # Four experts, of which a value leaves two: ln 2 nats.
    assert corrected(values, tokens, experts) == pytest.approx(math.log(2), abs=0.01)
    nothing = np.zeros(0, int)
    assert corrected(values, nothing, nothing) == 0
