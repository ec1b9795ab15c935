"""Objectives on many rows: the one-row law on the same noise, and the same distribution."""

import itertools

import numpy as np
import pytest

from switchx.data import objectives, preprocessors
from switchx.data import span_corruption as sc
from switchx.data.backend import tf

VOCAB = 8100
PRESETS = [(2, 0.15, 3.0), (3, 0.5, 1.0), (10, 0.9, 1.0), (29, 0.15, 3.0), (568, 0.15, 3.0)]


def corruption(density=0.15, mean=3.0):
    return objectives.SpanCorruption(512, VOCAB, density, mean)


def chi_squared(counts, expected):
    return float(((np.asarray(counts) - expected) ** 2 / expected).sum())


def test_a_row_by_hand():
    rows = np.array([[10, 11, 12, 13, 14, 15, 16], [20, 21, 22, 23, 24, 25, 26]])
    noise = np.array([[1, 2, 2, 2], [2, 1, 1, 3]])
    found = objectives.SpanCorruption(6, 100, 0.5, 2.0).apply(rows, noise)
    assert found.inputs.tolist() == [10, 99, 13, 14, 98, 1, 20, 21, 99, 23, 98, 1]
    assert found.targets.tolist() == [99, 11, 12, 98, 15, 16, 1, 99, 22, 98, 24, 25, 26, 1]


@pytest.mark.parametrize(("length", "density", "mean"), PRESETS)
@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_rows_equal_the_slow_law_and_tensorflow_on_the_same_mask(length, density, mean, dtype):
    objective = corruption(density, mean)
    rng = np.random.default_rng(length)
    rows = rng.integers(3, VOCAB - 100, (7, length)).astype(dtype)
    noise = objective.draw(7, length, rng)
    mask = objectives.noise_mask(noise)
    found = objective.apply(rows, noise)
    assert found.inputs.dtype == found.targets.dtype == dtype
    slow = [sc.apply_mask(row, row_mask, VOCAB) for row, row_mask in zip(rows, mask, strict=True)]
    assert found.inputs.tolist() == np.concatenate([example.inputs for example in slow]).tolist()
    assert found.targets.tolist() == np.concatenate([example.targets for example in slow]).tolist()
    in_tf = tf.constant(rows.astype(np.int32))
    assert found.inputs.tolist() == preprocessors.hide(in_tf, mask, VOCAB).values.numpy().tolist()
    assert found.targets.tolist() == preprocessors.hide(in_tf, ~mask, VOCAB).values.numpy().tolist()
    inputs, targets = objective.lengths(noise, length)
    assert inputs.tolist() == [len(example.inputs) for example in slow]
    assert targets.tolist() == [len(example.targets) for example in slow]


@pytest.mark.parametrize(("length", "density", "mean"), PRESETS)
def test_counts_are_exact(length, density, mean):
    noise = corruption(density, mean).draw(50, length, np.random.default_rng(0))
    num_noise, num_spans = sc.noise_counts(length, density, mean)
    assert noise.shape == (50, 2 * num_spans)
    assert noise.min() >= 1
    assert (noise[:, 1::2].sum(axis=1) == num_noise).all()
    assert (noise.sum(axis=1) == length).all()


def test_masks_are_uniform_over_all_allowed_ones():
    noise = corruption(0.5, 2.0).draw(9000, 8, np.random.default_rng(0))
    draws = [tuple(row) for row in noise.tolist()]
    allowed = [(a, b, 4 - a, 4 - b) for a, b in itertools.product((1, 2, 3), repeat=2)]
    counts = [draws.count(row) for row in allowed]
    assert sum(counts) == 9000
    # Chi-squared with 8 degrees of freedom: 99.9 % lie below 26.1.
    assert chi_squared(counts, 1000) < 26.1


def test_masks_have_the_distribution_of_tensorflow_and_of_the_slow_law():
    length, count = 57, 4000
    ours = objectives.noise_mask(corruption().draw(count, length, np.random.default_rng(1)))
    theirs = preprocessors.noise_mask(
        tf.zeros([count, length], tf.int32), tf.constant([3, 5]), 0.15, 3.0
    ).numpy()
    rng = np.random.default_rng(2)
    slow = np.stack([sc.noise_mask(length, rng) for _ in range(count)])
    for other in (theirs, slow):
        # How often each position is noise: 57 differences of means, each below 5 deviations.
        deviation = np.sqrt(2 * np.maximum(other.mean(axis=0), 1 / count) / count)
        assert (np.abs(ours.mean(axis=0) - other.mean(axis=0)) < 5 * deviation).all()
        # Lengths of noise spans, as a two-sample chi-squared.
        histograms = [np.bincount(span_lengths(mask), minlength=8)[1:8] for mask in (ours, other)]
        both = np.sum(histograms, axis=0)
        assert all(chi_squared(each, both / 2) < 30 for each in histograms)


def span_lengths(mask):
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(int), axis=1)
    return np.nonzero(edges == -1)[1] - np.nonzero(edges == 1)[1]


def test_compositions_at_their_limits():
    rng = np.random.default_rng(0)
    for total, parts in ((1, 1), (5, 1), (5, 5), (5, 4), (2, 2)):
        found = objectives.random_compositions(6, total, parts, rng)
        assert found.shape == (6, parts) and found.min() >= 1
        assert (found.sum(axis=1) == total).all()
    assert objectives.random_compositions(0, 5, 3, rng).shape == (0, 3)


def test_prefixes_by_hand_and_uniform():
    rows = np.array([[5, 6, 7, 8], [15, 16, 17, 18]], np.uint16)
    objective = objectives.PrefixLm(4, 9)
    found = objective.apply(rows, np.array([[1], [3]]))
    assert found.inputs.tolist() == [5, 6, 7, 1, 15, 1]
    assert found.targets.tolist() == [8, 1, 16, 17, 18, 1]
    lengths = objective.lengths(np.array([[1], [3]]), 4)
    assert [side.tolist() for side in lengths] == [[4, 2], [2, 4]]
    # 1..5 target tokens and EOS fit a targets length of 6.
    noise = objectives.PrefixLm(10, 6).draw(5000, 10, np.random.default_rng(0))
    counts = np.bincount(noise[:, 0])
    assert len(counts) == 6 and counts[0] == 0
    assert chi_squared(counts[1:], 1000) < 18.5
