"""Packing: worked numbers, seqio as the oracle, nothing lost."""

import numpy as np

from switchx.data import packing
from switchx.data.backend import seqio, tf
from switchx.data.span_corruption import Example


def example(inputs, targets):
    return Example(np.array(inputs, np.int32), np.array(targets, np.int32))


def random_examples(count, seed=0, longest=(12, 7)):
    rng = np.random.default_rng(seed)
    return [
        example(*(rng.integers(2, 50, rng.integers(1, top + 1)) for top in longest))
        for _ in range(count)
    ]


def test_assemble_by_hand():
    rows = [[example([5, 6, 1], [7, 1]), example([8, 1], [9, 10, 1])], [example([4, 1], [3, 1])]]
    batch = packing.assemble(rows, 3, inputs_length=6, targets_length=5)
    expected = {
        "encoder_tokens": [[5, 6, 1, 8, 1, 0], [4, 1, 0, 0, 0, 0], [0] * 6],
        "encoder_segment_ids": [[1, 1, 1, 2, 2, 0], [1, 1, 0, 0, 0, 0], [0] * 6],
        "encoder_positions": [[0, 1, 2, 0, 1, 0], [0, 1, 0, 0, 0, 0], [0] * 6],
        "decoder_input_tokens": [[0, 7, 0, 9, 10], [0, 3, 0, 0, 0], [0] * 5],
        "decoder_target_tokens": [[7, 1, 9, 10, 1], [3, 1, 0, 0, 0], [0] * 5],
        "decoder_segment_ids": [[1, 1, 2, 2, 2], [1, 1, 0, 0, 0], [0] * 5],
        "decoder_positions": [[0, 1, 0, 1, 2], [0, 1, 0, 0, 0], [0] * 5],
        "decoder_loss_weights": [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0] * 5],
    }
    for key, value in expected.items():
        array = getattr(batch, key)
        assert array.tolist() == value, key
        assert array.dtype == (np.float32 if key == "decoder_loss_weights" else np.int32)


def test_pack_by_hand():
    lengths = [(3, 1), (3, 1), (2, 1), (2, 4)]
    # Room for 5 inputs and 4 targets: 2 goes behind 0; 3 has too many targets for 1's row.
    assert list(packing.pack(lengths, 5, 4)) == [[0, 2], [1], [3]]
    # With one row open, 1 closes 0's row.
    assert list(packing.pack(lengths, 5, 4, open_rows=1)) == [[0], [1, 2], [3]]


def test_pack_keeps_every_example_and_every_limit():
    lengths = [tuple(map(len, e)) for e in random_examples(300)]
    rows = list(packing.pack(iter(lengths), 16, 10))
    assert sorted(sum(rows, [])) == list(range(300))
    assert max(sum(lengths[i][0] for i in row) for row in rows) <= 16
    assert max(sum(lengths[i][1] for i in row) for row in rows) <= 10
    assert len(rows) < len(list(packing.pack(iter(lengths), 16, 10, open_rows=1)))


def through_seqio(examples, inputs_length, targets_length, pack):
    def generate():
        for e in examples:
            yield {"inputs": e.inputs, "targets": e.targets}

    spec = {key: tf.TensorSpec([None], tf.int32) for key in ("inputs", "targets")}
    dataset = tf.data.Dataset.from_generator(generate, output_signature=spec)
    lengths = {"inputs": inputs_length, "targets": targets_length}
    converted = seqio.EncDecFeatureConverter(pack=pack)(dataset, task_feature_lengths=lengths)
    (batch,) = converted.batch(10_000).as_numpy_iterator()
    return batch


def test_equals_seqio_packing_with_one_row_open():
    # seqio starts a new row every max(lengths) examples; 60 stay below that.
    examples = random_examples(60, longest=(30, 18))
    found = packing.pack((tuple(map(len, e)) for e in examples), 64, 40, open_rows=1)
    rows = [[examples[i] for i in row] for row in found]
    assert len(rows) > 5
    batch = packing.assemble(rows, len(rows), 64, 40)
    expected = through_seqio(examples, 64, 40, pack=True)
    for key, array in expected.items():
        ours = getattr(batch, key.replace("encoder_input_tokens", "encoder_tokens"))
        np.testing.assert_array_equal(ours, array, err_msg=key)


def test_equals_seqio_without_packing():
    examples = random_examples(20)
    batch = packing.assemble([[e] for e in examples], 20, 16, 10)
    expected = through_seqio(examples, 16, 10, pack=False)
    assert len(expected) == 4  # both token sides, decoder inputs, loss weights
    # Without packing seqio leaves EOS on the first padding position of the decoder inputs; ours
    # are 0 there, as in packed rows. No token is predicted at it.
    real = expected["decoder_loss_weights"]
    expected["decoder_input_tokens"] = expected["decoder_input_tokens"] * real
    for key, array in expected.items():
        ours = getattr(batch, key.replace("encoder_input_tokens", "encoder_tokens"))
        np.testing.assert_array_equal(ours, array, err_msg=key)
