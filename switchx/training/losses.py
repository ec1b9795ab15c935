"""Cross-entropy over a large vocabulary without ever holding the logits of the whole batch."""

import dataclasses
import functools
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from switchx.errors import UserError, check_range, check_types

# A device's share of a chunk of logits stays below this many elements (64 MiB of float32, about
# 520 tokens of a 32k vocabulary): large enough for full-speed matmuls, small beside the rest of a
# training step.
AUTOMATIC_CHUNK_ELEMENTS = 2**24


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """What is added to the cross-entropy of the target tokens.

    Attributes:
      label_smoothing: probability taken from the target and spread evenly over the other V - 1
        tokens, in [0, 1). T5 and Switch Transformers use none.
      z_loss: coefficient of logsumexp(logits)², which keeps the softmax normaliser near 1. T5's
        is 1e-4.

    Raises:
      UserError: a field has the wrong type or is out of range.
    """

    label_smoothing: float = 0.0
    z_loss: float = 1e-4

    def __post_init__(self):
        """Check types and ranges."""
        check_types(self)
        check_range(self, "label_smoothing", 0 <= self.label_smoothing < 1, "in [0, 1)")
        check_range(self, "z_loss", 0 <= self.z_loss < math.inf, "0 or more")


@flax.struct.dataclass
class CrossEntropySums:
    """Weighted sums over tokens, scalars of at least float32. They carry no gradient.

    Being sums, they add up over microbatches, hosts and evaluation batches; divide by `weight`
    once, at the end, for means per token.

    Attributes:
      cross_entropy: Σ weight · cross-entropy, label smoothing included, z-loss not.
      z_loss: Σ weight · z_loss · logsumexp².
      correct: Σ weight · [no logit is larger than the target's, and not all are equal]. Ties count:
        distinct tokens hardly ever tie, and finding the first of them by argmax, which XLA does
        not vectorise on CPU, costs more than the rest of the softmax.
      weight: Σ weight.
    """

    # Not annotated as arrays: trees of this struct also hold shapes, shardings and Python floats.
    cross_entropy: Any
    z_loss: Any
    correct: Any
    weight: Any


