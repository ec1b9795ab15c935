"""Scores of text, worked by hand."""

import pytest

from switchx.data import text_metrics as tm


def test_exact_match_and_accuracy():
    targets = ["yes", ["bike", "motorcycle"], "a  b", "no"]
    predictions = ["yes", "motorcycle", "a b ", "No"]
    assert tm.exact_match(targets, predictions) == {"exact_match": 75.0}
    assert tm.accuracy(targets, predictions) == {"accuracy": 75.0}


def test_macro_f1():
    # a: 1 hit of 2 guessed, 1 wanted: 2/3. b: 1 hit of 1 guessed, 2 wanted: 2/3. c: never: 0.
    targets, predictions = ["a", "b", "b", "c"], ["a", "b", "a", "x"]
    assert tm.macro_f1(targets, predictions)["macro_f1"] == pytest.approx(100 * (4 / 3) / 3)


def test_rouge_l():
    # Lin 2004, section 3.1: "police killed the gunman" against two guesses: 3 of 4, 2 of 4 words.
    reference = "Police killed the gunman."
    guesses = ["police kill the gunman", "the gunman kill police"]
    assert tm.rouge_l([reference] * 2, guesses)["rouge_l"] == pytest.approx(100 * (0.75 + 0.5) / 2)
    assert tm.rouge_l([["x y", "the end"]], ["the end"])["rouge_l"] == 100.0
    assert tm.rouge_l(["the end"], [""])["rouge_l"] == 0.0


def test_chrf():
    assert tm.chrf(["the cat"], ["thecat"])["chrf"] == pytest.approx(100.0)
    # "ab" against "abc": precision 1 at orders 1 and 2; recall 2/3 and 1/2; the guess has no
    # trigram. Averages 1 and 7/12; F2 = 5 P R / (4 P + R).
    expected = 100 * 5 * (7 / 12) / (4 + 7 / 12)
    assert tm.chrf(["abc"], ["ab"])["chrf"] == pytest.approx(expected)
    assert tm.chrf(["abc"], ["xyz"])["chrf"] == 0.0
    assert tm.chrf(["abc"], [""])["chrf"] == 0.0


def test_phoneme_error_rate():
    # One phoneme replaced, one inserted; then one left out: 3 edits of 5 phonemes.
    targets, predictions = ["M AE1 D", "AH0 K"], ["M EH1 D Z", "K"]
    assert tm.phoneme_error_rate(targets, predictions) == {"phoneme_error_rate": 60.0}


def test_metrics_go_by_their_names_and_take_nothing():
    assert set(tm.METRICS) == {
        "exact_match", "accuracy", "macro_f1", "rouge_l", "chrf", "phoneme_error_rate",
    }  # fmt: skip
    for name, metric in tm.METRICS.items():
        assert metric([], []) == {name: 0.0}
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        tm.exact_match(["a", "b"], ["a"])
