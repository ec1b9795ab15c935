"""The structs between router, placement, dispatch and losses: who goes where, and how it went."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@flax.struct.dataclass
class Tokens:
    """What is known of tokens besides their states: by row in a model, by group in a MoE layer.

    Attributes:
      mask: whether a token is real; padding is False.
      ids: token ids, for `hash` routing.
      sequence: sequences are numbered within a row (packing) or a group, for `sentence` routing.
      task_ids: which task a token belongs to, for `task` routing.
    """

    mask: Bool[Array, "*rows M"]
    ids: Int[Array, "*rows M"] | None = None
    sequence: Int[Array, "*rows M"] | None = None
    task_ids: Int[Array, "*rows M"] | None = None


@flax.struct.dataclass
class Choice:
    """Token-major: the experts each token asks for, best first, and the weight of each.

    Attributes:
      expert_index_GMK: experts in [0, E), or E for a choice that is not made, int32.
      gate_GMK: weight of that expert's output in the sum, at least float32; carries the
        router's gradient.
    """

    expert_index_GMK: Int[Array, "G M K"]
    gate_GMK: Float[Array, "G M K"]


@flax.struct.dataclass
class Assignment:
    """Expert-major: the token in every slot. What is unmatched is written as one past the end.

    Slot ``e * C + c`` is the c-th slot of expert e. Where tokens choose, `slot_GMK` is the inverse
    table; where experts choose, a token may be in any number of slots and there is none.

    Attributes:
      token_GEC: the token of every slot, M if the slot is empty, int32.
      gate_GEC: weight of the slot's output for its token, 0 if empty; carries the gradient.
      slot_GMK: for every choice its slot, E · C if it was dropped, padding or not made, int32.
    """

    token_GEC: Int[Array, "G E C"]
    gate_GEC: Float[Array, "G E C"]
    slot_GMK: Int[Array, "G M K"] | None = None

    @property
    def kept_GMK(self) -> Bool[Array, "G M K"]:
        """Whether each choice of the tokens got a slot."""
        assert self.slot_GMK is not None
        return self.slot_GMK < self.token_GEC.shape[-2] * self.token_GEC.shape[-1]


@flax.struct.dataclass
class Grouping:
    """Dropless: all choices of a batch, sorted by expert; N = G · M · K rows.

    Attributes:
      token_N: the token of every row, G · M after the last expert's rows, int32.
      gate_N: weight of the row's output for its token; carries the gradient.
      sizes_E: rows of each expert, int32.
      row_GMK: for every choice its row, N for padding and choices that are not made, int32.
    """

    token_N: Int[Array, " N"]
    gate_N: Float[Array, " N"]
    sizes_E: Int[Array, " E"]
    row_GMK: Int[Array, "G M K"]


@flax.struct.dataclass
class Dropless:
    """Where every choice of a real token is kept.

    Attributes:
      kept_GMK: whether a choice is a real token's.
    """

    kept_GMK: Bool[Array, "G M K"]


@flax.struct.dataclass
class Mixture:
    """Every slot is a weighted mean of tokens and every token a weighted mean of slots.

    Attributes:
      dispatch_GMEC: weights of the tokens in each slot; sum to 1 over real tokens.
      combine_GMEC: weights of the slots' outputs in each token; sum to 1 over slots.
    """

    dispatch_GMEC: Float[Array, "G M E C"]
    combine_GMEC: Float[Array, "G M E C"]


@flax.struct.dataclass
class Routing:
    """What a router decided.

    Attributes:
      decision: what tokens ask for, what experts took, or the weights of a soft mixture.
      probs_GME: the router's distribution over experts for every token, for losses and
        statistics.
    """

    decision: Choice | Assignment | Mixture
    probs_GME: Float[Array, "G M E"]


@flax.struct.dataclass
class RouterStats:
    """What one MoE layer did with one batch, as sums over its real tokens.

    Sums, not means, so that microbatches add up to exactly the batch. The properties are the
    means, with padding left out. The token-level fields are filled only by ``capture_router``.

    Fields are scalars, or [L] where the layers of a stack are stacked; they are not annotated as
    arrays because tree functions put shapes, shardings and NumPy arrays in their place.

    Attributes:
      num_tokens: real tokens routed.
      num_choices_K: choices made, by rank: first choices, second ones, … Where experts choose
        or slots are mixtures, tokens.
      num_dropped_K: of these, choices that got no slot; where experts choose, tokens that no
        expert took.
      load_balance: sum over groups of (real tokens in the group) × E Σ_e f_e P_e.
      importance: sum over groups of (real tokens in the group) × CV² of the experts' gates.
      router_z: sum over tokens of logsumexp(logits)².
      entropy: sum over tokens of the entropy of the router's distribution, nats.
      confidence: sum over tokens of the largest probability.
      tokens_per_expert_E: choices per expert, before capacity.
      logits, probs: per token, [B, T, E]; `logits` is None for a router without, `probs` is the
        router's distribution.
      expert_index, gate, kept: per token and choice, [B, T, K], as in `Choice`. Where experts
        choose or slots are mixtures K is E: choice e is expert e, or E if that did not take the
        token, and the gate of a mixture is the weight of the expert's slots in the token.
    """

    num_tokens: Any
    num_choices_K: Any
    num_dropped_K: Any
    load_balance: Any
    importance: Any
    router_z: Any
    entropy: Any
    confidence: Any
    tokens_per_expert_E: Any
    logits: Any = None
    probs: Any = None
    expert_index: Any = None
    gate: Any = None
    kept: Any = None

    @property
    def load_balance_loss(self) -> jax.Array:
        """Load-balance loss before its weight; 1 at uniform routing, E at collapse."""
        return self.load_balance / jnp.maximum(self.num_tokens, 1)

    @property
    def importance_loss(self) -> jax.Array:
        """Importance loss before its weight: CV² of the experts' gates; 0 where all are equal."""
        return self.importance / jnp.maximum(self.num_tokens, 1)

    @property
    def router_z_loss(self) -> jax.Array:
        """Router z-loss before its weight."""
        return self.router_z / jnp.maximum(self.num_tokens, 1)

    @property
    def dropped_fraction(self) -> jax.Array:
        """Share of choices without a slot, in [0, 1]."""
        dropped, choices = jnp.sum(self.num_dropped_K, -1), jnp.sum(self.num_choices_K, -1)
        return dropped / jnp.maximum(choices, 1)

    @property
    def dropped_fraction_by_rank(self) -> jax.Array:
        """The same of first choices, second choices and so on, [K]."""
        return self.num_dropped_K / jnp.maximum(self.num_choices_K, 1)

    @property
    def expert_load(self) -> jax.Array:
        """Share of the choices that each expert was asked for, before capacity; sums to 1."""
        total = jnp.sum(self.tokens_per_expert_E, axis=-1, keepdims=True)
        # A sum below 1 is of nothing at all or, where slots are mixtures, of weights.
        return self.tokens_per_expert_E / jnp.where(total > 0, total, 1)

    @property
    def max_violation(self) -> jax.Array:
        """How far the most loaded expert is over the mean: max load / mean load - 1.

        MaxVio of arXiv:2408.15664, §4.1; 0 in perfect balance, E - 1 at collapse.
        """
        return jnp.max(self.expert_load, axis=-1) * self.expert_load.shape[-1] - 1

    @property
    def router_entropy(self) -> jax.Array:
        """Mean entropy of the router's distribution, nats; ln E at uniform."""
        return self.entropy / jnp.maximum(self.num_tokens, 1)

    @property
    def router_confidence(self) -> jax.Array:
        """Mean of the largest probability."""
        return self.confidence / jnp.maximum(self.num_tokens, 1)
