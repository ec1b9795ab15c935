"""The experts: feed-forward networks side by side."""

from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from switchx.sharding import axes, gather

# "linear" is the ungated branch of a gated network; "gelu" is the tanh form, as T5 has it.
ACTIVATIONS = {
    "relu": nn.relu,
    "gelu": lambda x: nn.gelu(x, approximate=True),
    "silu": nn.silu,
    "linear": lambda x: x,
}
# Logical axes of a kernel [E, in, out] by the name it begins with; its bias has the last.
_NAMES = {"wi": ("expert_embed", "mlp"), "wo": ("mlp", "expert_embed")}


class Experts(nn.Module):
    """E feed-forward networks, each applied to its own slots.

    Kernels are stacked on a leading expert axis. One activation gives a plain network
    ``f(x wi) wo``; several give a gated one, ``f(x wi_0) * g(x wi_1) * … wo``. With `bias` every
    product has one, as in NLLB-MoE (arXiv:2207.04672).
    """

    num_experts: int
    d_ff: int
    activations: tuple[str, ...]
    dropout_rate: float
    init_scale: float
    bias: bool = False
    train: bool = False

    def __call__(self, x_END: Float[Array, "E N D"]) -> Float[Array, "E N D"]:
        """N slots per expert in, the same slots out."""
        weights = self.weights(x_END.shape[-1], x_END.dtype)
        key = self.dropout_key()

        def dropout(hidden_ENF: jax.Array) -> jax.Array:
            return drop(hidden_ENF, self.dropout_rate, key)

        def product(x_ENI: jax.Array, kernel_EIO: jax.Array) -> jax.Array:
            return jnp.einsum("eni,eio->eno", x_ENI, kernel_EIO)

        def add(y_ENO: jax.Array, bias_EO: jax.Array) -> jax.Array:
            return y_ENO + bias_EO[:, None]

        return feed_forward(weights, self.activations, x_END, product, add, dropout)

    @nn.compact
    def weights(self, width: int, dtype: jnp.dtype) -> dict[str, jax.Array]:
        """Kernels and biases by name, for inputs of this width, in the activations' dtype.

        Whole along the axes that are shared out to save memory.
        """
        found = {}
        for name, names in self.weight_names().items():
            shape = tuple(
                {"expert": self.num_experts, "mlp": self.d_ff, "expert_embed": width}[axis]
                for axis in ("expert", *names)
            )
            init = nn.initializers.zeros
            if len(names) == 2:
                init = nn.initializers.variance_scaling(
                    self.init_scale, "fan_in", "truncated_normal", -2, -1, batch_axis=0
                )
            # A single network, shared or not, is no dimension to split over devices.
            expert = "expert" if self.num_experts > 1 else None
            parameter = self.param(name, axes(init, (expert, *names)), shape, jnp.float32)
            found[name] = gather(parameter.astype(dtype), expert, *names)
        return found

    def weight_names(self) -> dict[str, tuple[str, ...]]:
        """Logical axes of every kernel and bias after that of the experts."""
        branches = len(self.activations)
        names = ["wi"] if branches == 1 else [f"wi_{index}" for index in range(branches)]
        found: dict[str, tuple[str, ...]] = {}
        for name in (*names, "wo"):
            found[name] = _NAMES[name[:2]]
            if self.bias:
                found[f"{name}_bias"] = found[name][1:]
        return found

    def dropout_key(self) -> jax.Array | None:
        """Key of the dropout of hidden units; None where there is none."""
        return self.make_rng("dropout") if self.train and self.dropout_rate else None


def feed_forward(
    weights: Mapping[str, jax.Array],
    activations: tuple[str, ...],
    x_ND: jax.Array,
    product: Callable[[jax.Array, jax.Array], jax.Array],
    add: Callable[[jax.Array, jax.Array], jax.Array],
    dropout: Callable[[jax.Array], jax.Array],
    total: Callable[[jax.Array], jax.Array] = lambda y_ND: y_ND,
) -> jax.Array:
    """The networks on their rows, however these lie.

    Args:
      weights: of `Experts`.
      activations: of `Experts`.
      x_ND: inputs.
      product: of rows with the kernels of their experts.
      add: rows plus the biases of their experts.
      dropout: of hidden units.
      total: adds up what devices with some of the hidden units each have of the outputs.
    """

    def dense(name: str, x: jax.Array, total: Callable[[jax.Array], jax.Array]) -> jax.Array:
        y = total(product(x, weights[name]))
        bias = weights.get(f"{name}_bias")
        return y if bias is None else add(y, bias)

    hidden = None
    for index, activation in enumerate(activations):
        name = "wi" if len(activations) == 1 else f"wi_{index}"
        branch = ACTIVATIONS[activation](dense(name, x_ND, lambda y: y))
        hidden = branch if hidden is None else hidden * branch
    assert hidden is not None
    return dense("wo", dropout(hidden), total)


def drop(hidden: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Dropout; none without a key."""
    if key is None:
        return hidden
    kept = jax.random.bernoulli(key, 1 - rate, hidden.shape)
    return jnp.where(kept, hidden / (1 - rate), 0)
