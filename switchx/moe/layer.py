"""The mixture-of-experts layer: the four steps in order."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from switchx.errors import UserError
from switchx.moe import balance, exchange, placement, routing
from switchx.moe.assignment import (
    Assignment,
    Choice,
    Dropless,
    Mixture,
    RouterStats,
    Routing,
    Tokens,
)
from switchx.moe.config import MoeConfig, check_whole_rows, group_shape
from switchx.moe.dispatch import DISPATCHERS, MIXTURE
from switchx.moe.experts import Experts
from switchx.moe.gate import GATES
from switchx.moe.routing import ROUTERS
from switchx.sharding import axes, batch_shards, constrain


class MoeLayer(nn.Module):
    """A sparse feed-forward layer: route, place, dispatch → experts → combine.

    Overflow tokens and padding come out as zeros, so that the residual carries them unchanged;
    shared experts see them like any other.
    """

    config: MoeConfig
    d_ff: int
    activations: tuple[str, ...]
    init_scale: float
    vocab_size: int = 1
    train: bool = False
    capture_router: bool = False

    @nn.compact
    def __call__(
        self, x_BTD: Float[Array, "B T D"], tokens: Tokens
    ) -> tuple[Float[Array, "B T D"], RouterStats]:
        """Outputs in `x`'s dtype, and what the router did. `tokens` are [B, T]."""
        config = self.config
        batch, length, width = x_BTD.shape
        groups, group_tokens = group_shape(batch, length, config.group_size)
        x_GMD = constrain(x_BTD.reshape(groups, group_tokens, width), "group", None, None)
        tokens = self._group(tokens, groups, group_tokens)
        capacity = config.capacity(group_tokens, train=self.train)

        # 1. Routing: every token chooses its experts, or every expert its tokens.
        logits_GME, routed = self._route(x_GMD, tokens, capacity)

        # 2. Placement: choices get slots, up to the experts' capacity.
        backend = config.backend(train=self.train, whole_groups=groups % batch_shards() == 0)
        placed = routed.decision
        if isinstance(placed, Choice) and backend == "grouped":
            asked_GMK = placed.expert_index_GMK < config.num_experts
            placed = Dropless(asked_GMK & tokens.mask[..., None])
        elif isinstance(placed, Choice):
            placed = placement.place(
                placed,
                tokens.mask,
                num_experts=config.num_experts,
                capacity=capacity,
                priority=config.priority or "choice",
                confidence_GM=jnp.max(routed.probs_GME, axis=-1),
                renormalize=config.renormalize == "after_dropping",
            )

        # 3. Dispatch → experts. 4. Combine: outputs return to their tokens, weighted by the gates.
        experts = self._experts("expert", config.num_experts)
        if isinstance(placed, Dropless):
            assert isinstance(routed.decision, Choice)
            choice = routed.decision
            if config.renormalize == "after_dropping":
                choice = placement.renormalize(choice, placed.kept_GMK)
            y_GMD = exchange.dropless_experts(experts, x_GMD, choice, tokens.mask)
        else:
            dispatcher = MIXTURE if isinstance(placed, Mixture) else DISPATCHERS[backend]
            slots_GECD = dispatcher.dispatch(x_GMD, placed)
            slots_GECD = _exchange(experts, slots_GECD)
            y_GMD = dispatcher.combine(slots_GECD, placed, group_tokens)
        if config.straight_through and self.train:
            y_GMD += _straight_through(config, experts, x_GMD, routed, placed, tokens.mask)
        if config.num_shared_experts:
            shared = self._experts("shared_expert", 1, config.num_shared_experts)
            y_GMD += shared(x_GMD.reshape(1, -1, width)).reshape(y_GMD.shape)
        y_BTD = constrain(y_GMD.reshape(batch, length, width), "batch", None, None)

        stats = balance.router_stats(
            logits_GME,
            routed,
            placed,
            tokens.mask,
            load_balance_choices=config.load_balance_choices,
        )
        if self.capture_router:
            stats = _capture(stats, logits_GME, routed, placed, (batch, length, -1))
        return y_BTD, stats

    def _group(self, tokens: Tokens, groups: int, group_tokens: int) -> Tokens:
        """The tokens by group; sequences numbered within it."""
        needed = ROUTERS[self.config.router].needs
        if needed is not None and getattr(tokens, needed) is None:
            raise UserError(
                f"MoeConfig.router = {self.config.router!r} needs {_NEEDS[needed]}, and the model "
                "was given none"
            )
        if self.config.route_padding:
            tokens = dataclasses.replace(tokens, mask=jnp.ones_like(tokens.mask))
        length = tokens.mask.shape[1]
        tokens = jax.tree.map(lambda leaf: leaf.reshape(groups, group_tokens), tokens)
        if self.config.router != "sentence":
            return tokens
        check_whole_rows(self.config, group_tokens, length)
        starts_GM = jnp.broadcast_to(jnp.arange(group_tokens) % length == 0, tokens.mask.shape)
        if tokens.sequence is not None:
            starts_GM |= tokens.sequence != jnp.roll(tokens.sequence, 1, axis=1)
        return dataclasses.replace(tokens, sequence=jnp.cumsum(starts_GM, axis=1) - 1)

    def _route(
        self, x_GMD: jax.Array, tokens: Tokens, capacity: int
    ) -> tuple[jax.Array | None, Routing]:
        config, scheme = self.config, ROUTERS[self.config.router]
        logits_GME = None
        if scheme.gate is not None:
            gate = GATES[scheme.gate](
                config.num_experts,
                jitter_noise=config.jitter_noise,
                input_dropout_rate=config.router_dropout_rate,
                bias=config.router_bias,
                capacity=capacity,
                cosine_dim=config.cosine_width,
                num_tasks=config.num_tasks,
                dtype=config.router_dtype,
                train=self.train,
                name="router",
            )
            logits_GME = gate(x_GMD, *([tokens.task_ids] if scheme.gate == "task" else []))
            logits_GME = logits_GME.astype(jnp.promote_types(x_GMD.dtype, jnp.float32))
        bias_E = None
        if config.router == "loss_free":
            init = axes(nn.initializers.zeros, ("experts",))
            bias_E = self.param("balance_bias", init, (config.num_experts,), jnp.float32)
        situation = routing.Situation(
            tokens=tokens,
            capacity=capacity,
            train=self.train,
            rng=self.make_rng("jitter") if self.train and config.draws_choices else None,
            bias_E=bias_E,
            vocab_size=self.vocab_size,
        )
        dtype = jnp.promote_types(x_GMD.dtype, jnp.float32)
        empty = jnp.zeros((*x_GMD.shape[:2], 0), dtype)
        return logits_GME, scheme.route(
            config, empty if logits_GME is None else logits_GME, situation
        )

    def _experts(self, name: str, num_experts: int, width: int = 1) -> Experts:
        config = self.config
        return Experts(
            num_experts=num_experts,
            d_ff=width * (config.expert_d_ff or self.d_ff),
            activations=tuple(config.expert_activations or self.activations),
            dropout_rate=config.expert_dropout_rate,
            init_scale=self.init_scale,
            bias=config.expert_bias,
            train=self.train,
            name=name,
        )