def cross_entropy(
    hidden_BTD: Float[Array, "B T D"],
    head_VD: Float[Array, "V D"],
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
    *,
    z_loss: float,
    label_smoothing: float,
    chunk_length: int | None = None,
) -> tuple[Float[Array, ""], CrossEntropySums]:
    """Sum over tokens of weight · (cross-entropy + z_loss · logsumexp²), and its parts.

    With logits = hidden · headᵀ, Z = Σ_v exp(logit_v) and smoothing s, the target distribution q
    is 1 - s on the target and s / (V - 1) elsewhere, and the token's cross-entropy is
    log Z - Σ_v q_v logit_v - H(q). Subtracting the entropy H(q), as T5X does, makes a perfect
    prediction cost 0 whatever s; it does not change gradients. The z-loss is that of PaLM
    (arXiv:2204.02311) §5 and Mesh TensorFlow, on the vocabulary's logits.

    Only the loss carries gradients, and only to `hidden_BTD` and `head_VD`. They are computed in
    the forward pass, chunk by chunk along T (which leaves a sharding of B alone), so that forward
    and backward together hold the logits of one chunk and multiply by the head three times, with
    no recomputation. Undifferentiated calls compute no gradients. Because the backward is hand
    written, forward-mode and second derivatives are not available.

    Logits, sums and the head's gradient are accumulated in float32 (float64 for float64 inputs).
    For bfloat16 inputs the logits' gradient is rounded to bfloat16 before it is multiplied, as a
    mixed-precision matmul needs it. Gradients have the dtypes of their inputs.

    An untied head with kernel [D, V] is passed as `kernel.T`: the transpose becomes the operand
    order of the matmuls in the compiled program, not a copy. Rows of padding vocabulary take part
    in Z like any other. A token of weight 0 may have any target, even one outside [0, V).

    Args:
      hidden_BTD: final decoder states, scaled as the model scales them before its output head.
      head_VD: output embedding, tied or not.
      targets_BT: target token ids.
      weights_BT: loss weights, 0 where nothing is predicted.
      z_loss: coefficient of the z-loss, see `LossConfig`.
      label_smoothing: see `LossConfig`.
      chunk_length: positions of T in a chunk; the chunks are made equal, so this is an upper
        bound. None chooses the largest for which B · chunk · V is at most 2**24 elements for
        each device of the mesh in scope (`jax.set_mesh`; one device without), over all of which
        B and V are taken to be sharded.

    Raises:
      UserError: `chunk_length` is less than 1.
    """
    batch, length = targets_BT.shape
    if chunk_length is None:
        mesh = jax.sharding.get_abstract_mesh()
        elements = AUTOMATIC_CHUNK_ELEMENTS * (1 if mesh.empty else mesh.size)
        longest = max(1, elements // max(1, batch * head_VD.shape[0]))
    elif chunk_length >= 1:
        longest = chunk_length
    else:
        raise UserError(f"chunk_length = {chunk_length!r}: should be 1 or more, or None")
    num_chunks = max(1, math.ceil(length / longest))
    return _cross_entropy(
        hidden_BTD, head_VD, targets_BT, weights_BT, z_loss, label_smoothing, num_chunks
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _cross_entropy(
    hidden_BTD: Array,
    head_VD: Array,
    targets_BT: Array,
    weights_BT: Array,
    z_loss: float,
    label_smoothing: float,
    num_chunks: int,
) -> tuple[Array, CrossEntropySums]:
    """Loss and sums without gradients: what runs when nothing is differentiated."""
    chunked = _Chunks(hidden_BTD, targets_BT, weights_BT, num_chunks)

    def add_chunk(sums: CrossEntropySums, index: int | Array) -> tuple[CrossEntropySums, None]:
        hidden_BcD, targets_Bc, weights_Bc = chunked.at(index)
        logits_BcV = _logits(hidden_BcD, head_VD)
        chunk_sums, _ = _sums(logits_BcV, targets_Bc, weights_Bc, z_loss, label_smoothing)
        return jax.tree.map(jnp.add, sums, chunk_sums), None

    sums, _ = _scan(add_chunk, _zero_sums(hidden_BTD, head_VD), num_chunks)
    return sums.cross_entropy + sums.z_loss, sums


def _forward(
    hidden_BTD: Array,
    head_VD: Array,
    targets_BT: Array,
    weights_BT: Array,
    z_loss: float,
    label_smoothing: float,
    num_chunks: int,
) -> tuple[tuple[Array, CrossEntropySums], tuple[Array, Array, Any]]:
    """Loss and sums, and as residuals their gradients (the head's still in the accumulator)."""
    chunked = _Chunks(hidden_BTD, targets_BT, weights_BT, num_chunks)
    zeros = _zero_sums(hidden_BTD, head_VD)
    operand_dtype = jnp.result_type(hidden_BTD, head_VD)

    def add_chunk(carry: tuple, index: int | Array) -> tuple[tuple, None]:
        sums, d_hidden_BTD, d_head_DV = carry
        hidden_BcD, targets_Bc, weights_Bc = chunked.at(index)
        logits_BcV = _logits(hidden_BcD, head_VD)
        chunk_sums, log_z_Bc = _sums(logits_BcV, targets_Bc, weights_Bc, z_loss, label_smoothing)
        d_logits_BcV = _logits_gradient(
            logits_BcV, log_z_Bc, targets_Bc, weights_Bc, z_loss, label_smoothing
        ).astype(operand_dtype)
        # The states' gradient is written into its place in the carry, which XLA does without
        # copying; as a scan output it would need a transpose of [chunks, B, chunk, D] at the end.
        d_hidden_BTD = chunked.put(d_hidden_BTD, index, d_logits_BcV, head_VD)
        d_head_DV += jnp.einsum(
            "btd,btv->dv", hidden_BcD, d_logits_BcV, preferred_element_type=d_head_DV.dtype
        )
        return (jax.tree.map(jnp.add, sums, chunk_sums), d_hidden_BTD, d_head_DV), None

    start = (
        zeros,
        jnp.zeros_like(chunked.hidden_BTD),
        # Summed as [D, V], or the matmul would need the logits transposed (on CPU, a copy).
        jnp.zeros(head_VD.shape[::-1], zeros.weight.dtype),
    )
    (sums, d_hidden_BTD, d_head_DV), _ = _scan(add_chunk, start, num_chunks)
    d_hidden_BTD = d_hidden_BTD[:, : hidden_BTD.shape[1]]
    # Without a barrier XLA replaces the transpose of a single chunk's matmul by the swapped matmul,
    # which the CPU cannot run in bfloat16 ("DotThunk: BF16 x BF16 = F32", jaxlib 0.10.2).
    d_head_VD = jax.lax.optimization_barrier(d_head_DV).T
    # An empty array carries the head's dtype to the backward pass.
    residuals = (d_hidden_BTD, d_head_VD, jnp.zeros((0,), head_VD.dtype))
    return (sums.cross_entropy + sums.z_loss, sums), residuals


def _backward(
    z_loss: float,
    label_smoothing: float,
    num_chunks: int,
    residuals: tuple[Array, Array, Array],
    cotangents: tuple[Array, CrossEntropySums],
) -> tuple[Array, Array, None, None]:
    """Scale the stored gradients by the loss's cotangent; that of the sums is dropped."""
    del z_loss, label_smoothing, num_chunks
    d_hidden_BTD, d_head_VD, like_head = residuals
    scale = cotangents[0]
    d_hidden_BTD = (d_hidden_BTD.astype(scale.dtype) * scale).astype(d_hidden_BTD.dtype)
    return d_hidden_BTD, (d_head_VD * scale).astype(like_head.dtype), None, None


_cross_entropy.defvjp(_forward, _backward)


class _Chunks:
    """Tokens padded to equal chunks of T (padding has weight 0), read and written in place."""

    def __init__(self, hidden_BTD: Array, targets_BT: Array, weights_BT: Array, num_chunks: int):
        length = targets_BT.shape[1]
        self.length = math.ceil(length / num_chunks)
        pad = ((0, 0), (0, self.length * num_chunks - length))
        self.hidden_BTD = jnp.pad(hidden_BTD, (*pad, (0, 0))) if pad[1][1] else hidden_BTD
        self.targets_BT = jnp.pad(targets_BT, pad)
        self.weights_BT = jnp.pad(weights_BT, pad)

    def at(self, index: int | Array) -> tuple[Array, Array, Array]:
        """States, targets and weights of chunk `index`."""
        start = index * self.length
        return (
            jax.lax.dynamic_slice_in_dim(self.hidden_BTD, start, self.length, axis=1),
            jax.lax.dynamic_slice_in_dim(self.targets_BT, start, self.length, axis=1),
            jax.lax.dynamic_slice_in_dim(self.weights_BT, start, self.length, axis=1),
        )

    def put(
        self, d_hidden_BTD: Array, index: int | Array, d_logits_BcV: Array, head_VD: Array
    ) -> Array:
        """`d_hidden_BTD` with the gradient of chunk `index` written into it."""
        accumulator = jnp.promote_types(d_logits_BcV.dtype, jnp.float32)
        d_hidden_BcD = jnp.einsum(
            "btv,vd->btd", d_logits_BcV, head_VD, preferred_element_type=accumulator
        )
        return jax.lax.dynamic_update_slice_in_dim(
            d_hidden_BTD, d_hidden_BcD.astype(d_hidden_BTD.dtype), index * self.length, axis=1
        )


def _scan(body: Any, carry: Any, num_chunks: int) -> tuple[Any, None]:
    """`lax.scan` over chunk numbers; a single chunk is inlined, so that XLA sees no loop."""
    return body(carry, 0) if num_chunks == 1 else jax.lax.scan(body, carry, jnp.arange(num_chunks))


def _zero_sums(hidden_BTD: Array, head_VD: Array) -> CrossEntropySums:
    """Zero sums in the dtype of the accumulators."""
    dtype = jnp.promote_types(jnp.result_type(hidden_BTD, head_VD), jnp.float32)
    zero = jnp.zeros((), dtype)
    return CrossEntropySums(cross_entropy=zero, z_loss=zero, correct=zero, weight=zero)


def _logits(hidden_BTD: Array, head_VD: Array) -> Array:
    """Logits in the dtype of the accumulators."""
    dtype = jnp.promote_types(jnp.result_type(hidden_BTD, head_VD), jnp.float32)
    return jnp.einsum("btd,vd->btv", hidden_BTD, head_VD, preferred_element_type=dtype)


def _smoothed(label_smoothing: float, vocabulary_size: int) -> tuple[float, float, float]:
    """Target probability of the target and of any other token, and the entropy of the whole."""
    if not label_smoothing:
        return 1.0, 0.0, 0.0
    on, off = 1.0 - label_smoothing, label_smoothing / max(1, vocabulary_size - 1)
    return on, off, -on * math.log(on) - label_smoothing * math.log(off)


def _sums(
    logits_BTV: Array,
    targets_BT: Array,
    weights_BT: Array,
    z_loss: float,
    label_smoothing: float,
) -> tuple[CrossEntropySums, Array]:
    """Sums over the tokens of one chunk, and the log Z of each."""
    weights_BT = weights_BT.astype(logits_BTV.dtype)
    # No one-hot matrices: on CPU each would be written out at the size of the logits. Where V is
    # sharded, the gather and the argmax cost a few scalars per token.
    max_BT = jnp.max(logits_BTV, axis=-1)
    log_z_BT = jnp.log(jnp.sum(jnp.exp(logits_BTV - max_BT[..., None]), axis=-1)) + max_BT
    target_logit_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1, mode="clip")[
        ..., 0
    ]

    on, off, entropy = _smoothed(label_smoothing, logits_BTV.shape[-1])
    cross_entropy_BT = log_z_BT - on * target_logit_BT - entropy
    if off:
        others_BT = jnp.sum(logits_BTV, axis=-1) - target_logit_BT
        cross_entropy_BT -= off * others_BT
    uniform_BT = log_z_BT - max_BT > math.log(logits_BTV.shape[-1]) - 1e-4
    correct_BT = (target_logit_BT >= max_BT) & ~uniform_BT
    sums = CrossEntropySums(
        cross_entropy=jnp.sum(weights_BT * cross_entropy_BT),
        z_loss=jnp.sum(weights_BT * (z_loss * jnp.square(log_z_BT))),
        correct=jnp.sum(weights_BT * correct_BT),
        weight=jnp.sum(weights_BT),
    )
    return sums, log_z_BT


def _logits_gradient(
    logits_BTV: Array,
    log_z_BT: Array,
    targets_BT: Array,
    weights_BT: Array,
    z_loss: float,
    label_smoothing: float,
) -> Array:
    """d loss / d logit_v = weight · ((1 + 2 · z_loss · log Z) · softmax_v - q_v)."""
    on, off, _ = _smoothed(label_smoothing, logits_BTV.shape[-1])
    weights_BT = weights_BT.astype(logits_BTV.dtype)
    tokens_BTV = jax.lax.broadcasted_iota(targets_BT.dtype, logits_BTV.shape, 2)
    q_BTV = jnp.where(tokens_BTV == targets_BT[..., None], on, off)
    scale_BT = weights_BT * (1 + 2 * z_loss * log_z_BT)
    softmax_BTV = jnp.exp(logits_BTV - log_z_BT[..., None])
    return scale_BT[..., None] * softmax_BTV - weights_BT[..., None] * q_BTV
