"""Numbered examples: every token of every epoch, any place at once, slow loops as reference."""

import numpy as np
import pytest

from switchx.data import examples as ex
from switchx.data.objectives import PrefixLm, SpanCorruption
from switchx.data.token_cache import Ragged

VOCAB = 8100


def ragged(sequences, dtype=np.uint16):
    offsets = np.cumsum([0, *map(len, sequences)])
    return Ragged(np.concatenate([np.asarray(s, dtype) for s in sequences]), offsets)


def documents(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, VOCAB - 100, length).tolist() for length in lengths]


def text(sequences, inputs_length=32, shuffle=True, **options):
    objective = SpanCorruption(inputs_length, VOCAB, 0.15, 3.0)
    return ex.TextExamples(ragged(sequences), objective, shuffle=shuffle, key=(7, "t"), **options)


def pieces(source, numbers, which=None, seed=0):
    """Inputs and targets of examples, each apart."""
    drawn = source.draw(np.asarray(numbers), np.random.default_rng(seed))
    which = np.arange(len(numbers)) if which is None else np.asarray(which)
    sides = drawn.read(which)
    lengths = drawn.inputs_lengths[which], drawn.targets_lengths[which]
    return list(
        zip(
            *(
                np.split(side, np.cumsum(each)[:-1])
                for side, each in zip(sides, lengths, strict=True)
            ),
            strict=True,
        )
    )


def test_ranges_by_hand():
    found = ex.ranges(np.array([5, 0, 9]), np.array([2, 0, 3]))
    assert found.tolist() == [5, 6, 9, 10, 11]
    assert ex.ranges(np.zeros(0, int), np.zeros(0, int)).tolist() == []


def test_generators_differ_by_every_part():
    first = ex.generator(1, "a", 2).random()
    assert ex.generator(1, "a", 2).random() == first
    others = [ex.generator(*parts).random() for parts in ((2, "a", 2), (1, "b", 2), (1, "a", 3))]
    assert first not in others and len(set(others)) == 3


def test_without_shuffling_rows_are_the_text_in_order(rebuild):
    sequences = documents([5, 90, 0, 1, 33, 61])
    source = text(sequences, shuffle=False)
    flat = sum(sequences, [])
    raw = source._objective.raw_length
    assert source.count == -(-len(flat) // raw)
    found = [ex_of(pair) for pair in pieces(source, np.arange(source.count))]
    rebuilt = [rebuild(example, VOCAB) for example in found]
    assert rebuilt == [flat[i : i + raw] for i in range(0, len(flat), raw)]


def ex_of(pair):
    from switchx.data.span_corruption import Example

    return Example(*pair)


def test_an_epoch_is_every_token_once_in_a_new_order(rebuild):
    sequences = [[1000 + 10 * i + j for j in range(i % 9)] for i in range(60)]
    source = text(sequences)
    tokens = sum(sequences, [])
    orders = []
    for epoch in range(3):
        numbers = epoch * source.count + np.arange(source.count)
        rows = [rebuild(ex_of(pair), VOCAB) for pair in pieces(source, numbers)]
        found = sum(rows, [])
        # A single token left over makes no row.
        assert len(tokens) - len(found) <= 1 and set(found) <= set(tokens)
        assert len(set(found)) == len(found)
        orders.append(found)
        # Documents stay whole but for where a row ends.
        joints = sum(b != a + 1 for row in rows for a, b in zip(row, row[1:], strict=False))
        assert joints <= len(sequences)
    assert orders[0] != orders[1] != orders[2]


def test_a_single_left_over_token_is_no_row():
    raw = text(documents([100]))._objective.raw_length
    assert text(documents([raw + 1])).count == 1
    assert text(documents([raw + 2])).count == 2
    assert text(documents([1])).count == 0
    assert text([[]]).count == 0


@pytest.mark.parametrize("objective", [SpanCorruption(32, VOCAB, 0.15, 3.0), PrefixLm(20, 9)])
def test_any_choice_of_rows_is_what_all_of_them_have_there(objective):
    source = ex.TextExamples(ragged(documents([50] * 9)), objective, shuffle=True, key=(1, "x"))
    numbers = np.arange(3, 3 + 2 * source.count)  # over three epochs, with their short rows
    whole = pieces(source, numbers)
    which = np.random.default_rng(0).permutation(len(numbers))[: len(numbers) // 2]
    for place, pair in zip(which, pieces(source, numbers, which), strict=True):
        for side in range(2):
            np.testing.assert_array_equal(pair[side], whole[place][side])


def test_long_documents_give_one_window_an_epoch(rebuild):
    # 70 tokens are 4 windows of 17 and 2 that are over; 15 stay whole.
    long, short = list(range(3, 73)), list(range(100, 115))
    source = text([long, short], inputs_length=8, max_document_tokens=20)
    assert source._total == 17 + 15
    starts, seen = set(), set()
    for epoch in range(200):
        numbers = epoch * source.count + np.arange(source.count)
        rows = [rebuild(ex_of(pair), VOCAB) for pair in pieces(source, numbers)]
        found = sorted(sum(rows, []))
        window = [token for token in found if token < 100]
        assert window == list(range(window[0], window[0] + 17)) or len(window) == 16
        starts.add(window[0])
        seen |= set(window)
    assert {start - 3 for start in starts} <= {17 * w + s for w in range(4) for s in range(4)}
    assert len(starts) > 8 and seen == set(long)


def test_pairs_are_cut_and_still_end():
    inputs = ragged([[5, 6, 7, 1], [8, 1], [9, 10, 11, 12]])
    targets = ragged([[4, 1], [5, 6, 7, 8, 1], [1]])
    source = ex.PairExamples(inputs, targets, (3, 3), shuffle=False, key=(0, "p"))
    assert source.count == 3
    found = [[side.tolist() for side in pair] for pair in pieces(source, [0, 1, 2, 3])]
    # The last inputs have no EOS and are only cut.
    expected = [[[5, 6, 1], [4, 1]], [[8, 1], [5, 6, 1]], [[9, 10, 11], [1]]]
    assert found == [*expected, expected[0]]
    assert source.mean_length == pytest.approx((3 + 2 + 3) / 3 + (2 + 3 + 1) / 3)
    again = [[side.tolist() for side in pair] for pair in pieces(source, [0, 1, 2, 3], [2, 0])]
    assert again == [expected[2], expected[0]]


def test_pairs_have_an_order_for_every_epoch():
    side = ragged([[i] for i in range(10, 60)])
    source = ex.PairExamples(side, side, (3, 3), shuffle=True, key=(0, "p"))
    found = [int(pair[0][0]) for pair in pieces(source, np.arange(100))]
    assert sorted(found[:50]) == sorted(found[50:]) == list(range(10, 60))
    assert found[:50] != found[50:]
    assert [int(pair[0][0]) for pair in pieces(source, np.arange(60, 70))] == found[60:70]