_NEEDS = {
    "ids": "the ids of the tokens",
    "task_ids": "the task of every token (encoder_task_ids, decoder_task_ids)",
}


def _exchange(experts: Experts, slots_GECD: jax.Array) -> jax.Array:
    """The experts on their slots of all groups, and the outputs in the same places.

    Two constraints in sequence, group-sharded then expert-sharded, make XLA exchange slots by
    all-to-all instead of gathering tokens.
    """
    groups, num_experts, capacity, width = slots_GECD.shape
    slots_GECD = constrain(slots_GECD, "group", None, None, None)
    slots_GECD = constrain(slots_GECD, "group_within_expert", "expert", None, None)
    slots_END = slots_GECD.swapaxes(0, 1).reshape(num_experts, groups * capacity, width)
    slots_END = experts(slots_END)
    slots_GECD = slots_END.reshape(num_experts, groups, capacity, width).swapaxes(0, 1)
    slots_GECD = constrain(slots_GECD, "group_within_expert", "expert", None, None)
    return constrain(slots_GECD, "group", None, None, None)


def _straight_through(
    config: MoeConfig,
    experts: Experts,
    x_GMD: jax.Array,
    routed: Routing,
    placed: Any,
    mask_GM: jax.Array,
) -> jax.Array:
    """Zeros whose gradient is that of the experts a token did not reach, to the router.

    DenseMixer: the top-k is taken as the identity in the backward pass, so that the probability of
    every expert learns from its output.
    """
    assert isinstance(routed.decision, Choice)
    probs_GME, choice = routed.probs_GME, routed.decision
    groups, num_tokens, num_experts = probs_GME.shape
    x_ND = jax.lax.stop_gradient(x_GMD).reshape(-1, x_GMD.shape[-1])
    y_END = experts(jnp.broadcast_to(x_ND, (num_experts, *x_ND.shape)))
    y_EGMD = jax.lax.stop_gradient(y_END).reshape(num_experts, groups, num_tokens, -1)
    reached_GMKE = jax.nn.one_hot(choice.expert_index_GMK, num_experts, dtype=bool)
    reached_GMKE &= placed.kept_GMK[..., None]
    reached_GME = jnp.any(reached_GMKE, axis=2)
    # What the gates of the reached ones were divided by.
    if config.renormalize == "after_dropping":
        choice = placement.renormalize(choice, placed.kept_GMK)
    gates_GM1 = jnp.sum(choice.gate_GMK, -1, keepdims=True, where=placed.kept_GMK)
    reached_p_GM1 = jnp.sum(probs_GME, -1, keepdims=True, where=reached_GME)
    scale_GM1 = jnp.where(reached_p_GM1 > 0, gates_GM1 / jnp.maximum(reached_p_GM1, 1e-37), 1)
    others_GME = jnp.where(reached_GME | ~mask_GM[..., None], 0, probs_GME)
    others_GME *= jax.lax.stop_gradient(scale_GM1)
    others_GME -= jax.lax.stop_gradient(others_GME)
    y_GMD = jnp.einsum("gme,egmd->gmd", others_GME, y_EGMD.astype(others_GME.dtype))
    return y_GMD.astype(x_GMD.dtype)


