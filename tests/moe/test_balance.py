"""Router losses and statistics: a hand-worked example, a loop, gradients, invariants."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchx.moe import placement, routing
from switchx.moe.assignment import Choice, Routing
from switchx.moe.balance import router_stats

LN2, LN3, LN5 = np.log([2, 3, 5])


@functools.partial(jax.jit, static_argnames="capacity")
def switch_stats(logits_GME, mask_GM, *, capacity):
    """Route, place and sum up."""
    routed = routing.switch(logits_GME)
    num_experts = logits_GME.shape[-1]
    slots = placement.place(routed.decision, mask_GM, num_experts=num_experts, capacity=capacity)
    return router_stats(logits_GME, routed, slots, mask_GM)


def random_example(groups=3, tokens=11, num_experts=5, seed=0):
    rng = np.random.default_rng(seed)
    logits_GME = rng.normal(size=(groups, tokens, num_experts)).astype(np.float32)
    return jnp.asarray(logits_GME), jnp.asarray(rng.random((groups, tokens)) < 0.7)


def hand_worked():
    """Two groups of four tokens, three experts; two tokens of the second group are padding.

    Probabilities in eighths, and what is added to every logit, so that logsumexp is that.
    """
    eighths_GME = np.asarray(
        [
            [[4, 2, 2], [5, 2, 1], [2, 2, 4], [1, 6, 1]],
            [[2, 4, 2], [8000, 8, 8], [1, 5, 2], [8, 8, 8000]],
        ]
    )
    shift_GM1 = np.asarray([[0, 1, 0, 2], [0, 50, 1, 50]])[..., None]
    mask_GM = np.asarray([[1, 1, 1, 1], [1, 0, 1, 0]], bool)
    logits_GME = np.log(eighths_GME / 8) + shift_GM1
    return jnp.asarray(logits_GME, jnp.float32), jnp.asarray(mask_GM)


def test_hand_worked():
    stats = switch_stats(*hand_worked(), capacity=1)
    assert stats.num_tokens == 6
    np.testing.assert_array_equal(stats.num_choices_K, [6])
    # First group: tokens 0 and 1 ask expert 0, 2 asks 2, 3 asks 1. Second: both ask 1.
    np.testing.assert_array_equal(stats.tokens_per_expert_E, [2, 3, 1])
    # One slot each: token 1 of the first group and token 2 of the second go without.
    np.testing.assert_array_equal(stats.num_dropped_K, [2])
    np.testing.assert_allclose(stats.dropped_fraction, 1 / 3, rtol=1e-6)
    np.testing.assert_allclose(stats.expert_load, [2 / 6, 3 / 6, 1 / 6], rtol=1e-6)
    # Half of the load on one of three experts: half over the mean.
    np.testing.assert_allclose(stats.max_violation, 0.5, rtol=1e-6)
    # Gates in eighths. First group: (4 + 5, 6, 4), mean 19/3, variance 38/9: 4 tokens times 38/361.
    # Second: (0, 4 + 5, 0), squared variation 2, 2 tokens.
    np.testing.assert_allclose(stats.importance, 4 * 38 / 361 + 2 * 2, rtol=1e-5)
    # First group: f = (1/2, 1/4, 1/4), sums of probabilities (12, 12, 8) / 8:
    # 3 (1.5/2 + 1.5/4 + 1/4) = 4.125. Second: f = (0, 1, 0), sum for expert 1 is 9/8: 3.375.
    np.testing.assert_allclose(stats.load_balance, 4.125 + 3.375, rtol=1e-6)
    np.testing.assert_allclose(stats.load_balance_loss, 1.25, rtol=1e-6)
    # Σ shift² of real tokens: 0 + 1 + 0 + 4, and 0 + 1.
    np.testing.assert_allclose(stats.router_z, 6, rtol=1e-5)
    np.testing.assert_allclose(stats.router_z_loss, 1, rtol=1e-5)
    np.testing.assert_allclose(stats.confidence, (4 + 5 + 4 + 6 + 4 + 5) / 8, rtol=1e-6)
    # In units of ln 2, with eighths = 2^-3: (4, 2, 2) has 1.5; (5, 2, 1) has 2.75 less 5/8 ln 5;
    # (1, 6, 1) has 2.25 less 3/4 ln 3. Three, two and one of them.
    entropy = (3 * 1.5 + 2 * 2.75 + 2.25) * LN2 - 2 * 5 / 8 * LN5 - 3 / 4 * LN3
    np.testing.assert_allclose(stats.entropy, entropy, rtol=1e-5)
    np.testing.assert_allclose(stats.router_entropy, entropy / 6, rtol=1e-5)


def stats_by_loop(logits_GME, expert_index_GMK, gate_GMK, kept_GMK, mask_GM, counted):
    """The definitions, one token after the other, in float64. E is a choice that is not made."""
    groups, tokens, num_experts = logits_GME.shape
    top_k = expert_index_GMK.shape[-1]
    sums = dict.fromkeys(("num_tokens", "load_balance", "router_z", "importance"), 0.0)
    sums |= {"num_choices_K": np.zeros(top_k), "num_dropped_K": np.zeros(top_k)}
    sums |= {"entropy": 0.0, "confidence": 0.0, "tokens_per_expert_E": np.zeros(num_experts)}
    for g in range(groups):
        asked, mass, real = np.zeros(num_experts), np.zeros(num_experts), 0
        importance = np.zeros(num_experts)
        for m in range(tokens):
            if not mask_GM[g, m]:
                continue
            real += 1
            exponentials = np.exp(logits_GME[g, m].astype(np.float64))
            p = exponentials / exponentials.sum()
            for e in expert_index_GMK[g, m, : top_k if counted == "all" else 1]:
                if e < num_experts:
                    asked[e] += 1
            mass += p
            sums["router_z"] += np.log(exponentials.sum()) ** 2
            sums["entropy"] -= sum(q * np.log(q) for q in p)
            sums["confidence"] += p.max()
            for k, e in enumerate(expert_index_GMK[g, m]):
                if e < num_experts:
                    sums["num_choices_K"][k] += 1
                    sums["num_dropped_K"][k] += not kept_GMK[g, m, k]
                    sums["tokens_per_expert_E"][e] += 1
                    importance[e] += gate_GMK[g, m, k]
        sums["num_tokens"] += real
        if real:
            sums["load_balance"] += real * num_experts * sum((asked / real) * (mass / real))
            sums["importance"] += real * (importance.std() / importance.mean()) ** 2
    return sums


@pytest.mark.parametrize(("top_k", "counted"), [(1, "first"), (2, "all"), (3, "first")])
def test_equals_loop(top_k, counted):
    logits_GME, mask_GM = random_example()
    mask_GM = mask_GM.at[1].set(False)  # a group of nothing but padding
    expert_index_GMK = jnp.argsort(-logits_GME, axis=-1)[..., :top_k]
    if top_k == 3:
        expert_index_GMK = expert_index_GMK.at[:, ::2, 1].set(5)  # not made
    rng = np.random.default_rng(8)
    gate_GMK = jnp.asarray(rng.random(expert_index_GMK.shape), jnp.float32)
    choice = Choice(expert_index_GMK=expert_index_GMK, gate_GMK=gate_GMK)
    routed = Routing(decision=choice, probs_GME=jax.nn.softmax(logits_GME))
    place = jax.jit(placement.place, static_argnames=("num_experts", "capacity"))
    slots = place(choice, mask_GM, num_experts=5, capacity=2)
    compute = jax.jit(router_stats, static_argnames="load_balance_choices")
    stats = compute(logits_GME, routed, slots, mask_GM, load_balance_choices=counted)
    arrays = (logits_GME, expert_index_GMK, gate_GMK, slots.kept_GMK, mask_GM)
    expected = stats_by_loop(*(np.asarray(array) for array in arrays), counted)
    assert expected["num_dropped_K"][0] > 0
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(stats, name), value, rtol=1e-5, err_msg=name)
    assert stats.logits is None


def test_load_balance_is_1_at_uniform_and_num_experts_at_collapse():
    num_experts, tokens = 5, 10
    everyone = jnp.ones((2, tokens), bool)
    # Uniform probabilities: 1 whatever the choices (here all ties, so all to expert 0).
    uniform = switch_stats(jnp.zeros((2, tokens, num_experts)), everyone, capacity=2)
    np.testing.assert_allclose(uniform.load_balance_loss, 1, rtol=1e-6)
    np.testing.assert_allclose(uniform.router_entropy, np.log(num_experts), rtol=1e-6)
    np.testing.assert_allclose(uniform.router_z_loss, np.log(num_experts) ** 2, rtol=1e-6)
    # Certain and balanced: 1.
    certain = 100 * jax.nn.one_hot(jnp.arange(tokens) % num_experts, num_experts)
    balanced = switch_stats(jnp.stack([certain] * 2), everyone, capacity=2)
    np.testing.assert_allclose(balanced.load_balance_loss, 1, rtol=1e-6)
    np.testing.assert_allclose(balanced.router_confidence, 1, rtol=1e-6)
    assert balanced.num_dropped_K == 0
    np.testing.assert_allclose(balanced.importance_loss, 0, atol=1e-6)
    np.testing.assert_allclose(balanced.max_violation, 0, atol=1e-6)
    # Certain, all to one: E.
    collapse = 100 * jax.nn.one_hot(jnp.full((2, tokens), 3), num_experts)
    collapsed = switch_stats(collapse, everyone, capacity=2)
    np.testing.assert_allclose(collapsed.load_balance_loss, num_experts, rtol=1e-6)
    np.testing.assert_allclose(collapsed.router_entropy, 0, atol=1e-6)
    assert collapsed.num_dropped_K == 2 * (tokens - 2)
    np.testing.assert_allclose(collapsed.importance_loss, num_experts - 1, rtol=1e-6)
    np.testing.assert_allclose(collapsed.max_violation, num_experts - 1, rtol=1e-6)


def test_gradient_of_load_balance_flows_through_the_probabilities_only():
    logits_GME, mask_GM = random_example()
    gradient_GME = jax.grad(lambda x: switch_stats(x, mask_GM, capacity=2).load_balance)(logits_GME)
    # With f fixed: d/dlogit_i of E Σ_e f_e p_e is E p_i (f_i - Σ_e f_e p_e).
    p_GME = jax.nn.softmax(logits_GME)
    first_GME = jax.nn.one_hot(jnp.argmax(logits_GME, -1), 5) * mask_GM[..., None]
    f_G1E = first_GME.sum(1, keepdims=True) / mask_GM.sum(1)[:, None, None]
    expected = 5 * p_GME * (f_G1E - (f_G1E * p_GME).sum(-1, keepdims=True)) * mask_GM[..., None]
    np.testing.assert_allclose(gradient_GME, expected, rtol=1e-4, atol=1e-6)
    assert np.abs(expected).max() > 0.1


def test_gradient_of_router_z():
    logits_GME, mask_GM = random_example()
    gradient_GME = jax.grad(lambda x: switch_stats(x, mask_GM, capacity=2).router_z)(logits_GME)
    # d/dlogit_i of z² is 2 z p_i.
    z_GM1 = jax.nn.logsumexp(logits_GME, axis=-1, keepdims=True)
    expected = 2 * z_GM1 * jax.nn.softmax(logits_GME) * mask_GM[..., None]
    np.testing.assert_allclose(gradient_GME, expected, rtol=1e-4, atol=1e-6)


def test_groups_add_up():
    logits_GME, mask_GM = random_example(groups=6)
    whole = switch_stats(logits_GME, mask_GM, capacity=2)
    halves = [switch_stats(logits_GME[g], mask_GM[g], capacity=2) for g in (slice(3), slice(3, 6))]
    total = jax.tree.map(jnp.add, *halves)
    for actual, expected in zip(jax.tree.leaves(total), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_padding_changes_nothing():
    logits_GME, _ = random_example()
    alone = switch_stats(logits_GME, jnp.ones((3, 11), bool), capacity=2)
    # Four tokens of padding in front of and among the others.
    where = [0, 3, 3, 8]
    padded = jnp.asarray(np.insert(logits_GME, where, 77.0, axis=1))
    mask_GM = jnp.asarray(np.insert(np.ones((3, 11), bool), where, False, axis=1))
    among = switch_stats(padded, mask_GM, capacity=2)
    for actual, expected in zip(jax.tree.leaves(among), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_nothing_but_padding_is_zero_with_zero_gradients():
    logits_GME, _ = random_example()
    nobody = jnp.zeros((3, 11), bool)

    def losses(logits_GME):
        stats = switch_stats(logits_GME, nobody, capacity=2)
        losses = stats.load_balance_loss + stats.router_z_loss + stats.importance_loss
        return losses, stats

    gradient_GME, stats = jax.grad(losses, has_aux=True)(logits_GME)
    assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(stats))
    np.testing.assert_array_equal(gradient_GME, np.zeros(logits_GME.shape))


def test_a_group_of_padding_has_no_importance_and_no_gradient_in_a_mixture():
    logits_GMS = random_example()[0]
    mask_GM = jnp.ones((3, 11), bool).at[1].set(False)

    def importance(logits_GMS):
        routed = routing.soft_moe(logits_GMS, mask_GM, num_experts=logits_GMS.shape[-1])
        return router_stats(logits_GMS, routed, routed.decision, mask_GM).importance_loss

    gradient_GMS = np.asarray(jax.grad(importance)(logits_GMS))
    assert np.all(np.isfinite(gradient_GMS)) and np.any(gradient_GMS[0] != 0)
    np.testing.assert_array_equal(gradient_GMS[1], 0)


def test_all_choices_of_k_experts_count_k_at_uniform():
    logits_GME = jnp.zeros((2, 10, 5))
    everyone = jnp.ones((2, 10), bool)
    routed = routing.top_k(logits_GME, 3)
    slots = placement.place(routed.decision, everyone, num_experts=5, capacity=10)
    stats = router_stats(logits_GME, routed, slots, everyone, load_balance_choices="all")
    np.testing.assert_allclose(stats.load_balance_loss, 3, rtol=1e-6)


def test_where_experts_choose_tokens_that_none_took_are_dropped():
    # Token 3 is padding. Both experts take tokens 0 and 1; token 2 goes without.
    odds_GME = jnp.asarray([[[3.0, 1], [2, 2], [1, 9], [1, 1]]])
    mask_GM = jnp.asarray([[True, True, True, False]])
    logits_GME = jnp.log(odds_GME).at[0, 2].set(jnp.log(jnp.asarray([0.1, 0.1])))
    probs_GME = jnp.asarray([[[0.75, 0.25], [0.5, 0.5], [0.1, 0.1], [0.5, 0.5]]])
    routed = routing.expert_choice(logits_GME, mask_GM, 2)
    routed = routed.replace(probs_GME=probs_GME)
    decision = routed.decision.replace(token_GEC=jnp.asarray([[[0, 1], [1, 0]]], jnp.int32))
    routed = routed.replace(decision=decision)
    stats = router_stats(logits_GME, routed, decision, mask_GM)
    assert stats.num_tokens == 3
    np.testing.assert_array_equal(stats.num_choices_K, [3])
    np.testing.assert_array_equal(stats.num_dropped_K, [1])
    np.testing.assert_array_equal(stats.tokens_per_expert_E, [2, 2])
    np.testing.assert_array_equal(stats.expert_load, [0.5, 0.5])


def test_mixtures_drop_nothing_and_load_by_weight():
    logits_GMS = jnp.log(jnp.asarray([[[1.0, 1, 2, 4], [1, 1, 1, 1], [5, 5, 5, 5]]]))
    mask_GM = jnp.asarray([[True, True, False]])
    routed = routing.soft_moe(logits_GMS, mask_GM, num_experts=2)
    stats = router_stats(logits_GMS, routed, routed.decision, mask_GM)
    assert stats.num_choices_K == 2 and stats.num_dropped_K == 0
    # Weights of slots: (1, 1, 2, 4) / 8 and 1/4 each; an expert has two slots.
    np.testing.assert_allclose(stats.tokens_per_expert_E, [0.25 + 0.5, 0.75 + 0.5], rtol=1e-6)
