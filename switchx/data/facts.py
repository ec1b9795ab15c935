"""Capacity-bound recall: facts drawn at random, to be known by heart.

Nothing in a fact follows from another, so how many of them a model answers measures what its
parameters hold. Closed-book question answering in miniature, where Switch Transformers gain most
(arXiv:2101.03961, §2.3).
"""

import dataclasses
import functools
import string
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from switchx.data.corpus import Example
from switchx.data.tasks import check_name
from switchx.errors import check_range, check_types

DIGITS = string.digits + string.ascii_lowercase[:22]
SYMBOLS = string.ascii_letters + string.digits + "+/"
MAX_FACTS = len(DIGITS) ** 4
NUM_VALUE_SYMBOLS = 2


@dataclasses.dataclass(frozen=True)
class FactsTask:
    """A task of random facts: a key as `inputs`, the two symbols it stands for as `targets`.

    Keys are the numbers below `num_facts` in base 32 (0-9, a-v), all of one length, each once and
    in a random order; the two symbols of each are drawn from `num_symbols` with `seed`, which has
    nothing to do with a run's. With the vocabulary 'bytes' a character is a token, and EOS ends
    both sides; knowing nothing but the format costs `chance` nats a target token.

    The validation split is the training facts themselves: it asks for what was seen. There is
    nothing to generalise to.

    Raises:
      UserError: a value of the wrong type or out of range.
    """

    name: str
    num_facts: int = 32768
    num_symbols: int = 64
    seed: int = 0

    objective = "supervised"
    metrics = ("exact_match",)
    options = None
    splits = ("train", "validation")

    def __post_init__(self) -> None:
        """Check types and values."""
        check_types(self)
        check_name(self)
        valid = 1 <= self.num_facts <= MAX_FACTS
        check_range(self, "num_facts", valid, f"from 1 to {MAX_FACTS:,}")
        valid = 2 <= self.num_symbols <= len(SYMBOLS)
        check_range(self, "num_symbols", valid, f"from 2 to {len(SYMBOLS)}")
        check_range(self, "seed", 0 <= self.seed < 2**31, "at least 0 and below 2**31")

    def examples(self, split: str) -> Sequence[Example]:
        """Every fact, whatever the split: 'inputs' and 'targets'."""
        del split
        return _facts(self.num_facts, self.num_symbols, self.seed)

    def content(self) -> dict[str, Any]:
        """What `examples` depends on, as JSON."""
        fields = ("num_facts", "num_symbols", "seed")
        return {"facts": {field: getattr(self, field) for field in fields}}

    @property
    def chance(self) -> float:
        """Cross-entropy in nats per target token of one who knows the format and no fact.

        Of three targets in the vocabulary 'bytes', two are drawn from `num_symbols` and the third
        is EOS: 2 ln(num_symbols) / 3.
        """
        return NUM_VALUE_SYMBOLS * float(np.log(self.num_symbols)) / (NUM_VALUE_SYMBOLS + 1)


# 15 bits of key, 12 of value: 49 kB to know, more than the dense twin of a small Switch holds.
TASKS: Mapping[str, FactsTask] = {"recall": FactsTask("recall")}


@functools.lru_cache(maxsize=4)
def _facts(num_facts: int, num_symbols: int, seed: int) -> tuple[Example, ...]:
    # Raw bits: NumPy promises them for ever, and not what its distributions make of them.
    bits = np.random.PCG64(seed).random_raw((NUM_VALUE_SYMBOLS + 1) * num_facts)
    order, *values = bits.reshape(NUM_VALUE_SYMBOLS + 1, num_facts)
    # Neighbouring keys would be routed alike, and evaluation batches keep the order.
    keys = np.argsort(order, kind="stable").tolist()
    width = next(n for n in range(1, 5) if len(DIGITS) ** n >= num_facts)
    pairs = zip(*((value % num_symbols).tolist() for value in values), strict=True)
    return tuple(
        {"inputs": _written(key, width), "targets": "".join(SYMBOLS[i] for i in pair)}
        for key, pair in zip(keys, pairs, strict=True)
    )


def _written(key: int, width: int) -> str:
    digits = (key // len(DIGITS) ** place % len(DIGITS) for place in reversed(range(width)))
    return "".join(DIGITS[digit] for digit in digits)