def _capture(
    stats: RouterStats,
    logits_GME: jax.Array | None,
    routed: Routing,
    placed: Assignment | Dropless | Mixture,
    rows: tuple[int, int, int],
) -> RouterStats:
    """Statistics with every token's routing."""
    if isinstance(placed, Mixture):
        gate_GMK = jnp.sum(placed.combine_GMEC, axis=-1)
        kept_GMK = jnp.ones(gate_GMK.shape, bool)
        index_GMK = jnp.broadcast_to(jnp.arange(gate_GMK.shape[-1]), gate_GMK.shape)
    elif isinstance(routed.decision, Choice):
        index_GMK, gate_GMK = routed.decision.expert_index_GMK, routed.decision.gate_GMK
        kept_GMK = placed.kept_GMK
    else:
        assert isinstance(routed.decision, Assignment)
        index_GMK, gate_GMK, kept_GMK = _by_token(routed.decision, routed.probs_GME.shape)
    return dataclasses.replace(
        stats,
        logits=None if logits_GME is None else logits_GME.reshape(rows),
        probs=routed.probs_GME.reshape(rows),
        expert_index=index_GMK.reshape(rows),
        gate=gate_GMK.reshape(rows),
        kept=kept_GMK.reshape(rows),
    )


def _by_token(taken: Assignment, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What experts took, by token, [G, M, E]: expert e or E, its gate, and whether it did."""
    groups, num_tokens, num_experts = shape

    def scatter(token_EC: jax.Array, value_EC: jax.Array) -> jax.Array:
        expert_E1 = jnp.arange(num_experts)[:, None]
        found_ME = jnp.zeros((num_tokens, num_experts), value_EC.dtype)
        return found_ME.at[token_EC, expert_E1].set(value_EC, mode="drop")

    gate_GME = jax.vmap(scatter)(taken.token_GEC, taken.gate_GEC)
    kept_GME = jax.vmap(scatter)(taken.token_GEC, jnp.ones(taken.token_GEC.shape, bool))
    index_GME = jnp.where(kept_GME, jnp.arange(num_experts), num_experts)
    return index_GME, gate_GME, kept_GME
