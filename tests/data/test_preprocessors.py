"""The TensorFlow form of the objectives against the NumPy law on the same tokens."""

import itertools
import math

import numpy as np
import pytest

from switchx.data import preprocessors
from switchx.data import span_corruption as sc
from switchx.data.backend import seqio, tf

FEATURES = {
    key: seqio.Feature(seqio.ByteVocabulary(extra_ids=100)) for key in ("inputs", "targets")
}
VOCAB = 8100
BYTES = FEATURES["inputs"].vocabulary.vocab_size


def run(documents, step, seed=0, **kwargs):
    """Examples of `step` on documents given as lists of ids."""
    ragged = tf.ragged.constant(documents, dtype=tf.int32)
    dataset = tf.data.Dataset.from_tensor_slices({"text": ragged})
    with seqio.map_seed_manager(seed):
        dataset = step(dataset, **kwargs)
    found = [{key: np.asarray(value) for key, value in e.items()} for e in dataset]
    return [sc.Example(e["inputs"], e["targets"]) for e in found]


def corrupt(documents, inputs_length, seed=0):
    return run(
        documents,
        preprocessors.span_corruption,
        seed,
        sequence_length={"inputs": inputs_length, "targets": 1000},
        output_features=FEATURES,
        noise_density=0.15,
        mean_span_length=3.0,
    )


@pytest.mark.parametrize(
    ("length", "density", "mean"),
    [(2, 0.15, 3.0), (3, 0.5, 1.0), (10, 0.9, 1.0), (141, 0.15, 3.0), (568, 0.15, 3.0)],
)
def test_noise_masks_obey_the_law(length, density, mean):
    rows = tf.zeros([7, length], tf.int32)
    masks = preprocessors.noise_mask(rows, tf.constant([3, 5]), density, mean).numpy()
    num_noise, num_spans = sc.noise_counts(length, density, mean)
    assert masks.shape == (7, length)
    assert (masks.sum(axis=1) == num_noise).all()
    starts = np.diff(np.pad(masks, ((0, 0), (1, 0))).astype(int), axis=1) == 1
    assert (starts.sum(axis=1) == num_spans).all()
    assert not masks[:, 0].any() and masks[:, -1].all()


def test_noise_counts_agree_with_python_at_every_length():
    for length in (*range(2, 60), *range(60, 700, 10)):
        mask = preprocessors.noise_mask(
            tf.zeros([1, length], tf.int32), tf.constant([1, 2]), 0.15, 3.0
        )
        starts = np.diff(np.pad(mask.numpy()[0], (1, 0)).astype(int)) == 1
        assert (int(mask.numpy().sum()), int(starts.sum())) == sc.noise_counts(length), length


def test_noise_masks_are_uniform_over_all_allowed_ones():
    masks = preprocessors.noise_mask(tf.zeros([9000, 8], tf.int32), tf.constant([0, 0]), 0.5, 2.0)
    draws = [tuple(mask) for mask in masks.numpy().tolist()]
    allowed = [
        (False,) * a + (True,) * b + (False,) * (4 - a) + (True,) * (4 - b)
        for a, b in itertools.product((1, 2, 3), repeat=2)
    ]
    counts = np.array([draws.count(mask) for mask in allowed])
    assert counts.sum() == 9000
    assert ((counts - 1000) ** 2 / 1000).sum() < 26.1


def test_corruption_of_rows_equals_the_numpy_law_on_the_same_mask():
    rows = np.random.default_rng(0).integers(3, VOCAB - 100, (5, 29)).astype(np.int32)
    mask = preprocessors.noise_mask(tf.constant(rows), tf.constant([3, 5]), 0.15, 3.0)
    inputs = preprocessors.hide(tf.constant(rows), mask, VOCAB).to_list()
    targets = preprocessors.hide(tf.constant(rows), ~mask, VOCAB).to_list()
    for i, row in enumerate(rows):
        expected = sc.apply_mask(row, mask.numpy()[i], VOCAB)
        assert inputs[i] == expected.inputs.tolist()
        assert targets[i] == expected.targets.tolist()


def test_span_corruption_chunks_documents_and_loses_at_most_a_token(rebuild):
    rng = np.random.default_rng(1)
    documents = [rng.integers(3, 200, n).tolist() for n in (5, 90, 1, 33, 61)]
    flat = sum(documents, [])
    examples = corrupt(documents, inputs_length=32)
    raw, targets_length = sc.span_lengths(32)
    assert [len(e.inputs) for e in examples[:-1]] == [32] * (len(examples) - 1)
    assert {len(e.targets) for e in examples[:-1]} == {targets_length}
    assert len(examples) == math.ceil(len(flat) / raw)
    assert sum((rebuild(e, BYTES) for e in examples), []) == flat


def test_a_single_left_over_token_is_dropped(rebuild):
    raw, _ = sc.span_lengths(32)
    documents = [list(range(3, 3 + raw)), [77]]
    examples = corrupt(documents, inputs_length=32)
    assert len(examples) == 1
    assert rebuild(examples[0], BYTES) == documents[0]


def test_seeds_decide_the_noise():
    documents = [list(range(3, 203))]
    tokens = [[e.inputs.tolist() for e in corrupt(documents, 32, seed)] for seed in (0, 0, 1)]
    assert tokens[0] == tokens[1] != tokens[2]
    # Rows of one group are not all cut alike.
    assert len({tuple(np.flatnonzero(np.array(row) > 258)) for row in tokens[0][:-1]}) > 1


def test_a_long_document_gives_one_window(rebuild, monkeypatch):
    monkeypatch.setattr(preprocessors, "MAX_DOCUMENT_TOKENS", 20)
    # Three windows of 20 tokens and one of 10; a short document between two long ones.
    long, short = list(range(3, 73)), list(range(100, 115))
    tokens = sum((rebuild(e, BYTES) for e in corrupt([long, short] * 30, 8)), [])
    starts = []
    while len(tokens) > 35:  # the very last token may have been left over
        starts.append(tokens[0])
        window = list(range(tokens[0], min(tokens[0] + 20, 73)))
        assert tokens[: len(window) + 15] == window + short
        tokens = tokens[len(window) + 15 :]
    assert len(starts) > 25
    assert set(starts) == {3, 23, 43, 63}


def test_prefix_lm_cuts_rows_in_two():
    documents = [np.random.default_rng(2).integers(3, 200, 1003).tolist()]
    lengths = {"inputs": 20, "targets": 9}
    examples = run(documents, preprocessors.prefix_lm, sequence_length=lengths)
    joined = sum((e.inputs[:-1].tolist() + e.targets[:-1].tolist() for e in examples), [])
    assert joined == documents[0]
    assert all(e.inputs[-1] == e.targets[-1] == 1 for e in examples)
    assert max(len(e.inputs) for e in examples) <= 20
    # 1..8 target tokens and EOS, each of them drawn in 51 rows.
    assert {len(e.targets) for e in examples} == set(range(2, 10))
