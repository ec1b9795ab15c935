"""Span corruption and prefix LM: worked numbers, slow references, invariants."""

import itertools

import numpy as np
import pytest

from switchx.data import span_corruption as sc
from switchx.errors import UserError

VOCAB = 8100


@pytest.mark.parametrize(
    ("inputs", "raw", "targets"),
    [(128, 141, 29), (256, 284, 58), (512, 568, 114), (1024, 1137, 229)],
)
def test_span_lengths_are_the_published_ones(inputs, raw, targets):
    assert sc.span_lengths(inputs) == (raw, targets)


def slow_span_lengths(inputs_length, density, mean):
    """Corrupt rows of every length and keep the longest whose inputs fit."""
    best = None
    for length in range(2, 3 * inputs_length + 20):
        example = sc.corrupt(
            np.arange(3, length + 3), np.random.default_rng(0), VOCAB, density, mean
        )
        if len(example.inputs) <= inputs_length:
            best = (length, len(example.targets))
    return best


@pytest.mark.parametrize(("density", "mean"), [(0.15, 3.0), (0.5, 3.0), (0.3, 1.0), (0.15, 8.0)])
def test_span_lengths_equal_a_slow_search(density, mean):
    for inputs_length in (*range(4, 50), 127):
        expected = slow_span_lengths(inputs_length, density, mean)
        assert sc.span_lengths(inputs_length, density, mean) == expected, inputs_length


def test_span_lengths_fill_every_inputs_length_exactly():
    for inputs_length in (*range(4, 200), *range(200, 1801, 100), 1801):
        raw, targets = sc.span_lengths(inputs_length)
        num_noise, num_spans = sc.noise_counts(raw)
        assert raw - num_noise + num_spans + 1 == inputs_length
        assert num_noise + num_spans + 1 == targets


def test_span_lengths_refuse_what_cannot_be():
    with pytest.raises(UserError, match="2 is too short"):
        sc.span_lengths(2)
    with pytest.raises(UserError, match="4096 needs 2.. sentinels"):
        sc.span_lengths(4096)
    with pytest.raises(UserError, match="noise density 1.5"):
        sc.span_lengths(128, noise_density=1.5)
    with pytest.raises(UserError, match="mean span length 0.5"):
        sc.span_lengths(128, mean_span_length=0.5)


def test_noise_counts_by_hand():
    assert sc.noise_counts(568) == (85, 28)
    assert sc.noise_counts(2) == (1, 1)
    # 10 % of 5 rounds to 0 noise tokens, and there is always one.
    assert sc.noise_counts(5, 0.1) == (1, 1)
    # 90 % noise in spans of 1: only as many spans as there are tokens kept between them.
    assert sc.noise_counts(10, 0.9, 1.0) == (9, 1)


def test_apply_mask_by_hand():
    tokens = np.array([10, 11, 12, 13, 14, 15, 16])
    mask = np.array([False, True, True, False, False, True, False])
    example = sc.apply_mask(tokens, mask, vocab_size=100)
    assert example.inputs.tolist() == [10, 99, 13, 14, 98, 16, 1]
    assert example.targets.tolist() == [99, 11, 12, 98, 15, 97, 1]


@pytest.mark.parametrize("length", [2, 3, 7, 29, 141, 568])
def test_corruption_loses_nothing_and_names_spans_in_order(rebuild, length):
    tokens = np.random.default_rng(length).integers(3, VOCAB - 100, length)
    for seed in range(20):
        example = sc.corrupt(tokens, np.random.default_rng(seed), VOCAB)
        assert rebuild(example, VOCAB) == tokens.tolist()
        num_noise, num_spans = sc.noise_counts(length)
        expected = [VOCAB - 1 - i for i in range(num_spans)]
        for side in example:
            assert [t for t in side.tolist() if t >= VOCAB - 100] == expected
        # Inputs begin with a kept token and end in a hidden span; targets begin with a sentinel.
        assert example.inputs[0] == tokens[0]
        assert example.inputs[-2] == expected[-1]
        assert len(example.targets) == num_noise + num_spans + 1


def test_noise_masks_are_uniform_over_all_allowed_ones():
    # 8 tokens, density .5, mean 2: 4 noise tokens in 2 spans. Each kind is one of the 3
    # compositions of 4 in 2 parts, so 9 masks, equally likely.
    allowed = {
        (False,) * a + (True,) * b + (False,) * (4 - a) + (True,) * (4 - b)
        for a, b in itertools.product((1, 2, 3), repeat=2)
    }
    rng = np.random.default_rng(0)
    draws = [tuple(sc.noise_mask(8, rng, 0.5, 2.0).tolist()) for _ in range(9000)]
    assert set(draws) == allowed
    counts = np.array([draws.count(mask) for mask in allowed])
    # Chi-squared with 8 degrees of freedom: 99.9 % lie below 26.1.
    assert ((counts - 1000) ** 2 / 1000).sum() < 26.1


def test_split_prefix_is_uniform_and_keeps_order():
    tokens = np.arange(10, 20)
    rng = np.random.default_rng(0)
    lengths = []
    for _ in range(4000):
        inputs, targets = sc.split_prefix(tokens, rng, targets_length=6)
        assert inputs[:-1].tolist() + targets[:-1].tolist() == tokens.tolist()
        assert inputs[-1] == targets[-1] == 1
        lengths.append(len(targets))
    # 1..5 target tokens and EOS fit a targets length of 6.
    counts = np.bincount(lengths)[2:]
    assert len(counts) == 5
    assert ((counts - 800) ** 2 / 800).sum() < 18.5
