"""Scores of decoded text against targets, 0 to 100 as T5 reports them, for seqio.Evaluator.

A metric takes (targets, predictions) and returns scores by name. A target is a string, a list of
accepted strings, or what `target_of` makes of an example that belongs to a group or has a label.
Of no examples every score is 0. Libraries are imported by the metrics that need them.
"""

import collections
import functools
import math
import re
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Target = str | Sequence[str] | Mapping[str, Any]
Scores = Mapping[str, float]
Metric = Callable[[Sequence[Target], Sequence[str]], Scores]

# Not part of a referent (Winograd schemas).
_DETERMINERS = frozenset(
    "a an few her his each every many much my our some that the their these this those which whose "
    "your".split()
)


def target_of(example: Mapping[str, str]) -> Target:
    """What metrics take as the target of a task's example.

    The references, a list of strings; for examples with a 'group' or a 'label' a mapping with
    these and the 'references'.
    """
    # A target of a user's own may have several lines; references are one a line.
    listed = example.get("references")
    references = [example["targets"]] if listed is None else listed.split("\n")
    more = {key: example[key] for key in ("group", "label") if key in example}
    return {"references": references, **more} if more else references


def exact_match(targets: Sequence[Target], predictions: Sequence[str]) -> Scores:
    """Share of predictions equal to one of their references, white space collapsed."""
    hits = [_clean(p) in _references(t) for t, p in zip(targets, predictions, strict=True)]
    return {"exact_match": _percent(sum(hits), len(hits))}


def accuracy(targets: Sequence[Target], predictions: Sequence[str]) -> Scores:
    """Share of predictions that are the right label; a non-label counts as wrong."""
    return {"accuracy": exact_match(targets, predictions)["exact_match"]}


def macro_f1(targets: Sequence[Target], predictions: Sequence[str]) -> Scores:
    """Mean over the labels seen in the targets of each label's F1."""
    gold, guesses = _labels(targets, predictions)
    return {"macro_f1": _mean_f1(gold, guesses, sorted(set(gold)))}


def mean_multiclass_f1(
    targets: Sequence[Target], predictions: Sequence[str], options: Sequence[str] = ()
) -> Scores:
    """Mean over all `options` of each one's F1, as SuperGLUE's CB is scored.

    An option that neither targets nor predictions have counts as 0. Without options, over the
    labels of the targets.
    """
    gold, guesses = _labels(targets, predictions)
    return {"mean_multiclass_f1": _mean_f1(gold, guesses, options or sorted(set(gold)))}


def f1(
    targets: Sequence[Target], predictions: Sequence[str], options: Sequence[str] = ()
) -> Scores:
    """F1 of the last of two `options`; a prediction that is neither counts as the wrong one.

    0 where neither targets nor predictions have the last option. Source: T5's
    f1_score_with_invalid. Without options, those are the targets' labels in order.
    """
    gold, guesses = _labels(targets, predictions)
    options = options or sorted(set(gold))
    if not options:
        return {"f1": 0.0}
    negative, positive = options[0], options[-1]
    valid = [
        guess if guess in options else negative if wanted == positive else positive
        for wanted, guess in zip(gold, guesses, strict=True)
    ]
    return {"f1": _mean_f1(gold, valid, [positive])}


def matthews_corrcoef(
    targets: Sequence[Target], predictions: Sequence[str], options: Sequence[str] = ()
) -> Scores:
    """Matthews' correlation of labels; what is none of the `options` is one label more.

    0 where the targets or the predictions are all the same.
    """
    from sklearn.metrics import matthews_corrcoef as correlate

    gold, guesses = _labels(targets, predictions)
    if options:
        guesses = [p if p in options else "" for p in guesses]
    if min(len(set(gold)), len(set(guesses))) < 2:
        return {"matthews_corrcoef": 0.0}
    return {"matthews_corrcoef": 100.0 * float(correlate(gold, guesses))}


def pearson_corrcoef(targets: Sequence[Target], predictions: Sequence[str]) -> Scores:
    """Pearson's correlation of numbers; a prediction that is none counts as -1, as in T5.

    0 where it is not defined: fewer than two examples, or all targets or predictions the same.
    """
    from scipy.stats import pearsonr

    return {"pearson_corrcoef": _correlation(pearsonr, targets, predictions)}


def spearman_corrcoef(targets: Sequence[Target], predictions: Sequence[str]) -> Scores:
    """Spearman's rank correlation of numbers, under the rules of `pearson_corrcoef`."""
    from scipy.stats import spearmanr

    return {"spearman_corrcoef": _correlation(spearmanr, targets, predictions)}


