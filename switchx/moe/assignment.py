"""The structs between router, dispatch and losses: who goes where, and how it went."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@flax.struct.dataclass
class Choice:
    """Token-major: the experts each token asks for, best first, and the weight of each.

    Attributes:
      expert_index_GMK: experts in [0, E), int32.
      gate_GMK: weight of that expert's output in the sum, float32; carries the router's gradient.
    """

    expert_index_GMK: Int[Array, "G M K"]
    gate_GMK: Float[Array, "G M K"]


@flax.struct.dataclass
class Slots:
    """Both directions of one partial matching between choices and expert slots.

    Choice ``m * K + k`` is the k-th choice of token m; slot ``e * C + c`` is the c-th slot of
    expert e. Either side may be unmatched, which is written as one past the other side's end.

    Attributes:
      choice_GEC: for every slot its choice, ``M * K`` if the slot is empty, int32.
      slot_GMK: for every choice its slot, ``E * C`` if it was dropped or is padding, int32.
    """

    choice_GEC: Int[Array, "G E C"]
    slot_GMK: Int[Array, "G M K"]

    @property
    def kept_GMK(self) -> Bool[Array, "G M K"]:
        """Whether each choice got a slot."""
        return self.slot_GMK < self.choice_GEC.shape[-2] * self.choice_GEC.shape[-1]


@flax.struct.dataclass
class RouterStats:
    """What one MoE layer did with one batch, as sums over its real tokens.

    Sums, not means, so that microbatches add up to exactly the batch. The properties are the
    means, with padding left out. The token-level fields are filled only by ``capture_router``.

    Fields are scalars, or [L] where the layers of a stack are stacked; they are not annotated as
    arrays because tree functions put shapes, shardings and NumPy arrays in their place.

    Attributes:
      num_tokens: real tokens routed.
      num_choices: choices made, K per real token.
      num_dropped: choices that got no slot.
      load_balance: sum over groups of (real tokens in the group) × E Σ_e f_e P_e.
      router_z: sum over tokens of logsumexp(logits)².
      entropy: sum over tokens of the entropy of the router's distribution, nats.
      confidence: sum over tokens of the largest probability.
      tokens_per_expert_E: choices per expert, before capacity.
      logits, expert_index, gate, kept: per token, [B, T, E] and [B, T, K].
    """

    num_tokens: Any
    num_choices: Any
    num_dropped: Any
    load_balance: Any
    router_z: Any
    entropy: Any
    confidence: Any
    tokens_per_expert_E: Any
    logits: Any = None
    expert_index: Any = None
    gate: Any = None
    kept: Any = None

    @property
    def load_balance_loss(self) -> jax.Array:
        """Load-balance loss before its weight; 1 at uniform routing, E at collapse."""
        return self.load_balance / jnp.maximum(self.num_tokens, 1)

    @property
    def router_z_loss(self) -> jax.Array:
        """Router z-loss before its weight."""
        return self.router_z / jnp.maximum(self.num_tokens, 1)

    @property
    def dropped_fraction(self) -> jax.Array:
        """Share of choices without a slot, in [0, 1]."""
        return self.num_dropped / jnp.maximum(self.num_choices, 1)

    @property
    def expert_load(self) -> jax.Array:
        """Share of the choices that each expert was asked for, before capacity; sums to 1."""
        return self.tokens_per_expert_E / jnp.maximum(self.num_choices, 1)[..., None]

    @property
    def router_entropy(self) -> jax.Array:
        """Mean entropy of the router's distribution, nats; ln E at uniform."""
        return self.entropy / jnp.maximum(self.num_tokens, 1)

    @property
    def router_confidence(self) -> jax.Array:
        """Mean of the largest probability."""
        return self.confidence / jnp.maximum(self.num_tokens, 1)
