"""The mixture-of-experts layer: gate and experts, and the four steps in order."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from switchx.errors import UserError, check_choice, check_range, check_types
from switchx.moe import balance, routing
from switchx.moe.assignment import RouterStats
from switchx.moe.dispatch import DISPATCHERS
from switchx.sharding import axes, constrain

# "linear" is the ungated branch of a gated network; "gelu" is the tanh form, as T5 has it.
ACTIVATIONS = {
    "relu": nn.relu,
    "gelu": lambda x: nn.gelu(x, approximate=True),
    "silu": nn.silu,
    "linear": lambda x: x,
}


@dataclasses.dataclass(frozen=True)
class MoeConfig:
    """What replaces a dense feed-forward layer. Defaults are the Switch Transformer's.

    Attributes:
      num_experts: E. Each is a feed-forward network of the model's own width.
      router: name in `switchx.moe.routing.ROUTERS`.
      capacity_factor: slots per expert in training, relative to a balanced load; tokens over it
        pass through the residual only. None is dropless: room for any routing, at E times the
        memory of a balanced one.
      eval_capacity_factor: the same when not training; 2.0, because raising it costs no quality
        and routing of held-out text is less balanced (arXiv:2202.08906, table 8).
      min_capacity: lower bound on the slots per expert and group.
      expert_capacity: slots per expert and group, in training and evaluation, instead of the
        three above (Hugging Face's absolute capacity).
      group_size: tokens that compete for the same slots, an upper bound: a group is the largest
        number of whole rows of the global batch that divides it and has at most this many
        tokens. "row" makes each row a group (as Hugging Face does). Independent of the mesh.
      jitter_noise: training only, the router's input is multiplied by U[1 - ε, 1 + ε]; the
        experts never see it (arXiv:2101.03961, §2.4 and table 11).
      load_balance_weight: α, for the sum over layers (arXiv:2101.03961, §2.2).
      router_z_weight: c_z (arXiv:2202.08906, §3.3).
      expert_dropout_rate: dropout on the experts' hidden units (arXiv:2101.03961, §2.4).
      router_bias: whether the router has a bias (some Hugging Face checkpoints do).
      route_padding: let padding take slots and count in the statistics, as Hugging Face and
        Flaxformer do. Off: a token's routing must not depend on how much padding surrounds it.
      dispatch: name in `switchx.moe.dispatch.DISPATCHERS`.
    """

    num_experts: int = 8
    router: str = "switch"
    capacity_factor: float | None = 1.25
    eval_capacity_factor: float | None = 2.0
    min_capacity: int = 4
    expert_capacity: int | None = None
    group_size: int | str = 4096
    jitter_noise: float = 1e-2
    load_balance_weight: float = 1e-2
    router_z_weight: float = 1e-3
    expert_dropout_rate: float = 0.0
    router_bias: bool = False
    route_padding: bool = False
    dispatch: str = "gather"

    def __post_init__(self):
        check_types(self)
        valid = 1 <= self.num_experts < 2**31
        check_range(self, "num_experts", valid, "at least 1 and below 2**31")
        check_choice(self, "router", routing.ROUTERS)
        check_choice(self, "dispatch", DISPATCHERS)
        for field in ("capacity_factor", "eval_capacity_factor"):
            factor = getattr(self, field)
            valid = factor is None or 0 < factor < math.inf
            check_range(self, field, valid, "positive, or None for dropless")
        check_range(self, "min_capacity", self.min_capacity >= 0, "0 or more")
        valid = self.expert_capacity is None or self.expert_capacity >= 1
        check_range(self, "expert_capacity", valid, "at least 1, or None")
        if isinstance(self.group_size, str):
            check_range(self, "group_size", self.group_size == "row", "a number of tokens or 'row'")
        else:
            check_range(self, "group_size", self.group_size >= 1, "a positive number of tokens")
        check_range(self, "jitter_noise", 0 <= self.jitter_noise < 1, "in [0, 1)")
        for field in ("load_balance_weight", "router_z_weight"):
            check_range(self, field, 0 <= getattr(self, field) < math.inf, "0 or more")
        check_range(self, "expert_dropout_rate", 0 <= self.expert_dropout_rate < 1, "in [0, 1)")

    @property
    def top_k(self) -> int:
        """K, experts per token."""
        return 1

    def capacity(self, group_tokens: int, *, train: bool) -> int:
        """Slots of each expert in a group of so many tokens."""
        return routing.capacity(
            group_tokens,
            num_experts=self.num_experts,
            top_k=self.top_k,
            capacity_factor=self.capacity_factor if train else self.eval_capacity_factor,
            min_capacity=self.min_capacity,
            expert_capacity=self.expert_capacity,
        )


def group_shape(batch: int, length: int, group_size: int | str) -> tuple[int, int]:
    """Groups and tokens per group (G, M) of a batch of rows; G · M = batch · length.

    Raises:
      UserError: a row is longer than a group and not a whole number of groups.
    """
    if group_size == "row":
        return batch, length
    assert isinstance(group_size, int)
    if length > group_size:
        if length % group_size:
            raise UserError(
                f"MoeConfig.group_size = {group_size} does not divide rows of {length} tokens; "
                f"use a divisor of {length}, a size of at least {length}, or 'row'"
            )
        return batch * length // group_size, group_size
    rows = max(n for n in range(1, batch + 1) if batch % n == 0 and n * length <= group_size)
    return batch // rows, rows * length


class Router(nn.Module):
    """The gate's parameters: logits of every expert for every token.

    Weights, input and product are float32 (float64 for float64 activations) whatever the
    activations are: selective precision, arXiv:2101.03961 §2.4.
    """

    config: MoeConfig
    train: bool = False

    @nn.compact
    def __call__(self, x_GMD: Float[Array, "G M D"]) -> Float[Array, "G M E"]:
        """Router logits; with jitter on the input in training (rng stream `jitter`)."""
        config = self.config
        dtype = jnp.promote_types(x_GMD.dtype, jnp.float32)
        x_GMD = x_GMD.astype(dtype)
        if self.train and config.jitter_noise:
            low, high = 1 - config.jitter_noise, 1 + config.jitter_noise
            x_GMD *= jax.random.uniform(self.make_rng("jitter"), x_GMD.shape, dtype, low, high)
        kernel_DE = self.param(
            "kernel",
            axes(nn.initializers.normal(0.02), ("embed", "experts")),
            (x_GMD.shape[-1], config.num_experts),
            jnp.float32,
        )
        logits_GME = jnp.einsum("gmd,de->gme", x_GMD, kernel_DE.astype(dtype))
        if config.router_bias:
            bias_E = self.param(
                "bias",
                axes(nn.initializers.zeros, ("experts",)),
                (config.num_experts,),
                jnp.float32,
            )
            logits_GME += bias_E.astype(dtype)[None, None]
        return logits_GME


class Experts(nn.Module):
    """E feed-forward networks side by side, each applied to its own slots.

    Kernels are stacked on a leading expert axis. One activation gives a plain network
    ``f(x wi) wo``; several give a gated one, ``f(x wi_0) * g(x wi_1) * … wo``.
    """

    num_experts: int
    d_ff: int
    activations: tuple[str, ...]
    dropout_rate: float
    init_scale: float
    train: bool = False

    @nn.compact
    def __call__(self, x_END: Float[Array, "E N D"]) -> Float[Array, "E N D"]:
        """N slots per expert in, the same slots out."""
        width = x_END.shape[-1]
        init = nn.initializers.variance_scaling(
            self.init_scale, "fan_in", "truncated_normal", in_axis=-2, out_axis=-1, batch_axis=0
        )

        def kernel(name: str, names: tuple[str, ...], fan_in: int, fan_out: int) -> jax.Array:
            shape = (self.num_experts, fan_in, fan_out)
            return self.param(name, axes(init, names), shape, jnp.float32).astype(x_END.dtype)

        hidden_ENF = None
        for index, activation in enumerate(self.activations):
            name = "wi" if len(self.activations) == 1 else f"wi_{index}"
            wi_EDF = kernel(name, ("expert", "embed", "mlp"), width, self.d_ff)
            branch_ENF = ACTIVATIONS[activation](jnp.einsum("end,edf->enf", x_END, wi_EDF))
            hidden_ENF = branch_ENF if hidden_ENF is None else hidden_ENF * branch_ENF
        hidden_ENF = nn.Dropout(self.dropout_rate, deterministic=not self.train)(hidden_ENF)
        wo_EFD = kernel("wo", ("expert", "mlp", "embed"), self.d_ff, width)
        return jnp.einsum("enf,efd->end", hidden_ENF, wo_EFD)


class MoeLayer(nn.Module):
    """A sparse feed-forward layer: route, place, dispatch → experts → combine.

    Overflow tokens and padding come out as zeros, so that the residual carries them unchanged.
    """

    config: MoeConfig
    d_ff: int
    activations: tuple[str, ...]
    init_scale: float
    train: bool = False
    capture_router: bool = False

    @nn.compact
    def __call__(
        self, x_BTD: Float[Array, "B T D"], mask_BT: Bool[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], RouterStats]:
        """Outputs in `x`'s dtype, and what the router did. `mask_BT` is True on real tokens."""
        config = self.config
        batch, length, width = x_BTD.shape
        groups, group_tokens = group_shape(batch, length, config.group_size)
        x_GMD = constrain(x_BTD.reshape(groups, group_tokens, width), "group", None, None)
        if config.route_padding:
            mask_BT = jnp.ones_like(mask_BT)
        mask_GM = mask_BT.reshape(groups, group_tokens)

        # 1. Routing: every token chooses its experts.
        logits_GME = Router(config, self.train, name="router")(x_GMD)
        choice = routing.ROUTERS[config.router](logits_GME)

        # 2. Placement: choices get slots, up to the experts' capacity.
        capacity = config.capacity(group_tokens, train=self.train)
        slots = routing.place(choice, mask_GM, num_experts=config.num_experts, capacity=capacity)

        # 3. Dispatch, experts. Two constraints in sequence, group-sharded then expert-sharded,
        # make XLA exchange slots by all-to-all instead of gathering tokens.
        dispatcher = DISPATCHERS[config.dispatch]
        slots_GECD = dispatcher.dispatch(x_GMD, slots)
        slots_GECD = constrain(slots_GECD, "group", None, None, None)
        slots_GECD = constrain(slots_GECD, "group_within_expert", "expert", None, None)
        slots_END = slots_GECD.swapaxes(0, 1).reshape(config.num_experts, groups * capacity, width)
        slots_END = Experts(
            num_experts=config.num_experts,
            d_ff=self.d_ff,
            activations=self.activations,
            dropout_rate=config.expert_dropout_rate,
            init_scale=self.init_scale,
            train=self.train,
            name="expert",
        )(slots_END)
        slots_GECD = slots_END.reshape(config.num_experts, groups, capacity, width).swapaxes(0, 1)
        slots_GECD = constrain(slots_GECD, "group_within_expert", "expert", None, None)
        slots_GECD = constrain(slots_GECD, "group", None, None, None)

        # 4. Combine: outputs return to their tokens, weighted by the gates.
        y_GMD = dispatcher.combine(slots_GECD, slots, choice)
        y_BTD = constrain(y_GMD.reshape(batch, length, width), "batch", None, None)

        stats = balance.router_stats(logits_GME, choice, slots, mask_GM)
        if self.capture_router:
            rows = (batch, length, -1)
            stats = dataclasses.replace(
                stats,
                logits=logits_GME.reshape(rows),
                expert_index=choice.expert_index_GMK.reshape(rows),
                gate=choice.gate_GMK.reshape(rows),
                kept=slots.kept_GMK.reshape(rows),
            )
        return y_BTD, stats