def squad(targets: Sequence[Target], predictions: Sequence[str]) -> Scores:
    """SQuAD's exact match and word F1, "em" and "f1": best reference, mean over examples.

    Lower-cased, without punctuation and articles. Source: Rajpurkar et al. 2016
    (https://aclanthology.org/D16-1264), section 6.1. No words on both sides are a match by "em"
    and 0 by "f1", as T5 counts them.
    """
    exact = words = 0.0
    for target, prediction in zip(targets, predictions, strict=True):
        guess = _answer(prediction)
        references = [_answer(reference) for reference in _references(target)]
        exact += guess in references
        words += max(_word_f1(reference, guess) for reference in references)
    return {"em": _percent(exact, len(targets)), "f1": _percent(words, len(targets))}


def record(targets: Sequence[Target], predictions: Sequence[str]) -> Scores:
    """`squad` on the first example of each group: ReCoRD has a row for every answer of a query."""
    seen: dict[Any, tuple[Target, str]] = {}
    for number, (target, prediction) in enumerate(zip(targets, predictions, strict=True)):
        seen.setdefault(_field(target, "group", number), (target, prediction))
    return squad([t for t, _ in seen.values()], [p for _, p in seen.values()])


def multirc(targets: Sequence[Target], predictions: Sequence[str]) -> Scores:
    """MultiRC: "f1" of 'True' over all answers, "exact_match" of whole groups (questions).

    A prediction that is neither 'True' nor 'False' is wrong. Source: Khashabi et al. 2018
    (https://aclanthology.org/N18-1023), section 4, F1_a and EM.
    """
    groups: dict[Any, bool] = collections.defaultdict(lambda: True)
    for number, (target, prediction) in enumerate(zip(targets, predictions, strict=True)):
        group = _field(target, "group", number)
        groups[group] = groups[group] and _clean(prediction) in _references(target)
    return {
        **f1(targets, predictions, ("False", "True")),
        "exact_match": _percent(sum(groups.values()), len(groups)),
    }


def wsc(targets: Sequence[Target], predictions: Sequence[str]) -> Scores:
    """Accuracy on Winograd schemas: whether naming the referent agrees with the label.

    A prediction names the referent if, case and determiners aside, the words of one are among
    those of the other, and both or neither have an apostrophe. An empty one is wrong. Source: T5's
    wsc_simple.
    """
    hits = 0
    for target, prediction in zip(targets, predictions, strict=True):
        guess, referent = _referent(prediction), _referent(_references(target)[0])
        contained = set(guess) <= set(referent) or set(referent) <= set(guess)
        named = contained and ("'" in " ".join(guess)) == ("'" in " ".join(referent))
        hits += bool(guess) and str(named) == _field(target, "label", "True")
    return {"accuracy": _percent(hits, len(targets))}


def rouge_1(targets: Sequence[Target], predictions: Sequence[str]) -> Scores:
    """ROUGE-1, F1 of words: see `rouge_l`."""
    return {"rouge_1": _rouge("rouge1", targets, predictions)}


def rouge_2(targets: Sequence[Target], predictions: Sequence[str]) -> Scores:
    """ROUGE-2, F1 of pairs of words: see `rouge_l`."""
    return {"rouge_2": _rouge("rouge2", targets, predictions)}


def rouge_l(targets: Sequence[Target], predictions: Sequence[str]) -> Scores:
    """ROUGE-L: F1 of the longest common word subsequence, best reference, mean over examples.

    By rouge-score, unstemmed: words are lower-cased runs of a-z and 0-9. The mean is exact, where
    T5 reports the middle of a bootstrap. Source: Lin 2004 (https://aclanthology.org/W04-1013).
    """
    return {"rouge_l": _rouge("rougeL", targets, predictions)}


def bleu(targets: Sequence[Target], predictions: Sequence[str]) -> Scores:
    """BLEU over the corpus by sacrebleu, with T5's settings: 'intl' tokens, 'exp' smoothing."""
    import sacrebleu

    if not targets:
        return {"bleu": 0.0}
    references = _streams(targets)
    score = sacrebleu.corpus_bleu(list(predictions), references, tokenize="intl")
    return {"bleu": float(score.score)}


def chrf(targets: Sequence[Target], predictions: Sequence[str]) -> Scores:
    """chrF2 over the corpus by sacrebleu: character 1- to 6-grams, spaces left out, best reference.

    Source: Popovic 2015 (https://aclanthology.org/W15-3049).
    """
    import sacrebleu

    if not targets:
        return {"chrf": 0.0}
    return {"chrf": float(sacrebleu.corpus_chrf(list(predictions), _streams(targets)).score)}


def phoneme_error_rate(targets: Sequence[Target], predictions: Sequence[str]) -> Scores:
    """Edits (insert, delete, replace) between phoneme sequences per reference phoneme, x 100."""
    import editdistance

    edits = phonemes = 0
    for target, prediction in zip(targets, predictions, strict=True):
        reference = _references(target)[0].split()
        edits += editdistance.distance(reference, prediction.split())
        phonemes += len(reference)
    return {"phoneme_error_rate": _percent(edits, phonemes)}


METRICS: Mapping[str, Callable[..., Scores]] = {
    metric.__name__: metric
    for metric in (
        exact_match,
        accuracy,
        f1,
        macro_f1,
        mean_multiclass_f1,
        matthews_corrcoef,
        pearson_corrcoef,
        spearman_corrcoef,
        squad,
        record,
        multirc,
        wsc,
        rouge_1,
        rouge_2,
        rouge_l,
        bleu,
        chrf,
        phoneme_error_rate,
    )
}
_OF_OPTIONS = (f1, mean_multiclass_f1, matthews_corrcoef)


def metric_functions(names: Iterable[str], options: Sequence[str] | None) -> list[Metric]:
    """The metrics of these names, those that need the label options bound to them."""
    found = []
    for metric in map(METRICS.__getitem__, names):
        bound = functools.partial(metric, options=tuple(options or ()))
        found.append(functools.update_wrapper(bound, metric) if metric in _OF_OPTIONS else metric)
    return found


def _percent(part: int | float, whole: int) -> float:
    return 100.0 * part / whole if whole else 0.0


def _clean(text: str) -> str:
    return " ".join(text.split())


def _references(target: Target) -> list[str]:
    if isinstance(target, Mapping):
        target = target["references"]
    return [_clean(t) for t in ([target] if isinstance(target, str) else target)]


def _field(target: Target, key: str, default: Any) -> Any:
    return target.get(key, default) if isinstance(target, Mapping) else default


def _labels(targets: Sequence[Target], predictions: Sequence[str]) -> tuple[list[str], list[str]]:
    pairs = zip(targets, predictions, strict=True)
    both = [(_references(target)[0], _clean(prediction)) for target, prediction in pairs]
    return [gold for gold, _ in both], [guess for _, guess in both]


def _mean_f1(gold: Sequence[str], guesses: Sequence[str], labels: Sequence[str]) -> float:
    from sklearn.metrics import f1_score

    if not gold:
        return 0.0
    options = {"labels": list(labels), "average": "macro", "zero_division": 0}
    return 100.0 * float(f1_score(gold, guesses, **options))


def _correlation(
    correlate: Callable[..., Any], targets: Sequence[Target], predictions: Sequence[str]
) -> float:
    numbers = [
        tuple(map(_number, pair)) for pair in zip(*_labels(targets, predictions), strict=True)
    ]
    gold, guesses = [pair[0] for pair in numbers], [pair[1] for pair in numbers]
    if min(len(set(gold)), len(set(guesses))) < 2:
        return 0.0
    return 100.0 * float(correlate(gold, guesses)[0])


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        return -1.0
    return number if math.isfinite(number) else -1.0


def _answer(text: str) -> str:
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return _clean(re.sub(r"\b(a|an|the)\b", " ", text))


def _word_f1(reference: str, prediction: str) -> float:
    wanted, guessed = reference.split(), prediction.split()
    hits = (collections.Counter(wanted) & collections.Counter(guessed)).total()
    return 2.0 * hits / (len(wanted) + len(guessed)) if hits else 0.0


def _referent(text: str) -> list[str]:
    return [word for word in text.lower().split() if word not in _DETERMINERS]


def _rouge(kind: str, targets: Sequence[Target], predictions: Sequence[str]) -> float:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer([kind])
    total = sum(
        scorer.score_multi(_references(target), prediction)[kind].fmeasure
        for target, prediction in zip(targets, predictions, strict=True)
    )
    return _percent(total, len(targets))


def _streams(targets: Sequence[Target]) -> list[list[str]]:
    """References as sacrebleu takes them: the first of every example, the second, …

    An example with fewer has its last one again, which changes no score.
    """
    references = [_references(target) for target in targets]
    count = max(map(len, references))
    return [[each[min(i, len(each) - 1)] for each in references] for i in range(count)]
