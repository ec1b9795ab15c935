"""The experts: feed-forward networks side by side."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from switchx.moe.grouped import grouped_matmul
from switchx.sharding import axes, gather

# "linear" is the ungated branch of a gated network; "gelu" is the tanh form, as T5 has it.
ACTIVATIONS = {
    "relu": nn.relu,
    "gelu": lambda x: nn.gelu(x, approximate=True),
    "silu": nn.silu,
    "linear": lambda x: x,
}


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

    @nn.compact
    def __call__(
        self, x_END: Float[Array, "*E N D"], sizes_E: Int[Array, " E"] | None = None
    ) -> Float[Array, "*E N D"]:
        """N slots per expert in, the same slots out.

        With `sizes_E` the input is rows [N, D] sorted by expert, of which each has so many.
        """
        width = x_END.shape[-1]
        hidden_ENF = None
        for index, activation in enumerate(self.activations):
            name = "wi" if len(self.activations) == 1 else f"wi_{index}"
            branch_ENF = self._dense(name, x_END, sizes_E, ("expert_embed", "mlp"), self.d_ff)
            branch_ENF = ACTIVATIONS[activation](branch_ENF)
            hidden_ENF = branch_ENF if hidden_ENF is None else hidden_ENF * branch_ENF
        assert hidden_ENF is not None
        hidden_ENF = nn.Dropout(self.dropout_rate, deterministic=not self.train)(hidden_ENF)
        return self._dense("wo", hidden_ENF, sizes_E, ("mlp", "expert_embed"), width)

    def _dense(
        self,
        name: str,
        x_ENI: jax.Array,
        sizes_E: jax.Array | None,
        names: tuple[str, str],
        fan_out: int,
    ) -> jax.Array:
        init = nn.initializers.variance_scaling(
            self.init_scale, "fan_in", "truncated_normal", in_axis=-2, out_axis=-1, batch_axis=0
        )
        shape = (self.num_experts, x_ENI.shape[-1], fan_out)
        # A single network, shared or not, is no dimension to split over devices.
        expert = "expert" if self.num_experts > 1 else None
        kernel_EIO = self.param(name, axes(init, (expert, *names)), shape, jnp.float32)
        kernel_EIO = gather(kernel_EIO.astype(x_ENI.dtype), expert, *names)
        if sizes_E is None:
            y_ENO = jnp.einsum("eni,eio->eno", x_ENI, kernel_EIO)
        else:
            y_ENO = grouped_matmul(x_ENI, kernel_EIO, sizes_E)
        if self.bias:
            init, shape = nn.initializers.zeros, (self.num_experts, fan_out)
            bias_EO = self.param(f"{name}_bias", axes(init, (expert, names[1])), shape, jnp.float32)
            bias_EO = bias_EO.astype(y_ENO.dtype)
            if sizes_E is None:
                y_ENO += bias_EO[:, None]
            else:
                y_ENO += jnp.repeat(bias_EO, sizes_E, axis=0, total_repeat_length=len(y_ENO))
        return y_ENO
