"""Routers, capacity and placement: hand-worked cases, a loop, and what must always hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchx.moe import routing
from switchx.moe.assignment import Choice


def choice_of(expert_index_GMK):
    """A choice with these experts; placement does not look at the gates."""
    expert_index_GMK = jnp.asarray(expert_index_GMK, jnp.int32)
    return Choice(expert_index_GMK=expert_index_GMK, gate_GMK=jnp.ones(expert_index_GMK.shape))


place = jax.jit(routing.place, static_argnames=("num_experts", "capacity"))


def place_by_loop(expert_index_GMK, mask_GM, *, num_experts, capacity):
    """One choice after the other, first choices before second ones; unmatched is one past."""
    groups, tokens, top_k = expert_index_GMK.shape
    choice_GEC = np.full((groups, num_experts, capacity), tokens * top_k)
    slot_GMK = np.full((groups, tokens, top_k), num_experts * capacity)
    for g in range(groups):
        filled = [0] * num_experts
        for k in range(top_k):
            for m in range(tokens):
                e = expert_index_GMK[g, m, k]
                if mask_GM[g, m] and filled[e] < capacity:
                    choice_GEC[g, e, filled[e]] = m * top_k + k
                    slot_GMK[g, m, k] = e * capacity + filled[e]
                    filled[e] += 1
    return choice_GEC, slot_GMK


def random_choices(seed, groups, tokens, num_experts, top_k):
    """Distinct experts for every token; the low ones in more demand than the high ones."""
    rng = np.random.default_rng(seed)
    scores_GME = rng.normal(size=(groups, tokens, num_experts)) - 0.3 * np.arange(num_experts)
    return np.argsort(-scores_GME, axis=-1)[..., :top_k]


class TestSwitch:
    def test_hand_worked(self):
        # Sums of exponentials 8, 4 and 10; the largest share is 5/8, 2/4 and 6/10.
        odds = np.asarray([[[1, 2, 5], [2, 1, 1], [3, 6, 1]]], np.float32)
        choice = routing.switch(jnp.log(odds))
        np.testing.assert_array_equal(choice.expert_index_GMK, [[[2], [0], [1]]])
        np.testing.assert_allclose(choice.gate_GMK, [[[0.625], [0.5], [0.6]]], rtol=1e-6)
        assert choice.expert_index_GMK.dtype == jnp.int32
        assert choice.gate_GMK.dtype == jnp.float32

    def test_ties_go_to_the_lowest_index(self):
        logits_GME = jnp.asarray([[[1.0, 1, 1, 1], [0, 2, 2, 0], [0, 0, 0, 3], [-1, 0, 0, 0]]])
        choice = routing.switch(logits_GME)
        np.testing.assert_array_equal(choice.expert_index_GMK[0, :, 0], [0, 1, 3, 1])

    def test_gate_gradient_is_that_of_the_raw_probability(self):
        # p = (1/8, 1/4, 5/8): dp_2/dlogits = p_2 (onehot_2 - p) = 5/8 · (-1/8, -1/4, 3/8).
        logits_GME = jnp.log(jnp.asarray([[[1.0, 2, 5]]]))
        gradient = jax.grad(lambda logits: routing.switch(logits).gate_GMK.sum())(logits_GME)
        np.testing.assert_allclose(gradient[0, 0], [-5 / 64, -10 / 64, 15 / 64], rtol=1e-6)

    def test_large_logits_overflow_nothing(self):
        choice = routing.switch(jnp.asarray([[[1e30, -1e30, 0.0], [-1e30, -1e30, -2e30]]]))
        np.testing.assert_array_equal(choice.expert_index_GMK[0, :, 0], [0, 0])
        np.testing.assert_array_equal(choice.gate_GMK[0, :, 0], [1, 0.5])


@pytest.mark.parametrize("name", routing.ROUTERS)
def test_every_router_asks_distinct_valid_experts_with_gates_in_0_1(name):
    groups, tokens, num_experts = 2, 11, 5
    logits_GME = np.random.default_rng(0).normal(size=(groups, tokens, num_experts))
    choice = routing.ROUTERS[name](jnp.asarray(logits_GME, jnp.float32))
    top_k = choice.expert_index_GMK.shape[-1]
    assert choice.expert_index_GMK.shape == choice.gate_GMK.shape == (groups, tokens, top_k)
    experts = np.asarray(choice.expert_index_GMK)
    assert experts.min() >= 0 and experts.max() < num_experts
    assert all(len(set(token)) == top_k for token in experts.reshape(-1, top_k))
    gates = np.asarray(choice.gate_GMK)
    assert gates.min() >= 0 and gates.max() <= 1


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
    capacity = routing.capacity(
        tokens, num_experts=experts, top_k=top_k, capacity_factor=factor, min_capacity=minimum
    )
    assert capacity == expected
    assert isinstance(capacity, int)


def test_an_absolute_capacity_replaces_the_formula():
    options = {"num_experts": 8, "top_k": 1, "capacity_factor": None, "min_capacity": 9}
    assert routing.capacity(64, expert_capacity=5, **options) == 5
    assert routing.capacity(4, expert_capacity=5, **options) == 4


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
        np.testing.assert_array_equal(slots.choice_GEC, [[[1, 6], [0, 2], [4, 6]]])
        np.testing.assert_array_equal(slots.slot_GMK, [[[2], [0], [3], [6], [4], [6]]])
        np.testing.assert_array_equal(slots.kept_GMK[0, :, 0], [1, 1, 1, 0, 1, 0])
        assert slots.choice_GEC.dtype == slots.slot_GMK.dtype == jnp.int32

    def test_padding_takes_no_slot(self):
        # Tokens 0 and 3 are padding: now 2 and 5 have the two slots of expert 1.
        slots = place(
            choice_of([[[1], [0], [1], [1], [2], [1]]]),
            jnp.asarray([[False, True, True, False, True, True]]),
            num_experts=3,
            capacity=2,
        )
        np.testing.assert_array_equal(slots.choice_GEC, [[[1, 6], [2, 5], [4, 6]]])
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
        # choice = 2 · token + k
        np.testing.assert_array_equal(slots.choice_GEC, [[[2, 4], [0, 3]]])
        np.testing.assert_array_equal(slots.slot_GMK, [[[2, 4], [0, 3], [1, 4]]])

    def test_groups_have_their_own_slots(self):
        # The same demand in both groups, but the first token of the second group is padding.
        slots = place(
            choice_of([[[0], [0], [0]], [[0], [0], [0]]]),
            jnp.asarray([[True, True, True], [False, True, True]]),
            num_experts=2,
            capacity=1,
        )
        np.testing.assert_array_equal(slots.choice_GEC, [[[0], [3]], [[1], [3]]])
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
    choice_GEC, slot_GMK = np.asarray(slots.choice_GEC), np.asarray(slots.slot_GMK)

    # The loop.
    expected_choice_GEC, expected_slot_GMK = place_by_loop(
        expert_index_GMK, mask_GM, num_experts=E, capacity=capacity
    )
    np.testing.assert_array_equal(choice_GEC, expected_choice_GEC)
    np.testing.assert_array_equal(slot_GMK, expected_slot_GMK)

    # Exactly `capacity` of an oversubscribed expert's choices are kept, all of any other's.
    kept_GMK = np.asarray(slots.kept_GMK)
    for g in range(G):
        for e in range(E):
            asks_MK = (expert_index_GMK[g] == e) & mask_GM[g, :, None]
            taken = choice_GEC[g, e] < M * top_k
            assert taken.sum() == (asks_MK & kept_GMK[g]).sum() == min(asks_MK.sum(), capacity)
            assert not np.any(np.diff(taken.astype(int)) > 0)  # filled from the front
    assert not kept_GMK[~mask_GM].any()

    # Each direction is the inverse of the other.
    for g in range(G):
        choice_S, slot_Q = choice_GEC[g].ravel(), slot_GMK[g].ravel()
        filled, kept = np.flatnonzero(choice_S < M * top_k), np.flatnonzero(slot_Q < E * capacity)
        np.testing.assert_array_equal(slot_Q[choice_S[filled]], filled)
        np.testing.assert_array_equal(choice_S[slot_Q[kept]], kept)


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
