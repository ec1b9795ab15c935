"""Scores of decoded text against references, 0 to 100 as T5 reports them, for seqio.Evaluator.

A metric takes (targets, predictions): one string, or a list of accepted strings, per target.
"""

import collections
import re
from collections.abc import Callable, Mapping, Sequence

Target = str | Sequence[str]
Scores = Mapping[str, float]


def exact_match(targets: Sequence[Target], predictions: Sequence[str]) -> Scores:
    """Share of predictions equal to one of their references, white space collapsed."""
    hits = [_clean(p) in _references(t) for t, p in zip(targets, predictions, strict=True)]
    return {"exact_match": _percent(sum(hits), len(hits))}


def accuracy(targets: Sequence[Target], predictions: Sequence[str]) -> Scores:
    """Share of predictions that are the right label; a non-label counts as wrong."""
    return {"accuracy": exact_match(targets, predictions)["exact_match"]}


def macro_f1(targets: Sequence[Target], predictions: Sequence[str]) -> Scores:
    """Mean over the labels seen in the targets of each label's F1."""
    gold = [_references(t)[0] for t in targets]
    guesses = [_clean(p) for p in predictions]
    scores = []
    for label in sorted(set(gold)):
        hits = sum(g == label == p for g, p in zip(gold, guesses, strict=True))
        scores.append(_f_measure(hits, guesses.count(label), gold.count(label)))
    return {"macro_f1": 100.0 * sum(scores) / max(len(scores), 1)}


def rouge_l(targets: Sequence[Target], predictions: Sequence[str]) -> Scores:
    """ROUGE-L: F1 of the longest common word subsequence, best reference, mean over examples.

    Words are lower-cased runs of letters and digits, unstemmed. Source: Lin 2004
    (https://aclanthology.org/W04-1013), section 3, with beta 1.
    """
    total = 0.0
    for target, prediction in zip(targets, predictions, strict=True):
        words = _words(prediction)
        total += max(
            _f_measure(_common_subsequence(ref, words), len(words), len(ref))
            for ref in map(_words, _references(target))
        )
    return {"rouge_l": _percent(total, len(targets))}


def chrf(targets: Sequence[Target], predictions: Sequence[str]) -> Scores:
    """chrF2: F-score with beta 2 of character 1- to 6-grams, spaces left out, over the corpus.

    Precision and recall are averaged over the n-gram orders that occur. First reference only.
    Source: Popovic 2015 (https://aclanthology.org/W15-3049).
    """
    precisions, recalls = [], []
    texts = [
        ("".join(_references(t)[0].split()), "".join(p.split()))
        for t, p in zip(targets, predictions, strict=True)
    ]
    for order in range(1, 7):
        hits = guessed = wanted = 0
        for reference, prediction in texts:
            ref, guess = _ngrams(reference, order), _ngrams(prediction, order)
            hits += (ref & guess).total()
            guessed += guess.total()
            wanted += ref.total()
        if guessed and wanted:
            precisions.append(hits / guessed)
            recalls.append(hits / wanted)
    if not precisions:
        return {"chrf": 0.0}
    precision = sum(precisions) / len(precisions)
    recall = sum(recalls) / len(recalls)
    weighted = 4.0 * precision + recall
    return {"chrf": 100.0 * 5.0 * precision * recall / weighted if weighted else 0.0}


def phoneme_error_rate(targets: Sequence[Target], predictions: Sequence[str]) -> Scores:
    """Edits (insert, delete, replace) between phoneme sequences per reference phoneme, x 100."""
    edits = phonemes = 0
    for target, prediction in zip(targets, predictions, strict=True):
        reference = _references(target)[0].split()
        edits += _edit_distance(reference, prediction.split())
        phonemes += len(reference)
    return {"phoneme_error_rate": _percent(edits, phonemes)}


METRICS: Mapping[str, Callable[[Sequence[Target], Sequence[str]], Scores]] = {
    f.__name__: f for f in (exact_match, accuracy, macro_f1, rouge_l, chrf, phoneme_error_rate)
}


def _percent(part: int | float, whole: int) -> float:
    return 100.0 * part / whole if whole else 0.0


def _clean(text: str) -> str:
    return " ".join(text.split())


def _references(target: Target) -> list[str]:
    return [_clean(t) for t in ([target] if isinstance(target, str) else target)]


def _f_measure(hits: int, guessed: int, wanted: int) -> float:
    return 2.0 * hits / (guessed + wanted) if guessed + wanted else 0.0


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _ngrams(text: str, order: int) -> collections.Counter[str]:
    return collections.Counter(text[i : i + order] for i in range(len(text) - order + 1))


def _common_subsequence(left: Sequence[str], right: Sequence[str]) -> int:
    row = [0] * (len(right) + 1)
    for a in left:
        diagonal = 0
        for j, b in enumerate(right, start=1):
            diagonal, row[j] = row[j], diagonal + 1 if a == b else max(row[j], row[j - 1])
    return row[-1]


def _edit_distance(left: Sequence[str], right: Sequence[str]) -> int:
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, start=1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(right, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]
