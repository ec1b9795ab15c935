"""Dataset-to-dataset steps of the seqio tasks: tokens in rows, and the objectives on rows.

The laws are those of `switchx.data.span_corruption`, here on many rows at once in TensorFlow and
with stateless seeds, which seqio's seed manager derives from the one seed of the pipeline.
"""

from collections.abc import Callable, Mapping
from typing import Any

from switchx.data.backend import seqio, tf
from switchx.data.span_corruption import EOS, span_lengths

# Documents whose tokens are concatenated before they are cut into rows. A group ends in at most
# one short row: 64 paragraph-sized pieces fill 99 % of their rows before packing.
DOCUMENTS_PER_GROUP = 64
# A longer document gives one random window, so that a book does not drown the rest.
MAX_DOCUMENT_TOKENS = 65536

# Nothing here needs autograph, and converting the code costs more than running it.
plain = tf.autograph.experimental.do_not_convert
# (rows [R, n], seed [2]) -> ragged inputs and targets [R, None], EOS included.
Objective = Callable[[Any, Any], tuple[tf.RaggedTensor, tf.RaggedTensor]]


def span_corruption(
    dataset: tf.data.Dataset,
    sequence_length: Mapping[str, int],
    output_features: Mapping[str, Any],
    noise_density: float,
    mean_span_length: float,
) -> tf.data.Dataset:
    """Tokens under 'text' to span-corrupted 'inputs' and 'targets', EOS included."""
    lengths = span_lengths(sequence_length["inputs"], noise_density, mean_span_length)
    vocab_size = output_features["inputs"].vocabulary.vocab_size

    def objective(rows_RN, seed):
        mask_RN = noise_mask(rows_RN, seed, noise_density, mean_span_length)
        kept_RN = tf.logical_not(mask_RN)
        return hide(rows_RN, mask_RN, vocab_size), hide(rows_RN, kept_RN, vocab_size)

    return _rows(dataset, lengths.raw_tokens_length, objective)


def prefix_lm(dataset: tf.data.Dataset, sequence_length: Mapping[str, int]) -> tf.data.Dataset:
    """Tokens under 'text' to rows of an inputs length, cut into 'inputs' and 'targets' + EOS."""
    targets_length = sequence_length["targets"]

    def objective(rows_RN, seed):
        num_rows, length = tf.unstack(tf.shape(rows_RN))
        num_targets_R1 = tf.random.stateless_uniform(
            [num_rows, 1], seed, 1, tf.minimum(length, targets_length), tf.int32
        )
        is_input_RN = tf.range(length)[None] < length - num_targets_R1
        return (
            _append_eos(tf.ragged.boolean_mask(rows_RN, is_input_RN)),
            _append_eos(tf.ragged.boolean_mask(rows_RN, tf.logical_not(is_input_RN))),
        )

    return _rows(dataset, sequence_length["inputs"], objective)


def noise_mask(
    rows_RN: tf.Tensor, seed: tf.Tensor, noise_density: float, mean_span_length: float
) -> tf.Tensor:
    """Noise masks [R, N] of rows of N >= 2 tokens; the law is `span_corruption.noise_mask`."""
    num_rows, length = tf.unstack(tf.shape(rows_RN))
    # Float64 rounds as Python does; float32 differs at some lengths.
    num_noise = tf.cast(tf.round(tf.cast(length, tf.float64) * noise_density), tf.int32)
    num_noise = tf.clip_by_value(num_noise, 1, length - 1)
    num_spans = tf.cast(tf.round(tf.cast(num_noise, tf.float64) / mean_span_length), tf.int32)
    num_spans = tf.minimum(tf.maximum(num_spans, 1), tf.minimum(num_noise, length - num_noise))
    seeds = tf.random.split(seed, 2)
    kept_RK = _random_compositions(num_rows, length - num_noise, num_spans, seeds[0])
    noise_RK = _random_compositions(num_rows, num_noise, num_spans, seeds[1])
    lengths_RK = tf.reshape(tf.stack([kept_RK, noise_RK], axis=2), [num_rows, 2 * num_spans])
    positions_RN = tf.tile(tf.range(length)[None], [num_rows, 1])
    span_RN = tf.searchsorted(tf.cumsum(lengths_RK, axis=1), positions_RN, side="right")
    return tf.math.floormod(span_RN, 2) == 1


