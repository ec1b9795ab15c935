"""Teacher-forced evaluation: sums over a split."""

from collections.abc import Callable, Iterable
from typing import Any

from switchx.batch import Batch
from switchx.models.t5 import T5
from switchx.training.losses import LossConfig
from switchx.training.metrics import Sums
from switchx.training.step import make_loss, token_counts


def make_eval_step(model: T5, loss_config: LossConfig) -> Callable[[Any, Batch], Sums]:
    """The function from (params, batch) to sums: no dropout, no jitter, eval capacity factor."""
    loss = make_loss(model, loss_config, train=False)

    def eval_step(params: Any, batch: Batch) -> Sums:
        return loss(params, batch, None, token_counts(batch, model.config.stack_moe))[1]

    return eval_step


def evaluate(
    eval_step: Callable[[Any, Batch], Sums], params: Any, batches: Iterable[Batch]
) -> Sums:
    """Add up `eval_step` over all batches, on the device; at least one batch is needed."""
    total: Sums | None = None
    for batch in batches:
        sums = eval_step(params, batch)
        total = sums if total is None else total + sums
    assert total is not None, "no batches to evaluate on"
    return total
