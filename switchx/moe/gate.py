"""The gates: parameters that turn tokens into router logits.

Weights, inputs and products are float32 (float64 for float64 activations) whatever the activations
are: selective precision, arXiv:2101.03961 §2.4; a narrower `dtype` shows what that is worth. In
training the input may be disturbed, so that other experts are explored (rng stream `jitter`); the
experts never see that.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from switchx.sharding import axes, gather

# Never so small that the softmax is an argmax: arXiv:2204.09179, §3.
MIN_TEMPERATURE = 0.01
_STANDARD_DEVIATION = 0.02


class Gate(nn.Module):
    """Base of the gates.

    Attributes:
      num_experts: E.
      jitter_noise: ε of the input's factor U[1 - ε, 1 + ε].
      input_dropout_rate: of the input's features.
      bias: whether logits have a bias.
      capacity: slots per expert, for mixtures.
      cosine_dim: width of the space in which cosines are taken.
      num_tasks: rows of the task table.
      dtype: of the input, the products and the logits; float32 stands for at least that.
      train: whether to disturb the input.
    """

    num_experts: int
    jitter_noise: float = 0.0
    input_dropout_rate: float = 0.0
    bias: bool = False
    capacity: int = 1
    cosine_dim: int = 1
    num_tasks: int = 1
    dtype: str = "float32"
    train: bool = False

    def disturb(self, x_GMD: jax.Array) -> jax.Array:
        """The router's input with jitter and dropout in training."""
        x_GMD = x_GMD.astype(self.precision(x_GMD))
        if not self.train:
            return x_GMD
        if self.jitter_noise:
            low, high = 1 - self.jitter_noise, 1 + self.jitter_noise
            shape, dtype = x_GMD.shape, x_GMD.dtype
            x_GMD *= jax.random.uniform(self.make_rng("jitter"), shape, dtype, low, high)
        dropout = nn.Dropout(self.input_dropout_rate, deterministic=False, rng_collection="jitter")
        return dropout(x_GMD)

    def precision(self, x_GMD: jax.Array) -> Any:
        """What the logits of an input are computed in."""
        narrow = self.dtype == "bfloat16"
        return jnp.bfloat16 if narrow else jnp.promote_types(x_GMD.dtype, jnp.float32)

    def weights(
        self, name: str, shape: tuple[int, ...], names: tuple[str | None, ...], init: Callable
    ) -> jax.Array:
        """A float32 parameter with its logical axes."""
        return gather(self.param(name, axes(init, names), shape, jnp.float32), *names)

    def add_bias(self, logits_GME: jax.Array) -> jax.Array:
        """Logits with their bias, if the gate has one."""
        if not self.bias:
            return logits_GME
        bias_E = self.weights("bias", (self.num_experts,), ("experts",), nn.initializers.zeros)
        return logits_GME + bias_E.astype(logits_GME.dtype)[None, None]


class LinearGate(Gate):
    """x W_r. Normal initialisation with σ = 0.02, as Flaxformer."""

    @nn.compact
    def __call__(self, x_GMD: Float[Array, "G M D"]) -> Float[Array, "G M E"]:
        """Router logits."""
        x_GMD = self.disturb(x_GMD)
        init = nn.initializers.normal(_STANDARD_DEVIATION)
        shape = (x_GMD.shape[-1], self.num_experts)
        kernel_DE = self.weights("kernel", shape, ("embed", "experts"), init)
        return self.add_bias(jnp.einsum("gmd,de->gme", x_GMD, kernel_DE.astype(x_GMD.dtype)))


class CosineGate(Gate):
    """cos(W x, e_i) / τ: low-dimensional and independent of norms; τ is learned, first 0.07.

    X-MoE: On the Representation Collapse of Sparse Mixture of Experts (arXiv:2204.09179), §3,
    equations 4–6.
    """

    @nn.compact
    def __call__(self, x_GMD: Float[Array, "G M D"]) -> Float[Array, "G M E"]:
        """Router logits."""
        x_GMD = self.disturb(x_GMD)
        dtype = x_GMD.dtype
        shape = (x_GMD.shape[-1], self.cosine_dim)
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
        kernel_DP = self.weights("kernel", shape, ("embed", None), init).astype(dtype)
        shape = (self.num_experts, self.cosine_dim)
        embedding_EP = self.weights("embedding", shape, ("experts", None), init).astype(dtype)
        temperature = self.weights("temperature", (), (), nn.initializers.constant(0.07))
        points_GMP = _unit(jnp.einsum("gmd,dp->gmp", x_GMD, kernel_DP))
        cosine_GME = jnp.einsum("gmp,ep->gme", points_GMP, _unit(embedding_EP))
        return self.add_bias(cosine_GME / jnp.maximum(temperature.astype(dtype), MIN_TEMPERATURE))


class TaskGate(Gate):
    """A row of logits per task: every token of a task goes the same way. arXiv:2110.03742, §3."""

    @nn.compact
    def __call__(
        self, x_GMD: Float[Array, "G M D"], task_ids_GM: Int[Array, "G M"]
    ) -> Float[Array, "G M E"]:
        """Router logits; of `x` only the dtype matters."""
        init = nn.initializers.normal(_STANDARD_DEVIATION)
        table_NE = self.weights(
            "embedding", (self.num_tasks, self.num_experts), (None, "experts"), init
        )
        table_NE = table_NE.astype(self.precision(x_GMD))
        return self.add_bias(jnp.take(table_NE, task_ids_GM, axis=0, mode="clip"))


class SoftGate(Gate):
    """α x̂ · Φ̂ for every slot, x and Φ of unit length, α learned. arXiv:2308.00951, §2.3."""

    @nn.compact
    def __call__(self, x_GMD: Float[Array, "G M D"]) -> Float[Array, "G M S"]:
        """Logits of E · C slots."""
        x_GMD = self.disturb(x_GMD)
        shape = (x_GMD.shape[-1], self.num_experts * self.capacity)
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
        kernel_DS = self.weights("kernel", shape, ("embed", "experts"), init).astype(x_GMD.dtype)
        scale = self.weights("scale", (), (), nn.initializers.ones).astype(x_GMD.dtype)
        logits_GMS = jnp.einsum("gmd,ds->gms", _unit(x_GMD), _unit(kernel_DS, axis=0))
        return scale * logits_GMS


def _unit(x: jax.Array, axis: int = -1) -> jax.Array:
    square = jnp.sum(jnp.square(x), axis=axis, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-12))


GATES: dict[str, type[Gate]] = {
    "linear": LinearGate,
    "cosine": CosineGate,
    "task": TaskGate,
    "soft": SoftGate,
}
