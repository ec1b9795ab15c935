"""Examples longer than a row: counted and said, or an error where nothing sensible is left."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from switchx.data import vocabulary
from switchx.errors import UserError

if TYPE_CHECKING:
    from switchx.data.pipeline import DataConfig

# What this process has said already: a run builds its batches once, an evaluation often.
_said: set[str] = set()


def check_labels(config: "DataConfig", name: str, options: tuple[str, ...]) -> None:
    """See that every label of a classification task fits into the targets.

    A label that is cut is no answer any more, and may be another's beginning: no score would mean
    anything.

    Raises:
      UserError: naming the longest label that does not fit, and its length.
    """
    limit = config.task_feature_lengths["targets"]
    lengths = vocabulary.encode(config.vocabulary, options)[1] + 1
    longest = int(np.argmax(lengths))
    if lengths[longest] > limit:
        raise UserError(
            f"task {name!r}: its label {options[longest]!r} has {lengths[longest]} tokens, more "
            f"than TASK_FEATURE_LENGTHS['targets'] = {limit}, and a cut label is no answer; set "
            f"'targets': {lengths[longest]} or more"
        )


def report(
    config: "DataConfig",
    name: str,
    split: str,
    lengths: Mapping[str, np.ndarray],
    *,
    sampled: bool = False,
) -> None:
    """Say how many inputs and targets of a split are cut, once in a process for each task.

    Args:
      lengths: tokens of every example by feature, EOS included.
      sampled: the lengths are those of the first examples only.

    Raises:
      UserError: more than half of the targets do not fit. A few long ones are a data set's tail,
        which T5 cuts too; with most of them cut, what is learnt is not the task.
    """
    for feature, each in lengths.items():
        limit = config.task_feature_lengths[feature]
        cut = int((each > limit).sum())
        if not cut:
            continue
        count = f"{cut:,} of {'the first ' if sampled else ''}{len(each):,} {feature} ({split})"
        key = f"TASK_FEATURE_LENGTHS[{feature!r}] = {limit}"
        if feature == "targets" and 2 * cut > len(each):
            raise UserError(
                f"task {name!r}: {count} are longer than {key} tokens, most of them; the longest "
                f"has {each.max()}: set {feature!r}: {each.max()}, or shorten them"
            )
        say(
            f"{name}: {count} are longer than {limit} tokens and are cut; the longest has "
            f"{each.max():,}"
        )


def say(line: str) -> None:
    """Print a line unless this process has printed it before."""
    if line not in _said:
        _said.add(line)
        print(line, flush=True)
