"""Capacity and placement: hand-worked cases, a loop, and what must always hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchx.moe import placement, routing
from switchx.moe.assignment import Choice


def choice_of(expert_index_GMK):
    """A choice with these experts; placement looks at the gates of "probability" only."""
    expert_index_GMK = jnp.asarray(expert_index_GMK, jnp.int32)
    return Choice(expert_index_GMK=expert_index_GMK, gate_GMK=jnp.ones(expert_index_GMK.shape))


place = jax.jit(
    placement.place, static_argnames=("num_experts", "capacity", "priority", "renormalize")
)


group = jax.jit(placement.group, static_argnames="num_experts")


def place_by_loop(expert_index_GMK, mask_GM, *, num_experts, capacity):
    """One choice after the other, first choices before second ones; unmatched is one past."""
    groups, tokens, top_k = expert_index_GMK.shape
    token_GEC = np.full((groups, num_experts, capacity), tokens)
    slot_GMK = np.full((groups, tokens, top_k), num_experts * capacity)
    for g in range(groups):
        filled = [0] * num_experts
        for k in range(top_k):
            for m in range(tokens):
                e = expert_index_GMK[g, m, k]
                if mask_GM[g, m] and filled[e] < capacity:
                    token_GEC[g, e, filled[e]] = m
                    slot_GMK[g, m, k] = e * capacity + filled[e]
                    filled[e] += 1
    return token_GEC, slot_GMK


def random_choices(seed, groups, tokens, num_experts, top_k):
    """Distinct experts for every token; the low ones in more demand than the high ones."""
    rng = np.random.default_rng(seed)
    scores_GME = rng.normal(size=(groups, tokens, num_experts)) - 0.3 * np.arange(num_experts)
    return np.argsort(-scores_GME, axis=-1)[..., :top_k]


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "factor", "minimum", "expected"),
    [
        (64, 8, 1, 1.0, 0, 8),  # exactly balanced
        (64, 8, 1, 1.25, 0, 10),
        (8192, 128, 1, 1.25, 0, 80),
        (10, 4, 1, 1.0, 0, 3),  # 2.5, up
        (9, 4, 1, 1.0, 0, 3),  # 2.25, up too
        (80, 8, 1, 1.1, 0, 11),  # 1.1 · 80 / 8 is 11.000000000000002 in floating point
        (100, 10, 1, 1.1, 0, 11),
        (30, 3, 1, 1.2, 0, 12),
        (64, 8, 1, 0.5, 0, 4),
        (64, 8, 2, 1.0, 0, 16),  # K choices each
        (64, 8, 2, 1.25, 0, 20),
        (64, 8, 3, 1.0, 0, 24),
        (16, 8, 1, 1.0, 4, 4),  # 2, but at least 4
        (40, 8, 1, 1.0, 4, 5),
        (3, 8, 1, 1.0, 4, 3),  # 4 slots for 3 tokens: one could never fill
        (64, 8, 1, 100.0, 0, 64),  # no more slots than tokens
        (64, 8, 1, 8.0, 0, 64),
        (64, 8, 1, 7.0, 0, 56),
        (64, 8, 1, None, 0, 64),  # dropless
        (64, 8, 2, None, 4, 64),
        (64, 8, 1, 1e-9, 0, 1),  # never none
        (1, 8, 1, 1.25, 4, 1),  # one decoded token
    ],
)
def test_capacity(tokens, experts, top_k, factor, minimum, expected):
    capacity = placement.capacity(
        tokens, num_experts=experts, top_k=top_k, capacity_factor=factor, min_capacity=minimum
    )
    assert capacity == expected
    assert isinstance(capacity, int)


def test_an_absolute_capacity_replaces_the_formula():
    options = {"num_experts": 8, "top_k": 1, "capacity_factor": None, "min_capacity": 9}
    assert placement.capacity(64, expert_capacity=5, **options) == 5
    assert placement.capacity(4, expert_capacity=5, **options) == 4


class TestPlaceByHand:
    def test_overflow_in_token_order(self):
        # Expert 1 is asked by tokens 0, 2, 3, 5 and has 2 slots: 3 and 5 go without.
        # Expert 0 is asked by token 1, expert 2 by token 4. Empty slots hold 6 (tokens),
        # choices without a slot hold 6 (slots).
        slots = place(
            choice_of([[[1], [0], [1], [1], [2], [1]]]),
            jnp.ones((1, 6), bool),
            num_experts=3,
            capacity=2,
        )
        np.testing.assert_array_equal(slots.token_GEC, [[[1, 6], [0, 2], [4, 6]]])
        np.testing.assert_array_equal(slots.slot_GMK, [[[2], [0], [3], [6], [4], [6]]])
        np.testing.assert_array_equal(slots.kept_GMK[0, :, 0], [1, 1, 1, 0, 1, 0])
        assert slots.token_GEC.dtype == slots.slot_GMK.dtype == jnp.int32

    def test_padding_takes_no_slot(self):
        # Tokens 0 and 3 are padding: now 2 and 5 have the two slots of expert 1.
        slots = place(
            choice_of([[[1], [0], [1], [1], [2], [1]]]),
            jnp.asarray([[False, True, True, False, True, True]]),
            num_experts=3,
            capacity=2,
        )
        np.testing.assert_array_equal(slots.token_GEC, [[[1, 6], [2, 5], [4, 6]]])
        np.testing.assert_array_equal(slots.slot_GMK, [[[6], [0], [2], [6], [4], [3]]])

    def test_first_choices_before_second_ones(self):
        # 3 tokens, K = 2, 2 experts of 2 slots. First choices: token 0 → 1, 1 → 0, 2 → 0.
        # Expert 0 is then full. Of the second choices (0 → 0, 1 → 1, 2 → 1) only token 1 finds
        # a slot, the second of expert 1, although token 0 came first.
        slots = place(
            choice_of([[[1, 0], [0, 1], [0, 1]]]),
            jnp.ones((1, 3), bool),
            num_experts=2,
            capacity=2,
        )
        np.testing.assert_array_equal(slots.token_GEC, [[[1, 2], [0, 1]]])
        np.testing.assert_array_equal(slots.slot_GMK, [[[2, 4], [0, 3], [1, 4]]])

    def test_groups_have_their_own_slots(self):
        # The same demand in both groups, but the first token of the second group is padding.
        slots = place(
            choice_of([[[0], [0], [0]], [[0], [0], [0]]]),
            jnp.asarray([[True, True, True], [False, True, True]]),
            num_experts=2,
            capacity=1,
        )
        np.testing.assert_array_equal(slots.token_GEC, [[[0], [3]], [[1], [3]]])
        np.testing.assert_array_equal(slots.slot_GMK[..., 0], [[0, 2, 2], [2, 0, 2]])


# 50 groups are 50 random routings in one call.
G, M, E = 50, 11, 5


def routings():
    """Random and adversarial choices [G, M, K] with their masks, by name."""
    everyone = np.ones((G, M), bool)
    some = np.random.default_rng(1).random((G, M)) < 0.7
    some[0] = False  # nothing but padding
    some[1] = True
    for top_k in (1, 2, 3):
        yield f"random-K{top_k}", random_choices(top_k, G, M, E, top_k), everyone
        yield f"padded-K{top_k}", random_choices(10 + top_k, G, M, E, top_k), some
    collapsed = np.broadcast_to(np.asarray([3, 0]), (G, M, 2))
    yield "all-to-one", collapsed[..., :1], some
    yield "all-to-the-same-two", collapsed, everyone
    yield "padding", random_choices(0, G, M, E, 2), np.zeros((G, M), bool)
    # Experts 0 and 2 are asked by nobody.
    yield "empty-experts", np.asarray([1, 3, 4])[random_choices(0, G, M, 3, 2)], some


ROUTINGS = {name: (choices, mask) for name, choices, mask in routings()}


@pytest.mark.parametrize("capacity", [1, 2, 4, M])
@pytest.mark.parametrize("name", ROUTINGS)
def test_placement(name, capacity):
    expert_index_GMK, mask_GM = ROUTINGS[name]
    top_k = expert_index_GMK.shape[-1]
    slots = place(choice_of(expert_index_GMK), mask_GM, num_experts=E, capacity=capacity)
    token_GEC, slot_GMK = np.asarray(slots.token_GEC), np.asarray(slots.slot_GMK)

    # The loop.
    expected_token_GEC, expected_slot_GMK = place_by_loop(
        expert_index_GMK, mask_GM, num_experts=E, capacity=capacity
    )
    np.testing.assert_array_equal(token_GEC, expected_token_GEC)
    np.testing.assert_array_equal(slot_GMK, expected_slot_GMK)

    # Exactly `capacity` of an oversubscribed expert's choices are kept, all of any other's.
    kept_GMK = np.asarray(slots.kept_GMK)
    for g in range(G):
        for e in range(E):
            asks_MK = (expert_index_GMK[g] == e) & mask_GM[g, :, None]
            taken = token_GEC[g, e] < M
            assert taken.sum() == (asks_MK & kept_GMK[g]).sum() == min(asks_MK.sum(), capacity)
            assert not np.any(np.diff(taken.astype(int)) > 0)  # filled from the front
    assert not kept_GMK[~mask_GM].any()

    # Each direction is the inverse of the other.
    for g in range(G):
        token_S, slot_Q = token_GEC[g].ravel(), slot_GMK[g].ravel()
        filled, kept = np.flatnonzero(token_S < M), np.flatnonzero(slot_Q < E * capacity)
        np.testing.assert_array_equal(np.sort(slot_Q[kept]), filled)
        np.testing.assert_array_equal(token_S[slot_Q[kept]], kept // top_k)
    # The gates lie in the slots of their choices, and nowhere else.
    np.testing.assert_array_equal(np.asarray(slots.gate_GEC) == 1, token_GEC < M)


def test_a_second_choice_never_displaces_a_first():
    # More second choices change nothing for the first ones.
    expert_index_GMK = ROUTINGS["random-K2"][0]
    mask_GM = jnp.ones((G, M), bool)
    one = place(choice_of(expert_index_GMK[..., :1]), mask_GM, num_experts=E, capacity=2)
    two = place(choice_of(expert_index_GMK), mask_GM, num_experts=E, capacity=2)
    np.testing.assert_array_equal(one.slot_GMK[..., 0], two.slot_GMK[..., 0])
    assert not np.all(one.kept_GMK)


def test_placement_is_causal_for_one_choice():
    # A token's slot depends on the tokens before it only.
    expert_index_GMK, mask_GM = ROUTINGS["padded-K1"]
    slots = place(choice_of(expert_index_GMK), mask_GM, num_experts=E, capacity=2)
    changed = expert_index_GMK.copy()
    changed[:, 6:] = (changed[:, 6:] + 1) % E
    other = place(choice_of(changed), mask_GM, num_experts=E, capacity=2)
    np.testing.assert_array_equal(slots.slot_GMK[:, :6], other.slot_GMK[:, :6])
    assert np.any(slots.slot_GMK[:, 6:] != other.slot_GMK[:, 6:])


def place_in_order(expert_index_GMK, gate_GMK, mask_GM, *, num_experts, capacity, priority):
    """Kept choices, served one after the other in an order written out."""
    groups, tokens, top_k = expert_index_GMK.shape
    kept_GMK = np.zeros(expert_index_GMK.shape, bool)
    for g in range(groups):
        by_gate = sorted(range(tokens), key=lambda m, g=g: -gate_GMK[g, m, 0])
        queue = {
            "choice": [(m, k) for k in range(top_k) for m in range(tokens)],
            "token": [(m, k) for m in range(tokens) for k in range(top_k)],
            "probability": [(m, k) for k in range(top_k) for m in by_gate],
        }[priority]
        filled = [0] * num_experts
        for m, k in queue:
            e = expert_index_GMK[g, m, k]
            if e < num_experts and mask_GM[g, m] and filled[e] < capacity:
                filled[e] += 1
                kept_GMK[g, m, k] = True
    return kept_GMK


@pytest.mark.parametrize("priority", placement.PRIORITIES)
@pytest.mark.parametrize("name", ["random-K1", "padded-K2", "padded-K3", "all-to-the-same-two"])
def test_priority(name, priority):
    expert_index_GMK, mask_GM = ROUTINGS[name]
    rng = np.random.default_rng(5)
    # Some second choices are not made: E is nobody.
    expert_index_GMK = expert_index_GMK.copy()
    expert_index_GMK[..., 1:][rng.random(expert_index_GMK[..., 1:].shape) < 0.3] = E
    gate_GMK = rng.random(expert_index_GMK.shape).astype(np.float32)
    choice = Choice(
        expert_index_GMK=jnp.asarray(expert_index_GMK, jnp.int32), gate_GMK=jnp.asarray(gate_GMK)
    )
    options = {"num_experts": E, "capacity": 2, "priority": priority}
    slots = place(choice, mask_GM, **options)
    expected_GMK = place_in_order(expert_index_GMK, gate_GMK, mask_GM, **options)
    np.testing.assert_array_equal(slots.kept_GMK, expected_GMK)
    # Every slot has the gate of the choice that is in it.
    for g, m, k in np.argwhere(expected_GMK):
        slot = int(slots.slot_GMK[g, m, k])
        assert slots.token_GEC[g].reshape(-1)[slot] == m
        assert slots.gate_GEC[g].reshape(-1)[slot] == gate_GMK[g, m, k]


def test_by_token_nothing_is_taken_from_earlier_ones():
    # Two slots each: by "choice" token 0 loses its second choice to the first of tokens 1 and 2.
    choice = choice_of([[[0, 1], [1, 0], [1, 0]]])
    mask_GM = jnp.ones((1, 3), bool)
    kept = {
        priority: place(choice, mask_GM, num_experts=2, capacity=2, priority=priority).kept_GMK[0]
        for priority in ("choice", "token")
    }
    np.testing.assert_array_equal(kept["choice"], [[1, 0], [1, 1], [1, 0]])
    np.testing.assert_array_equal(kept["token"], [[1, 1], [1, 1], [0, 0]])


def test_by_probability_the_surest_tokens_stay():
    # One slot for three tokens; padding does not stand in the way however sure it is.
    choice = Choice(
        expert_index_GMK=jnp.zeros((1, 4, 1), jnp.int32),
        gate_GMK=jnp.asarray([[[0.3], [0.5], [0.4], [0.9]]]),
    )
    mask_GM = jnp.asarray([[True, True, True, False]])
    slots = place(choice, mask_GM, num_experts=2, capacity=1, priority="probability")
    np.testing.assert_array_equal(slots.kept_GMK[0, :, 0], [0, 1, 0, 0])
    np.testing.assert_array_equal(slots.token_GEC[0, 0], [1])


def test_survivors_are_renormalised():
    # Two slots each: tokens 0 and 1 keep both of their gates, token 2 has none left.
    choice = Choice(
        expert_index_GMK=jnp.asarray([[[0, 1], [0, 1], [0, 1]]], jnp.int32),
        gate_GMK=jnp.asarray([[[0.5, 0.25], [0.6, 0.3], [0.7, 0.2]]]),
    )
    mask_GM = jnp.ones((1, 3), bool)
    options = {"num_experts": 2, "capacity": 2, "renormalize": True}
    slots = place(choice, mask_GM, **options)
    np.testing.assert_allclose(slots.gate_GEC[0], [[2 / 3, 2 / 3], [1 / 3, 1 / 3]], rtol=1e-6)
    fewer = place(choice, mask_GM, **(options | {"capacity": 1, "priority": "token"}))
    np.testing.assert_allclose(fewer.gate_GEC[0], [[2 / 3], [1 / 3]], rtol=1e-6)
    # One slot each: token 1 loses its first choice, and its second then weighs 1.
    crossed = Choice(
        expert_index_GMK=jnp.asarray([[[0, 1], [0, 2]]], jnp.int32),
        gate_GMK=jnp.asarray([[[0.5, 0.25], [0.6, 0.3]]]),
    )
    slots = place(crossed, mask_GM[:, :2], **(options | {"num_experts": 3, "capacity": 1}))
    np.testing.assert_allclose(slots.gate_GEC[0, :, 0], [2 / 3, 1 / 3, 1], rtol=1e-6)


def test_gates_in_slots_pass_gradients_to_kept_choices_only():
    expert_index_GMK, mask_GM = ROUTINGS["padded-K2"]
    gate_GMK = np.random.default_rng(6).random(expert_index_GMK.shape).astype(np.float32)
    weight_GEC = np.random.default_rng(7).random((G, E, 2)).astype(np.float32)
    index_GMK = jnp.asarray(expert_index_GMK, jnp.int32)

    @jax.jit
    def total(gate_GMK):
        choice = Choice(expert_index_GMK=index_GMK, gate_GMK=gate_GMK)
        slots = placement.place(choice, jnp.asarray(mask_GM), num_experts=E, capacity=2)
        return jnp.sum(slots.gate_GEC * weight_GEC), slots

    (_, slots), gradient_GMK = jax.value_and_grad(total, has_aux=True)(jnp.asarray(gate_GMK))
    expected_GMK = np.zeros(gate_GMK.shape)
    for g, m, k in np.argwhere(np.asarray(slots.kept_GMK)):
        expected_GMK[g, m, k] = weight_GEC[g].reshape(-1)[int(slots.slot_GMK[g, m, k])]
    np.testing.assert_array_equal(gradient_GMK, expected_GMK)


def test_the_surest_tokens_are_those_of_the_router_not_of_renormalised_gates():
    # Token 0 is surer of expert 0 (0.5), but its renormalised gate is less (5/9 against 48/74).
    probs_GME = jnp.asarray([[[0.5, 0.4, 0.1], [0.48, 0.26, 0.26]]])
    mask_GM = jnp.ones((1, 2), bool)
    for renormalize in (False, True):
        routed = routing.gshard(jnp.log(probs_GME), policy="all", renormalize=renormalize)
        slots = place(
            routed.decision,
            mask_GM,
            num_experts=3,
            capacity=1,
            priority="probability",
            confidence_GM=jnp.max(routed.probs_GME, axis=-1),
        )
        np.testing.assert_array_equal(slots.kept_GMK[0], [[1, 1], [0, 0]])


@pytest.mark.parametrize("name", ROUTINGS)
def test_grouping(name):
    expert_index_GMK, mask_GM = ROUTINGS[name]
    rng = np.random.default_rng(9)
    expert_index_GMK = expert_index_GMK.copy()
    expert_index_GMK[rng.random(expert_index_GMK.shape) < 0.1] = E  # not made
    gate_GMK = rng.random(expert_index_GMK.shape).astype(np.float32)
    choice = Choice(
        expert_index_GMK=jnp.asarray(expert_index_GMK, jnp.int32), gate_GMK=jnp.asarray(gate_GMK)
    )
    grouping = group(choice, jnp.asarray(mask_GM), num_experts=E)
    made_GMK = (expert_index_GMK < E) & mask_GM[..., None]
    np.testing.assert_array_equal(grouping.row_GMK < grouping.token_N.size, made_GMK)
    counts_E = [((expert_index_GMK == e) & made_GMK).sum() for e in range(E)]
    np.testing.assert_array_equal(grouping.sizes_E, counts_E)
    # Every choice that is made has a row of its own, in its expert's stretch.
    row_N = np.asarray(grouping.row_GMK)[made_GMK]
    np.testing.assert_array_equal(np.sort(row_N), np.arange(sum(counts_E)))
    expert_N = np.repeat(np.arange(E), counts_E)
    np.testing.assert_array_equal(expert_N[row_N], expert_index_GMK[made_GMK])
    g_N, m_N, _ = np.nonzero(made_GMK)
    np.testing.assert_array_equal(np.asarray(grouping.token_N)[row_N], g_N * M + m_N)
    np.testing.assert_array_equal(np.asarray(grouping.gate_N)[row_N], gate_GMK[made_GMK])
    np.testing.assert_array_equal(grouping.token_N[sum(counts_E) :], G * M)
