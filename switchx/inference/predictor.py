"""`Predictor`: a model applied to lists of examples, a batch at a time, on a mesh."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from switchx import distributed, sharding
from switchx.inference.config import DecodingConfig
from switchx.inference.decoding import generate
from switchx.inference.scoring import score
from switchx.models.config import ModelConfig
from switchx.moe.routing import ROUTERS

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
        """The most probable target tokens, one after the other, for each of the inputs, in order.

        Padded with 0 to the decoder's length.
        """
        decoding = DecodingConfig(max_new_tokens=self.lengths[1])
        for batch in _batches(inputs, self.num_rows):
            found = self._search(batch, decoding, self.lengths[0], task_id)
            for tokens, _ in found:
                yield tokens[0]

    def search(
        self,
        inputs: Sequence[Tokens],
        decoding: DecodingConfig,
        *,
        task_id: int = 0,
        rng: jax.Array | None = None,
        row_ids: Sequence[int] | None = None,
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Tokens [R, T] and scores [R] of each of the inputs, in order, as `decoding` says.

        Rows are no longer than a batch needs, to a few steps (whole where padding would change
        what experts choose): give the inputs in order of length.

        Args:
          inputs: token ids.
          decoding: how tokens are chosen.
          task_id: for routing by task.
          rng, row_ids: of `decoding.generate`, for sampling.
        """
        numbered = zip(inputs, range(len(inputs)) if row_ids is None else row_ids, strict=True)
        for batch in _batches(numbered, self.num_rows):
            rows, ids = zip(*batch, strict=True)
            length = self.lengths[0]
            if not self._lengths_matter:
                length = _step_above(max(map(len, rows)), length)
            yield from self._search(rows, decoding, length, task_id, rng, ids)

    @property
    def _lengths_matter(self) -> bool:
        """Whether padding changes results: experts that choose take a share of a row's places."""
        moe = self.config.stack_moe.get("encoder")
        return moe is not None and ROUTERS[moe.router].capacity != "any"

    def _search(
        self,
        inputs: Sequence[Tokens],
        decoding: DecodingConfig,
        length: int,
        task_id: int,
        rng: jax.Array | None = None,
        row_ids: Sequence[int] = (),
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        (tokens,) = self._place([inputs], [length])
        numbers = np.zeros(self.num_rows, np.int32)
        numbers[: len(row_ids)] = row_ids
        found = generate(
            self.config,
            self.params,
            tokens,
            decoding,
            encoder_task_ids=self._tasks(task_id, length),
            rng=rng,
            row_ids=jax.numpy.asarray(numbers) if rng is not None else None,
        )
        return list(zip(*jax.device_get(found), strict=True))[: len(inputs)]

    def score(self, pairs: Iterable[tuple[Tokens, Tokens]], *, task_id: int = 0) -> Iterator[Score]:
        """The log-likelihood of each pair's targets given its inputs, in order."""
        for batch in _batches(pairs, self.num_rows):
            scores = score(
                self.config,
                self.params,
                *self._place(list(zip(*batch, strict=True)), self.lengths),
                encoder_task_ids=self._tasks(task_id, self.lengths[0]),
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

    def _tasks(self, task_id: int, length: int) -> Any:
        return self._place_rows(np.full((self.num_rows, length), task_id, np.int32))

    def _place_rows(self, rows: np.ndarray) -> Any:
        where = sharding.batch_sharding(self.mesh)
        block, blocks = distributed.row_block(where, self.num_rows)
        size = self.num_rows // blocks
        return distributed.place_rows(rows[block * size : (block + 1) * size], where, self.num_rows)


def _step_above(length: int, most: int) -> int:
    """The least of an eighth, a quarter, half and all of `most` that is enough."""
    return next(
        step for step in (-(-most // 8), -(-most // 4), -(-most // 2), most) if step >= length
    )


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch
