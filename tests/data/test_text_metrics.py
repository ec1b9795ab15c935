"""Scores of text, worked by hand, and equal to T5's where its package is installed."""

import inspect

import numpy as np
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
    # Over the options d counts as 0 too.
    found = tm.mean_multiclass_f1(targets, predictions, ("a", "b", "c", "d"))
    assert found["mean_multiclass_f1"] == pytest.approx(100 * (4 / 3) / 4)


def test_f1_takes_what_is_no_label_for_the_wrong_one():
    targets = ["yes", "yes", "no", "no", "yes"]
    predictions = ["yes", "??", "??", "no", "no"]
    # 'yes': 1 hit; guessed twice (the second for the invalid answer to a 'no'), wanted 3 times.
    assert tm.f1(targets, predictions, ("no", "yes"))["f1"] == pytest.approx(100 * 2 / 5)
    # 'no' last: 1 hit; guessed 3 times, wanted twice.
    assert tm.f1(targets, predictions, ("yes", "no"))["f1"] == pytest.approx(100 * 2 / 5)
    assert tm.f1(["no", "no"], ["no", "no"], ("no", "yes")) == {"f1": 0.0}


def test_matthews_corrcoef():
    # 1 true positive, 2 true negatives, 1 miss: (2 - 0) / sqrt(1 * 2 * 2 * 3).
    targets, predictions = ["1", "1", "0", "0"], ["1", "0", "0", "0"]
    found = tm.matthews_corrcoef(targets, predictions, ("0", "1"))["matthews_corrcoef"]
    assert found == pytest.approx(100 * 2 / 12**0.5)
    assert tm.matthews_corrcoef(targets, ["1"] * 4, ("0", "1")) == {"matthews_corrcoef": 0.0}
    # Two answers that are no label are one kind of wrong.
    wrong = [tm.matthews_corrcoef(targets, ["1", a, b, "0"], ("0", "1")) for a, b in ("xy", "xx")]
    assert wrong[0] == wrong[1]


def test_correlations():
    # Deviations (-1, 0, 1) and (-1, -1, 2): 3 / sqrt(2 * 6); ranks 1, 2, 3 and 1.5, 1.5, 3.
    targets, predictions = ["1.0", "2.0", "3.0"], ["-1", "what", "2"]
    pearson = tm.pearson_corrcoef(targets, predictions)["pearson_corrcoef"]
    assert pearson == pytest.approx(100 * 3 / 12**0.5)
    spearman = tm.spearman_corrcoef(targets, predictions)["spearman_corrcoef"]
    assert spearman == pytest.approx(100 * 1.5 / 3**0.5)
    for constant in (["4", "4", "4"], ["nan", "inf", "x"]):
        assert tm.pearson_corrcoef(targets, constant) == {"pearson_corrcoef": 0.0}
        assert tm.spearman_corrcoef(constant, targets) == {"spearman_corrcoef": 0.0}


def test_squad():
    targets = [["The Eiffel Tower!"], ["a red house", "blue"]]
    # The second shares 1 of 2 and 1 of 2 words with "red house".
    found = tm.squad(targets, ["eiffel tower", "red door"])
    assert found == {"em": 50.0, "f1": pytest.approx(100 * (1 + 0.5) / 2)}


def test_record_scores_a_query_once():
    row = {"references": ["Paris", "City of Light"], "group": "1-2"}
    other = {"references": ["Rome"], "group": "1-3"}
    found = tm.record([row, row, other], ["city of light", "Berlin", "Berlin"])
    assert found == {"em": 50.0, "f1": 50.0}


def test_multirc_by_answers_and_by_questions():
    def target(label, group):
        return {"references": [label], "group": group}

    targets = [target("True", "q1"), target("False", "q1"), target("True", "q2")]
    # Answers: 1 true positive, 1 wrong "True" for the invalid answer: 2 / (2 + 1 + 1).
    found = tm.multirc(targets, ["True", "perhaps", "True"])
    assert found == {"f1": pytest.approx(100 * 2 * 2 / (3 + 2)), "exact_match": 50.0}


def test_wsc():
    def target(referent, label):
        return {"references": [referent], "label": label}

    for referent, prediction, label, right in (
        ("the fuzzy bunny", "Bunny", "True", True),
        ("bunny", "a fuzzy bunny", "True", True),
        ("Bob's hat", "Bob", "True", False),
        ("Bob", "Tom", "False", True),
        ("Bob", "Bob", "False", False),
        ("Bob", "", "False", False),
    ):
        assert tm.wsc([target(referent, label)], [prediction]) == {"accuracy": 100.0 * right}


def test_rouge():
    # Lin 2004, section 3.1: "police killed the gunman" against two guesses: 3 of 4, 2 of 4 words.
    reference = "Police killed the gunman."
    guesses = ["police kill the gunman", "the gunman kill police"]
    assert tm.rouge_l([reference] * 2, guesses)["rouge_l"] == pytest.approx(100 * (0.75 + 0.5) / 2)
    assert tm.rouge_1([reference] * 2, guesses)["rouge_1"] == pytest.approx(75.0)
    # "the gunman" is the one pair of words of three that both guesses share.
    assert tm.rouge_2([reference] * 2, guesses)["rouge_2"] == pytest.approx(100 / 3)
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
    # The better reference of each, however many each has.
    assert tm.chrf([["q", "abc"], "xyz"], ["abc", "xyz"])["chrf"] == pytest.approx(100.0)


def test_bleu():
    # 4 of 5 words, 3 of 4 pairs, 2 of 3 triples, 1 of 2 fours: (.8 .75 .667 .5) ** (1 / 4).
    found = tm.bleu([["a b c d e", "q"]], ["a b c d f"])["bleu"]
    assert found == pytest.approx(100 * 0.2**0.25)


def test_phoneme_error_rate():
    # One phoneme replaced, one inserted; then one left out: 3 edits of 5 phonemes.
    targets, predictions = ["M AE1 D", "AH0 K"], ["M EH1 D Z", "K"]
    assert tm.phoneme_error_rate(targets, predictions) == {"phoneme_error_rate": 60.0}


def test_every_metric_is_zero_of_nothing_and_refuses_unequal_lengths():
    for metric in tm.METRICS.values():
        scores = metric([], [])
        assert scores and set(scores.values()) == {0.0}
        assert all(type(value) is float for value in metric(["a", "b"], ["a", "c"]).values())
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        tm.exact_match(["a", "b"], ["a"])


def test_bound_metrics_are_what_seqio_takes_for_one_of_predictions():
    exact, bound = tm.metric_functions(["exact_match", "f1"], ("no", "yes"))
    assert exact is tm.exact_match
    assert bound(["no"], ["yes"]) == tm.f1(["no"], ["yes"], ("no", "yes"))
    required = [
        name
        for name, parameter in inspect.signature(bound).parameters.items()
        if parameter.default is inspect.Parameter.empty
    ]
    assert required == ["targets", "predictions"]


def test_targets_of_examples():
    assert tm.target_of({"inputs": "i", "targets": "a"}) == ["a"]
    assert tm.target_of({"targets": "two\nlines"}) == ["two\nlines"]
    assert tm.target_of({"targets": "a", "references": "a\nb"}) == ["a", "b"]
    row = {"targets": "a", "group": "7", "label": "True"}
    assert tm.target_of(row) == {"references": ["a"], "group": "7", "label": "True"}


def test_scores_are_those_of_t5():
    t5 = pytest.importorskip("t5.evaluation.metrics")
    rng = np.random.default_rng(0)
    labels, answers = (rng.choice(names, 60).tolist() for names in (["n", "y"], ["n", "y", "z"]))
    gold, guesses = ([{"n": 0, "y": 1}.get(x, -1) for x in side] for side in (labels, answers))
    assert tm.f1(labels, answers, "ny")["f1"] == pytest.approx(
        t5.f1_score_with_invalid(gold, guesses)["f1"]
    )
    words = "the a cat dog sat, on mat. Ran".split()

    def text():
        return " ".join(rng.choice(words, rng.integers(0, 6)))

    references = [[text() for _ in range(rng.integers(1, 4))] for _ in range(50)]
    predictions = [text() for _ in range(50)]
    ours, theirs = tm.squad(references, predictions), t5.squad(references, predictions)
    assert ours == pytest.approx(theirs)
    first = [each[0] for each in references]
    assert tm.bleu(first, predictions) == pytest.approx(t5.bleu(first, predictions))