def hide(rows_RN: tf.Tensor, hidden_RN: tf.Tensor, vocab_size: int) -> tf.RaggedTensor:
    """Rows with each hidden span as one sentinel, counting down, and EOS behind."""
    kept_RN = tf.logical_not(hidden_RN)
    # Pad with "kept": a row that begins hidden begins a span.
    starts = hidden_RN & tf.pad(kept_RN[:, :-1], [[0, 0], [1, 0]], constant_values=True)
    sentinels = vocab_size - tf.cumsum(tf.cast(starts, tf.int32), axis=1)
    return _append_eos(
        tf.ragged.boolean_mask(tf.where(starts, sentinels, rows_RN), starts | kept_RN)
    )


def _random_compositions(num_rows, total, parts, seed) -> tf.Tensor:
    keys = tf.random.stateless_uniform([num_rows, total - 1], seed)
    cuts = tf.sort(tf.math.top_k(keys, parts - 1).indices, axis=1) + 1
    ends = tf.fill([num_rows, 1], total)
    bounds = tf.concat([tf.zeros_like(ends), cuts, ends], axis=1)
    return bounds[:, 1:] - bounds[:, :-1]


def _append_eos(rows: tf.RaggedTensor) -> tf.RaggedTensor:
    return tf.concat([rows, tf.fill([rows.nrows(), 1], EOS)], axis=1)


def _rows(dataset: tf.data.Dataset, length: int, objective: Objective) -> tf.data.Dataset:
    def corrupt(documents, seeds):
        seeds = tf.stack([tf.stack(pair) for pair in seeds])
        tokens = _concatenate(documents, seeds[0])
        num_rows = tf.size(tokens) // length
        full = tf.reshape(tokens[: num_rows * length], [num_rows, length])
        full_inputs, full_targets = objective(full, seeds[1])
        tail = tokens[num_rows * length :]
        # One token cannot be split into kept and hidden; a row needs two.
        tail = tf.reshape(tail, [1, -1])[: tf.cast(tf.size(tail) >= 2, tf.int32)]
        tail = tf.cond(tf.shape(tail)[0] > 0, lambda: tail, lambda: tf.zeros([0, 2], tf.int32))
        tail_inputs, tail_targets = objective(tail, seeds[2])
        return {
            "inputs": tf.concat([full_inputs, tail_inputs], axis=0),
            "targets": tf.concat([full_targets, tail_targets], axis=0),
        }

    documents = dataset.map(plain(lambda example: example["text"]))
    groups = documents.ragged_batch(DOCUMENTS_PER_GROUP)
    rows: Any = seqio.map_over_dataset(plain(corrupt), num_seeds=3)(groups)
    return rows.unbatch()


def _concatenate(documents: tf.RaggedTensor, seed: tf.Tensor) -> tf.Tensor:
    lengths = documents.row_lengths()
    num_windows = tf.maximum((lengths + MAX_DOCUMENT_TOKENS - 1) // MAX_DOCUMENT_TOKENS, 1)
    uniform = tf.random.stateless_uniform(tf.shape(lengths), seed, dtype=tf.float64)
    window = tf.cast(uniform * tf.cast(num_windows, tf.float64), tf.int64)
    document = documents.value_rowids()
    position = tf.range(tf.size(document, tf.int64)) - tf.gather(documents.row_starts(), document)
    kept = position // MAX_DOCUMENT_TOKENS == tf.gather(window, document)
    return tf.boolean_mask(documents.values, kept)
