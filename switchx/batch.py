"""`Batch`: the one struct between data and model."""

from typing import Any

import flax.struct
from jaxtyping import Float, Int

# NumPy on the host, jax inside a step, shapes or shardings where a batch is only described.
Array = Any


@flax.struct.dataclass
class Batch:
    """Rows of an encoder-decoder batch, packed or not. Padding is token 0 with segment id 0.

    A row may hold several examples (packing). Segment ids number them from 1, the same number on
    the encoder and the decoder side; positions restart at 0 with each example. An unpacked row is
    one segment. Loss weights are 1 on target tokens that are predicted and 0 elsewhere. Task ids
    number the tasks of a mixture, in its order, from 0; None is a batch of no known task.
    Arrays are host NumPy arrays as the pipeline yields them and device arrays inside a step,
    where a leading axis may hold the microbatches a batch was cut into.
    """

    encoder_tokens: Int[Array, "*pieces B S"]
    encoder_segment_ids: Int[Array, "*pieces B S"]
    encoder_positions: Int[Array, "*pieces B S"]
    decoder_input_tokens: Int[Array, "*pieces B T"]
    decoder_target_tokens: Int[Array, "*pieces B T"]
    decoder_segment_ids: Int[Array, "*pieces B T"]
    decoder_positions: Int[Array, "*pieces B T"]
    decoder_loss_weights: Float[Array, "*pieces B T"]
    encoder_task_ids: Int[Array, "*pieces B S"] | None = None
    decoder_task_ids: Int[Array, "*pieces B T"] | None = None
