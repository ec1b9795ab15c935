"""`Predictor`: a model applied to lists of examples, a batch at a time, on a mesh."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from switchx import distributed, sharding
from switchx.inference.decoding import greedy
from switchx.inference.scoring import score
from switchx.models.config import ModelConfig

T = TypeVar("T")
Tokens = Sequence[int] | np.ndarray


class Score(NamedTuple):
    """Of one example: log p(targets | inputs), target tokens, whether greedy decoding says them."""

    log_likelihood: float
    num_tokens: int
    is_greedy: bool


@dataclasses.dataclass(frozen=True)
class Predictor:
    """A model with parameters on their devices. Used under `sharding.use(mesh)`.

    Every process gives the same examples and gets all results; each computes its own rows. The
    last batch is filled up with rows of padding, which change nothing and are left out.

    Attributes:
      config, params: the model.
      mesh: its devices.
      num_rows: examples of a batch; what the mesh divides.
      lengths: tokens of an encoder row and of a decoder row, EOS included.
    """

    config: ModelConfig
    params: Any
    mesh: Mesh
    num_rows: int
    lengths: tuple[int, int]

    def generate(self, inputs: Iterable[Tokens], *, task_id: int = 0) -> Iterator[np.ndarray]:
        """Target tokens for each of the inputs, in order: padded with 0 to the decoder's length."""
        for batch in _batches(inputs, self.num_rows):
            (tokens,) = self._place([batch], self.lengths[:1])
            predictions = greedy(
                self.config,
                self.params,
                tokens,
                encoder_task_ids=self._tasks(task_id),
                max_length=self.lengths[1],
            )
            yield from jax.device_get(predictions)[: len(batch)]

    def score(self, pairs: Iterable[tuple[Tokens, Tokens]], *, task_id: int = 0) -> Iterator[Score]:
        """The log-likelihood of each pair's targets given its inputs, in order."""
        for batch in _batches(pairs, self.num_rows):
            scores = score(
                self.config,
                self.params,
                *self._place(list(zip(*batch, strict=True)), self.lengths),
                encoder_task_ids=self._tasks(task_id),
            )
            for each in list(zip(*jax.device_get(scores), strict=True))[: len(batch)]:
                yield Score(float(each[0]), int(each[1]), bool(each[2]))

    def _place(self, sides: Sequence[Sequence[Tokens]], lengths: Sequence[int]) -> list[Any]:
        placed = []
        for side, length in zip(sides, lengths, strict=True):
            rows = np.zeros((self.num_rows, length), np.int32)
            for row, tokens in zip(rows, side, strict=False):
                row[: len(tokens)] = tokens
            placed.append(self._place_rows(rows))
        return placed

    def _tasks(self, task_id: int) -> Any:
        return self._place_rows(np.full((self.num_rows, self.lengths[0]), task_id, np.int32))

    def _place_rows(self, rows: np.ndarray) -> Any:
        where = sharding.batch_sharding(self.mesh)
        block, blocks = distributed.row_block(where, self.num_rows)
        size = self.num_rows // blocks
        return distributed.place_rows(rows[block * size : (block + 1) * size], where, self.num_rows)


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch
