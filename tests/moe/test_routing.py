"""Routing schemes: hand-worked cases, loops from the papers' equations, and what must hold."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from switchx.errors import UserError
from switchx.models.config import ModelConfig
from switchx.moe import placement, routing
from switchx.moe.assignment import Assignment, Choice, Mixture, Tokens
from switchx.moe.config import MoeConfig
from switchx.moe.layer import MoeLayer
from switchx.moe.routing import ROUTERS

G, M, E, K, C = 4, 11, 5, 3, 2
KEY = jax.random.key(0)


def log_odds(*groups):
    """Logits whose probabilities are these numbers divided by their sum over a token."""
    return jnp.log(jnp.asarray(groups, jnp.float32))


def everyone(logits_GME):
    return jnp.ones(logits_GME.shape[:2], bool)


def example(seed=0, experts=E, groups=G):
    """Random logits and a mask: a full group, one of nothing but padding, and others."""
    rng = np.random.default_rng(seed)
    logits_GME = 1.5 * rng.normal(size=(groups, M, experts)).astype(np.float32)
    mask_GM = rng.random((groups, M)) < 0.7
    mask_GM[0], mask_GM[1] = True, False
    return jnp.asarray(logits_GME), jnp.asarray(mask_GM)


def softmax(logits):
    exponentials = [np.exp(np.float64(logit)) for logit in logits]
    return [value / sum(exponentials) for value in exponentials]


def best(scores, k):
    """Indices of the k largest, the lowest index first among equals."""
    return sorted(range(len(scores)), key=lambda e: (-scores[e], e))[:k]


def chosen(scores, gates, k, renormalize=False):
    """Gates by expert of the k largest scores."""
    gates = {e: gates[e] for e in best(scores, k)}
    return {e: gate / sum(gates.values()) if renormalize else gate for e, gate in gates.items()}


def assert_choice(routed, experts, gates, rtol=1e-6):
    np.testing.assert_array_equal(routed.decision.expert_index_GMK, experts)
    np.testing.assert_allclose(routed.decision.gate_GMK, gates, rtol=rtol)


def assert_frequency(hits, probability, trials):
    error = 5 * np.sqrt(probability * (1 - probability) / trials)
    np.testing.assert_allclose(hits / trials, probability, atol=error)


class TestSwitch:
    def test_hand_worked(self):
        # Sums of exponentials 8, 4 and 10; the largest share is 5/8, 2/4 and 6/10.
        logits_GME = log_odds([[1, 2, 5], [2, 1, 1], [3, 6, 1]])
        routed = routing.switch(logits_GME)
        assert_choice(routed, [[[2], [0], [1]]], [[[0.625], [0.5], [0.6]]])
        np.testing.assert_allclose(routed.probs_GME[0, 0], [1 / 8, 2 / 8, 5 / 8], rtol=1e-6)
        assert routed.decision.expert_index_GMK.dtype == jnp.int32
        assert routed.decision.gate_GMK.dtype == jnp.float32

    def test_ties_go_to_the_lowest_index(self):
        logits_GME = jnp.asarray([[[1.0, 1, 1, 1], [0, 2, 2, 0], [0, 0, 0, 3], [-1, 0, 0, 0]]])
        choice = routing.switch(logits_GME).decision
        np.testing.assert_array_equal(choice.expert_index_GMK[0, :, 0], [0, 1, 3, 1])

    def test_gate_gradient_is_that_of_the_raw_probability(self):
        # p = (1/8, 1/4, 5/8): dp_2/dlogits = p_2 (onehot_2 - p) = 5/8 · (-1/8, -1/4, 3/8).
        logits_GME = log_odds([[1, 2, 5]])
        gradient = jax.grad(lambda logits: routing.switch(logits).decision.gate_GMK.sum())(
            logits_GME
        )
        np.testing.assert_allclose(gradient[0, 0], [-5 / 64, -10 / 64, 15 / 64], rtol=1e-6)

    def test_large_logits_overflow_nothing(self):
        choice = routing.switch(jnp.asarray([[[1e30, -1e30, 0.0], [-1e30, -1e30, -2e30]]])).decision
        np.testing.assert_array_equal(choice.expert_index_GMK[0, :, 0], [0, 0])
        np.testing.assert_array_equal(choice.gate_GMK[0, :, 0], [1, 0.5])


class TestTopK:
    # p = (1, 2, 5) / 8, (2, 1, 1) / 4 with a tie for the second place, (3, 6, 1) / 10.
    LOGITS_GME = log_odds([[1, 2, 5], [2, 1, 1], [3, 6, 1]])

    def test_hand_worked(self):
        experts = [[[2, 1], [0, 1], [1, 0]]]
        routed = routing.top_k(self.LOGITS_GME, 2)
        assert_choice(routed, experts, [[[5 / 8, 2 / 8], [1 / 2, 1 / 4], [0.6, 0.3]]])
        # Divided by their sums 7/8, 3/4 and 9/10.
        routed = routing.top_k(self.LOGITS_GME, 2, renormalize=True)
        assert_choice(routed, experts, [[[5 / 7, 2 / 7], [2 / 3, 1 / 3], [2 / 3, 1 / 3]]])

    def test_hand_worked_sample(self):
        # Logits so far apart that no noise changes their order; gates are p's, not the noise's.
        logits_GME = jnp.asarray([[[0.0, 300, 150]]])
        routed = routing.top_k(logits_GME, 2, rng=KEY)
        assert_choice(routed, [[[1, 2]]], [[[1, 0]]])
        # All three of three: whatever the order, the gates are each expert's.
        routed = routing.top_k(self.LOGITS_GME, 3, rng=KEY)
        order_MK = np.asarray(routed.decision.expert_index_GMK[0])
        assert all(set(order_K) == {0, 1, 2} for order_K in order_MK)
        probs_ME = np.asarray([[1 / 8, 2 / 8, 5 / 8], [1 / 2, 1 / 4, 1 / 4], [0.3, 0.6, 0.1]])
        expected_MK = np.take_along_axis(probs_ME, order_MK, axis=1)
        np.testing.assert_allclose(routed.decision.gate_GMK[0], expected_MK, rtol=1e-6)

    def test_samples_are_drawn_in_proportion_without_replacement(self):
        trials, p = 20_000, np.asarray([1, 2, 5]) / 8
        logits_GME = jnp.broadcast_to(log_odds([[1, 2, 5]]), (1, trials, 3))
        one_M = np.asarray(routing.top_k(logits_GME, 1, rng=KEY).decision.expert_index_GMK[0, :, 0])
        for e in range(3):
            assert_frequency(np.sum(one_M == e), p[e], trials)
        two = routing.top_k(logits_GME, 2, renormalize=True, rng=KEY).decision
        first_M, second_M = np.asarray(two.expert_index_GMK[0]).T
        assert np.all(first_M != second_M)
        for a, b in ((0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)):
            # a of all, then b of what is left; the gates are p's over the sum of the two.
            pair_M = (first_M == a) & (second_M == b)
            assert_frequency(np.sum(pair_M), p[a] * p[b] / (1 - p[a]), trials)
            expected = np.broadcast_to(p[[a, b]] / (p[a] + p[b]), (np.sum(pair_M), 2))
            np.testing.assert_allclose(two.gate_GMK[0][pair_M], expected, rtol=1e-5)


class TestGShard:
    # p = (5, 2, 1) / 8, (1, 8, 1) / 10 with a tie for the second place, (1, 2, 2) / 5.
    LOGITS_GME = log_odds([[5, 2, 1], [1, 8, 1], [1, 2, 2]])
    RAW = [[[5 / 8, 2 / 8], [0.8, 0.1], [0.4, 0.4]]]
    DIVIDED = [[[5 / 7, 2 / 7], [8 / 9, 1 / 9], [1 / 2, 1 / 2]]]

    @pytest.mark.parametrize("policy", ["all", "random", "sampling"])
    def test_hand_worked_in_evaluation(self, policy):
        experts = [[[0, 1], [1, 0], [1, 2]]]
        routed = routing.gshard(self.LOGITS_GME, policy=policy)
        assert_choice(routed, experts, self.DIVIDED)
        np.testing.assert_allclose(routed.probs_GME[0, 0], [5 / 8, 2 / 8, 1 / 8], rtol=1e-6)
        routed = routing.gshard(self.LOGITS_GME, policy=policy, renormalize=False)
        assert_choice(routed, experts, self.RAW)

    def test_hand_worked_threshold(self):
        # Of the divided 2/7, 1/9 and 1/2 the second is not over 0.2; 3 is no expert.
        routed = routing.gshard(self.LOGITS_GME, policy="threshold", threshold=0.2)
        assert_choice(routed, [[[0, 1], [1, 3], [1, 2]]], self.DIVIDED)
        # Of the raw 1/4, 1/10 and 2/5 the last only is over 0.26. The key does not matter.
        routed = routing.gshard(
            self.LOGITS_GME, policy="threshold", threshold=0.26, renormalize=False, rng=KEY
        )
        assert_choice(routed, [[[0, 3], [1, 3], [1, 2]]], self.RAW)

    def test_hand_worked_random(self):
        # Second gates 1/2 and 0: over the threshold of 1/2 that is always, and never.
        logits_GME = jnp.asarray([[[0.0, 0, -1e30], [-1e30, -1e30, 0]] * 50])
        routed = routing.gshard(logits_GME, policy="random", rng=KEY)
        assert_choice(routed, [[[0, 1], [2, 3]] * 50], [[[0.5, 0.5], [1, 0]] * 50])

    def test_hand_worked_sampling(self):
        # Of two experts the second is the one that is left; of three far apart the next best.
        routed = routing.gshard(log_odds([[1, 4], [7, 3]]), policy="sampling", rng=KEY)
        assert_choice(routed, [[[1, 0], [0, 1]]], [[[0.8, 0.2], [0.7, 0.3]]])
        logits_GME = jnp.asarray([[[0.0, 300, 150]]])
        routed = routing.gshard(logits_GME, policy="sampling", rng=KEY)
        assert_choice(routed, [[[1, 2]]], [[[1, 0]]])

    @pytest.mark.parametrize(
        ("odds", "threshold", "renormalize", "probability"),
        [
            ((5, 2, 1), 0.5, True, 4 / 7),  # GShard's 2 · 2/7
            ((5, 2, 1), 0.5, False, 1 / 2),  # 2 · 2/8
            ((4, 4, 1), 0.5, True, 1),
            ((8, 1, 1), 0.2, True, 5 / 9),  # ST-MoE's 5 · 1/9
            ((8, 1, 1), 0.2, False, 1 / 2),
        ],
    )
    def test_random_asks_the_second_as_often_as_its_gate_over_the_threshold(
        self, odds, threshold, renormalize, probability
    ):
        trials = 20_000
        logits_GME = jnp.broadcast_to(log_odds([odds]), (1, trials, 3))
        options = {"threshold": threshold, "renormalize": renormalize}
        routed = routing.gshard(logits_GME, policy="random", rng=KEY, **options)
        first_M, second_M = np.asarray(routed.decision.expert_index_GMK[0]).T
        assert np.all(first_M == 0)
        assert set(second_M) <= {1, 3}
        assert_frequency(np.sum(second_M == 1), probability, trials)
        # Gates are the same whether the second is asked or not.
        always = routing.gshard(logits_GME, policy="all", renormalize=renormalize)
        np.testing.assert_array_equal(routed.decision.gate_GMK, always.decision.gate_GMK)

    def test_sampling_draws_the_second_from_the_others(self):
        trials = 20_000
        logits_GME = jnp.broadcast_to(log_odds([[5, 2, 1]]), (1, trials, 3))
        routed = routing.gshard(logits_GME, policy="sampling", rng=KEY)
        first_M, second_M = np.asarray(routed.decision.expert_index_GMK[0]).T
        assert np.all(first_M == 0)
        assert set(second_M) == {1, 2}
        assert_frequency(np.sum(second_M == 1), 2 / 3, trials)
        # Gates: 5/7 and 2/7, or 5/6 and 1/6.
        gates_M2 = np.where(second_M[:, None] == 1, [[5 / 7, 2 / 7]], [[5 / 6, 1 / 6]])
        np.testing.assert_allclose(routed.decision.gate_GMK[0], gates_M2, rtol=1e-5)


class TestLossFree:
    def test_hand_worked_sigmoid(self):
        # Odds o have the sigmoid o / (1 + o): 1/2, 3/4, 1/4. With the bias 0.8, 0.75, 0.25.
        logits_GME, bias_E = log_odds([[1, 3, 1 / 3]]), jnp.asarray([0.3, 0, 0])
        routed = routing.loss_free(logits_GME, bias_E, 1, renormalize=False)
        assert_choice(routed, [[[0]]], [[[0.5]]])
        # Of 3/2 in all.
        np.testing.assert_allclose(routed.probs_GME, [[[1 / 3, 1 / 2, 1 / 6]]], rtol=1e-6)
        routed = routing.loss_free(logits_GME, bias_E, 2)
        assert_choice(routed, [[[0, 1]]], [[[2 / 5, 3 / 5]]])
        # Without a bias the other way round.
        routed = routing.loss_free(logits_GME, 0 * bias_E, 2)
        assert_choice(routed, [[[1, 0]]], [[[3 / 5, 2 / 5]]])

    def test_hand_worked_softmax(self):
        # p = (1, 2, 5) / 8; with the bias 0.125, 0.75, 0.625.
        logits_GME, bias_E = log_odds([[1, 2, 5]]), jnp.asarray([0, 0.5, 0])
        routed = routing.loss_free(logits_GME, bias_E, 2, score="softmax")
        assert_choice(routed, [[[1, 2]]], [[[2 / 7, 5 / 7]]])
        routed = routing.loss_free(logits_GME, bias_E, 2, score="softmax", renormalize=False)
        assert_choice(routed, [[[1, 2]]], [[[2 / 8, 5 / 8]]])
        np.testing.assert_allclose(routed.probs_GME, [[[1 / 8, 2 / 8, 5 / 8]]], rtol=1e-6)

    def test_no_gradient_reaches_the_bias(self):
        logits_GME, _ = example()
        for score in routing.SCORES:

            def total(bias_E, score=score):
                routed = routing.loss_free(logits_GME, bias_E, K, score=score)
                first_GM = routed.decision.gate_GMK[..., 0]
                return first_GM.sum() + jnp.square(routed.probs_GME).sum()

            np.testing.assert_array_equal(jax.grad(total)(jnp.zeros(E)), np.zeros(E))

    def test_scores_that_vanish_leave_finite_shares(self):
        # σ(-200) is 0 in float32.
        routed = routing.loss_free(jnp.full((1, 1, 3), -200.0), jnp.zeros(3), 2)
        assert np.all(np.isfinite(routed.decision.gate_GMK))
        assert np.all(np.isfinite(routed.probs_GME))

    def test_update_bias(self):
        # Means 2 and 3: over it down, under it up, at it nothing.
        loads = jnp.asarray([[4.0, 1, 1, 2], [3, 3, 3, 3]])
        bias = jnp.asarray([[0.0, 0, 1, 1], [0.5, 0, 0, 0]])
        expected = [[-0.25, 0.25, 1.25, 1], [0.5, 0, 0, 0]]
        np.testing.assert_array_equal(routing.update_bias(bias, loads, 0.25), expected)
        np.testing.assert_array_equal(routing.update_bias(bias[0], loads[0], 0.25), expected[0])

    def test_update_bias_balances(self):
        # One expert is everyone's favourite; after enough steps it is asked by no more than most.
        logits_GME = jnp.asarray(np.random.default_rng(0).normal(size=(1, 500, E)), jnp.float32)
        logits_GME = logits_GME.at[..., 0].add(3)

        def loads(bias_E):
            experts = routing.loss_free(logits_GME, bias_E, 1).decision.expert_index_GMK
            return jnp.sum(experts == jnp.arange(E)[None, None], axis=(0, 1), dtype=jnp.float32)

        start_E = jnp.zeros(E)
        end_E = jax.lax.fori_loop(
            0, 300, lambda _, bias: routing.update_bias(bias, loads(bias), 0.005), start_E
        )
        assert loads(start_E)[0] > 400
        assert np.all(np.abs(loads(end_E) - 100) < 20)


class TestHash:
    def test_hand_worked_balanced(self):
        # Shares 1, 1/2, 1/3, 1/4, 1/5, … of ids 0, 1, 2, …, each to the least loaded of three:
        # loads (1, .5, .33) → 3 to 2: .583 → 4 to 1: .7 → 5 to 2: .75 → 6 to 1: .843 → 7 to 2: .875
        # → 8 to 1: .954 → 9 to 2: .975 → 10 to 1: 1.045 → 11 to 2: 1.058 → 12 to 0.
        expected = [0, 1, 2, 2, 1, 2, 1, 2, 1, 2, 1, 2, 0]
        np.testing.assert_array_equal(routing.hash_table(3, 13, "balanced"), expected)
        routed = routing.hash_ids(
            jnp.asarray([[12, 4, 3], [0, 13, -1]]),  # one past the last, one before the first
            3,
            vocab_size=13,
            kind="balanced",
            dtype=jnp.dtype("float32"),
        )
        assert_choice(routed, [[[0], [1], [2]], [[0], [0], [0]]], np.ones((2, 3, 1)))
        np.testing.assert_array_equal(routed.probs_GME[0], [[1, 0, 0], [0, 1, 0], [0, 0, 1]])
        assert routed.probs_GME.dtype == routed.decision.gate_GMK.dtype == jnp.float32

    def test_hand_worked_random(self):
        # The published first numbers of splitmix64 with seeds 0 and 1.
        numbers = [0xE220A8397B1DCDAF, 0x910A2DEC89025CC1]
        for experts in (2, 3, 7, 64):
            table_V = routing.hash_table(experts, 2, "random")
            np.testing.assert_array_equal(table_V, [number % experts for number in numbers])

    @pytest.mark.parametrize("kind", routing.HASHES)
    def test_equals_loop(self, kind):
        vocab_size = 997
        loads, expected = [0.0] * E, []
        for token in range(vocab_size):
            if kind == "balanced":
                expected.append(loads.index(min(loads)))
                loads[expected[-1]] += 1 / (token + 1)
                continue
            z = (token + 0x9E3779B97F4A7C15) % 2**64
            z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
            z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
            expected.append((z ^ (z >> 31)) % E)
        np.testing.assert_array_equal(routing.hash_table(E, vocab_size, kind), expected)
        ids_GM = np.random.default_rng(0).integers(0, vocab_size, size=(G, M))
        routed = routing.hash_ids(
            jnp.asarray(ids_GM), E, vocab_size=vocab_size, kind=kind, dtype=jnp.dtype("float32")
        )
        assert_choice(routed, np.asarray(expected)[ids_GM][..., None], np.ones((G, M, 1)))
        np.testing.assert_array_equal(np.argmax(routed.probs_GME, -1), np.asarray(expected)[ids_GM])

    def test_loads(self):
        share_V = 1 / np.arange(1, 32001)
        balanced_E = np.bincount(routing.hash_table(8, 32000, "balanced"), share_V)
        # No expert has more than the mean and one id, the first of which is 1 of 11.
        np.testing.assert_allclose(balanced_E, np.mean(balanced_E), rtol=1e-3)
        table_V = routing.hash_table(8, 32000, "random")
        for e in range(8):
            assert_frequency(np.sum(table_V == e), 1 / 8, 32000)


class TestSentence:
    def test_hand_worked(self):
        # The mean of logarithms is that of the geometric mean.
        # Sequence 0: √(1·1), √(4·1), √(1·16) = (1, 2, 4). Sequence 3: √(9·1), 1, 1 without padding.
        logits_GME = log_odds([[1, 4, 1], [9, 1, 1], [1, 1, 16], [1, 1, 1], [1, 1, 1e6]])
        sequence_GM = jnp.asarray([[0, 3, 0, 3, 3]])
        mask_GM = jnp.asarray([[True, True, True, True, False]])
        route = functools.partial(routing.sentence, logits_GME, sequence_GM, mask_GM)
        routed = route(1, renormalize=False)
        gates = [4 / 7, 3 / 5, 4 / 7, 3 / 5, 3 / 5]
        assert_choice(routed, [[[2], [0], [2], [0], [0]]], np.asarray([gates])[..., None])
        routed = route(2, renormalize=True)
        assert_choice(
            routed,
            [[[2, 1], [0, 1], [2, 1], [0, 1], [0, 1]]],
            [[[2 / 3, 1 / 3], [3 / 4, 1 / 4], [2 / 3, 1 / 3], [3 / 4, 1 / 4], [3 / 4, 1 / 4]]],
            rtol=1e-5,
        )


class TestNoTokenLeftBehind:
    # Preferences 0 1 2, 0 1 2, 1 2 0, 0 1 2.
    LOGITS_GME = log_odds([[6, 3, 1], [5, 4, 1], [1, 6, 3], [5, 3, 2]])

    @pytest.mark.parametrize(
        ("passes", "experts"),
        [
            (1, [0, 0, 1, 0]),  # tokens 1 and 3 are left behind
            (2, [0, 0, 1, 0]),  # and find 1 full: token 2 had it in the first pass
            (3, [0, 2, 1, 0]),  # token 1 has the last slot
            (9, [0, 2, 1, 0]),  # there is no fourth expert
        ],
    )
    def test_hand_worked(self, passes, experts):
        routed = routing.no_token_left_behind(
            self.LOGITS_GME, everyone(self.LOGITS_GME), 1, passes=passes
        )
        probs_ME = np.asarray([[6, 3, 1], [5, 4, 1], [1, 6, 3], [5, 3, 2]]) / 10
        gates = probs_ME[range(4), experts]
        assert_choice(routed, [[[e] for e in experts]], [[[gate] for gate in gates]])
        np.testing.assert_allclose(routed.probs_GME, [probs_ME], rtol=1e-6)

    def test_padding_takes_nothing(self):
        # Without token 0, token 1 has expert 0 and token 3 expert 2.
        mask_GM = jnp.asarray([[False, True, True, True]])
        routed = routing.no_token_left_behind(self.LOGITS_GME, mask_GM, 1, passes=3)
        np.testing.assert_array_equal(routed.decision.expert_index_GMK[0, 1:, 0], [0, 1, 2])

    @pytest.mark.parametrize(("capacity", "passes"), [(1, 1), (1, 9), (2, 2), (3, 4), (M, 2)])
    def test_equals_loop_and_placement_keeps_who_found_a_slot(self, capacity, passes):
        logits_GME, mask_GM = example()
        logits_GME -= jnp.arange(E)[None, None]  # the first experts overflow
        route = jax.jit(routing.no_token_left_behind, static_argnames=("capacity", "passes"))
        routed = route(logits_GME, mask_GM, capacity=capacity, passes=passes)
        taken, free, tokens = {}, np.full((G, E), capacity), np.argwhere(mask_GM)
        for rank in range(min(passes, E)):
            for g, m in tokens:
                e = best(logits_GME[g, m], E)[rank]
                if (g, m) not in taken and free[g, e]:
                    taken[g, m] = e
                    free[g, e] -= 1
        for g, m in tokens:
            p = softmax(logits_GME[g, m])
            e = taken.get((g, m), best(p, 1)[0])
            assert routed.decision.expert_index_GMK[g, m, 0] == e
            np.testing.assert_allclose(routed.decision.gate_GMK[g, m, 0], p[e], rtol=2e-5)
        for priority in ("choice", "token"):
            options = {"num_experts": E, "capacity": capacity, "priority": priority}
            kept_GMK = placement.place(routed.decision, mask_GM, **options).kept_GMK
            assert {(g, m) for g, m, _ in np.argwhere(kept_GMK)} == set(taken)


class TestSinkhorn:
    def test_hand_worked(self):
        # Columns of (4, 1), (2, 1) sum to 6 and 2: (2/3, 1/2), (1/3, 1/2). Rows of that:
        # (4/7, 3/7), (2/5, 3/5). The gates are the softmax's: 4/5 and 1/3.
        logits_GME = log_odds([[4, 1], [2, 1], [1000, 1000]])
        mask_GM = jnp.asarray([[True, True, False]])
        routed = routing.sinkhorn(logits_GME, mask_GM, train=True, iterations=1)
        np.testing.assert_array_equal(routed.decision.expert_index_GMK[0, :2], [[0], [1]])
        np.testing.assert_allclose(routed.decision.gate_GMK[0, :2], [[4 / 5], [1 / 3]], rtol=1e-6)
        np.testing.assert_allclose(routed.probs_GME[0, 1], [2 / 3, 1 / 3], rtol=1e-6)
        routed = routing.sinkhorn(logits_GME, mask_GM, train=False, iterations=1)
        assert_choice(routed, [[[0], [0], [0]]], [[[4 / 5], [2 / 3], [1 / 2]]])


balanced_assignment = jax.jit(routing.balanced_assignment)


class TestBase:
    # In units of ln 2: (3, 2), (4, 1). Best each: 0 and 0; best in balance: 1 and 0 with 2 + 4,
    # not 0 and 1 with 3 + 1. Odds o have the sigmoid o / (1 + o).
    LOGITS_GME = log_odds([[8, 4], [16, 2]])

    def test_hand_worked(self):
        mask_GM = everyone(self.LOGITS_GME)
        routed = routing.base(self.LOGITS_GME, mask_GM, train=True)
        assert_choice(routed, [[[1], [0]]], [[[4 / 5], [16 / 17]]])
        np.testing.assert_allclose(routed.probs_GME, [[[2 / 3, 1 / 3], [8 / 9, 1 / 9]]], rtol=1e-6)
        routed = routing.base(self.LOGITS_GME, mask_GM, train=False)
        assert_choice(routed, [[[0], [0]]], [[[8 / 9], [16 / 17]]])

    def test_hand_worked_assignment(self):
        # Tokens prefer expert 0 by 8, 6, 4, 2 and 9. It may have 3 of the 5: 9, 8 and 6; 2 of 4 if
        # the last is padding: 8 and 6. The only expert has all.
        scores_ME = jnp.asarray([[8.0, 0], [6, 0], [4, 0], [2, 0], [9, 0]])
        everyone_M = jnp.ones(5, bool)
        np.testing.assert_array_equal(balanced_assignment(scores_ME, everyone_M), [0, 0, 1, 1, 0])
        mask_M = jnp.asarray([True, True, True, True, False])
        np.testing.assert_array_equal(balanced_assignment(scores_ME, mask_M), [0, 0, 1, 1, 2])
        np.testing.assert_array_equal(
            balanced_assignment(scores_ME[:, :1], mask_M), [0, 0, 0, 0, 1]
        )

    def test_training_is_the_assignment_of_every_group(self):
        logits_GME, mask_GM = example()
        routed = jax.jit(functools.partial(routing.base, train=True))(logits_GME, mask_GM)
        for g in range(G):
            expected_M = balanced_assignment(logits_GME[g], mask_GM[g])
            np.testing.assert_array_equal(routed.decision.expert_index_GMK[g, :, 0], expected_M)
        for g, m in np.argwhere(mask_GM):
            e = routed.decision.expert_index_GMK[g, m, 0]
            gate = 1 / (1 + np.exp(-np.float64(logits_GME[g, m, e])))
            np.testing.assert_allclose(routed.decision.gate_GMK[g, m, 0], gate, rtol=1e-5)

    @pytest.mark.parametrize("experts", [1, 2, 5, 7])
    @pytest.mark.parametrize("kind", ["plain", "wide", "narrow", "skewed", "equal", "shifted"])
    def test_assignment_is_near_scipys(self, experts, kind):
        # Problems of 0, 1, … 23 real tokens.
        rng, tokens = np.random.default_rng(0), 23
        scores_PME = rng.normal(size=(tokens + 1, tokens, experts))
        scores_PME *= {"wide": 1e3, "narrow": 1e-3, "equal": 0}.get(kind, 1)
        scores_PME += {"skewed": -3.0 * np.arange(experts), "shifted": 1000}.get(kind, 0)
        mask_PM = rng.permuted(np.tri(tokens + 1, tokens, -1, dtype=bool), axis=1)
        scores_PME = jnp.asarray(scores_PME, jnp.float32)
        experts_PM = jax.jit(jax.vmap(routing.balanced_assignment))(scores_PME, mask_PM)
        assert experts_PM.dtype == jnp.int32
        for n in range(tokens + 1):
            mask_M, experts_M = mask_PM[n], np.asarray(experts_PM[n])
            np.testing.assert_array_equal(experts_M[~mask_M], experts)
            assert np.all(experts_M[mask_M] < experts)
            capacity = -(-n // experts)
            assert np.all(np.bincount(experts_M[mask_M], minlength=experts) <= capacity)
            if n:
                real_NE = np.float64(scores_PME[n, mask_M])
                slots_NS = np.repeat(real_NE, capacity, axis=1)
                optimum = slots_NS[linear_sum_assignment(slots_NS, maximize=True)].sum()
                total = real_NE[range(n), experts_M[mask_M]].sum()
                epsilon = np.ptp(real_NE) / 64 + 1e-6
                assert optimum - n * epsilon - 1e-5 <= total <= optimum + 1e-5


class TestExpertChoice:
    # p of expert 0: 1/4, 1/2, 3/4, 4/5; of expert 1: 3/4, 1/2, 1/4, 1/5.
    LOGITS_GME = log_odds([[1, 3], [1, 1], [3, 1], [4, 1]])

    def test_hand_worked(self):
        routed = routing.expert_choice(self.LOGITS_GME, everyone(self.LOGITS_GME), 2)
        np.testing.assert_array_equal(routed.decision.token_GEC, [[[3, 2], [0, 1]]])
        np.testing.assert_allclose(
            routed.decision.gate_GEC, [[[0.8, 0.75], [0.75, 0.5]]], rtol=1e-6
        )
        np.testing.assert_allclose(routed.probs_GME[0, 3], [0.8, 0.2], rtol=1e-6)
        assert routed.decision.slot_GMK is None
        assert routed.decision.token_GEC.dtype == jnp.int32

    def test_padding_leaves_slots_empty(self):
        mask_GM = jnp.asarray([[True, False, False, True]])
        routed = routing.expert_choice(self.LOGITS_GME, mask_GM, 3)
        np.testing.assert_array_equal(routed.decision.token_GEC, [[[3, 0, 4], [0, 3, 4]]])
        np.testing.assert_allclose(
            routed.decision.gate_GEC, [[[0.8, 0.25, 0], [0.75, 0.2, 0]]], rtol=1e-6
        )


class TestSoftMoe:
    def test_hand_worked(self):
        # Two experts of two slots. Columns: 1 of 4, 2 of 4, 3 of 4, 4 of 8; rows: all of 10.
        logits_GMS = log_odds([[1, 2, 3, 4], [3, 2, 1, 4], [9, 9, 9, 1]])
        mask_GM = jnp.asarray([[True, True, False]])
        routed = routing.soft_moe(logits_GMS, mask_GM, 2)
        dispatch = [[[1 / 4, 1 / 2], [3 / 4, 1 / 2]], [[3 / 4, 1 / 2], [1 / 4, 1 / 2]]]
        combine = [[[0.1, 0.2], [0.3, 0.4]], [[0.3, 0.2], [0.1, 0.4]]]
        padding = [[[0, 0], [0, 0]]]
        np.testing.assert_allclose(routed.decision.dispatch_GMEC, [dispatch + padding], rtol=1e-6)
        np.testing.assert_allclose(routed.decision.combine_GMEC, [combine + padding], rtol=1e-6)
        np.testing.assert_allclose(routed.probs_GME[0, :2], [[0.3, 0.7], [0.5, 0.5]], rtol=1e-6)


# Loops, and what holds of every scheme ----------------------------------------------------------

SEQUENCE_GM = jnp.asarray(np.sort(np.random.default_rng(2).integers(0, 3, size=(G, M)), axis=1))
BIAS_E = jnp.asarray(0.3 * np.random.default_rng(3).normal(size=E), jnp.float32)

# Scheme and variant → routing of logits, mask, sequences and the bias of each expert.
ROUTES = {
    "switch": lambda l, m, s, b: routing.switch(l),
    "top_k": lambda l, m, s, b: routing.top_k(l, K),
    "top_k-renormalized": lambda l, m, s, b: routing.top_k(l, K, renormalize=True),
    "top_k-sampled": lambda l, m, s, b: routing.top_k(l, K, rng=KEY),
    "gshard-all": lambda l, m, s, b: routing.gshard(l, policy="all"),
    "gshard-random": lambda l, m, s, b: routing.gshard(l, policy="random", rng=KEY),
    "gshard-threshold": lambda l, m, s, b: routing.gshard(l, policy="threshold", threshold=0.2),
    "gshard-raw": lambda l, m, s, b: routing.gshard(
        l, policy="threshold", threshold=0.2, renormalize=False
    ),
    "gshard-sampling": lambda l, m, s, b: routing.gshard(l, policy="sampling", rng=KEY),
    "loss_free": lambda l, m, s, b: routing.loss_free(l, b, K),
    "loss_free-raw": lambda l, m, s, b: routing.loss_free(l, b, K, renormalize=False),
    "loss_free-softmax": lambda l, m, s, b: routing.loss_free(l, b, K, score="softmax"),
    "sentence": lambda l, m, s, b: routing.sentence(l, s, m, K, renormalize=False),
    "sentence-renormalized": lambda l, m, s, b: routing.sentence(l, s, m, K, renormalize=True),
    "no_token_left_behind": lambda l, m, s, b: routing.no_token_left_behind(l, m, C, passes=4),
    "sinkhorn": lambda l, m, s, b: routing.sinkhorn(l, m, train=True, iterations=8),
    "sinkhorn-evaluation": lambda l, m, s, b: routing.sinkhorn(l, m, train=False, iterations=8),
    "base": lambda l, m, s, b: routing.base(l, m, train=True),
    "base-evaluation": lambda l, m, s, b: routing.base(l, m, train=False),
    "expert_choice": lambda l, m, s, b: routing.expert_choice(l, m, C),
    "expert_choice-everybody": lambda l, m, s, b: routing.expert_choice(l, m, M),
    "soft_moe": lambda l, m, s, b: routing.soft_moe(l, m, E),
}
RANDOM = ("top_k-sampled", "gshard-random", "gshard-sampling")


def dense(routed, num_tokens, num_experts):
    """The weights of every expert (or slot) for every token, whatever kind the decision is."""
    decision = routed.decision
    if isinstance(decision, Mixture):
        return jnp.stack([decision.dispatch_GMEC, decision.combine_GMEC], axis=-1)
    if isinstance(decision, Assignment):
        gate_GECM = decision.gate_GEC[..., None] * jax.nn.one_hot(decision.token_GEC, num_tokens)
        return gate_GECM.sum(axis=2).swapaxes(1, 2)
    hot_GMKE = jax.nn.one_hot(decision.expert_index_GMK, num_experts)
    return jnp.einsum("gmk,gmke->gme", decision.gate_GMK, hot_GMKE)


@functools.partial(jax.jit, static_argnames="name")
def weights(name, logits_GME, mask_GM, sequence_GM=SEQUENCE_GM, bias_E=BIAS_E):
    """Dense weights and probabilities of real tokens; 0 for padding."""
    routed = ROUTES[name](logits_GME, mask_GM, sequence_GM, bias_E)
    weight = dense(routed, M, E)
    mask = mask_GM.reshape(G, M, *[1] * (weight.ndim - 2))
    return weight * mask, routed.probs_GME * mask_GM[..., None]


def example_of(name):
    return example(seed=7, experts=E * C if name == "soft_moe" else E)


def token_after_token(choose):
    """A loop of schemes where a token looks at itself only."""
    return lambda logits_NE, _: [choose(logits_E) for logits_E in logits_NE]


def gshard_by_loop(threshold, renormalize):
    def choose(logits_E):
        (one, p), (two, q) = chosen(softmax(logits_E), softmax(logits_E), 2, renormalize).items()
        return {one: p, two: q} if q > threshold else {one: p}

    return token_after_token(choose)


def loss_free_by_loop(score, renormalize):
    def choose(logits_E):
        s = score(logits_E)
        biased = [value + bias for value, bias in zip(s, BIAS_E, strict=True)]
        return chosen(biased, s, K, renormalize)

    return token_after_token(choose)


def sigmoid(logits):
    return [1 / (1 + np.exp(-logit)) for logit in logits]


def sentence_by_loop(renormalize):
    def choose(logits_NE, sequence_N):
        means = [softmax(logits_NE[sequence_N == s].mean(axis=0)) for s in sequence_N]
        return [chosen(p, p, K, renormalize) for p in means]

    return choose


def sinkhorn_by_loop(logits_NE, _):
    plan_NE = np.exp(logits_NE)
    for _ in range(8):
        for e in range(E):
            plan_NE[:, e] *= len(plan_NE) / E / sum(plan_NE[:, e])
        for n in range(len(plan_NE)):
            plan_NE[n] *= 1 / sum(plan_NE[n])
    pairs = zip(plan_NE, logits_NE, strict=True)
    return [chosen(plan_E, softmax(logits_E), 1) for plan_E, logits_E in pairs]


def expert_choice_by_loop(capacity):
    def choose(logits_NE, _):
        p_NE = np.asarray([softmax(logits_E) for logits_E in logits_NE])
        taken = [{} for _ in p_NE]
        for e in range(E):
            for n in best(p_NE[:, e], capacity):
                taken[n][e] = p_NE[n, e]
        return taken

    return choose


def soft_moe_by_loop(logits_NS, _):
    weight_NECW = np.zeros((len(logits_NS), E, C, 2))
    for n, logits_S in enumerate(logits_NS):
        for s, logit in enumerate(logits_S):
            over_tokens, over_slots = sum(np.exp(logits_NS[:, s])), sum(np.exp(logits_S))
            weight_NECW[n, s // C, s % C] = np.exp(logit) / over_tokens, np.exp(logit) / over_slots
    return [dict(enumerate(weight_ECW)) for weight_ECW in weight_NECW]


# Logits and sequences of a group's n real tokens, in float64 → for each the weights by expert.
LOOPS = {
    "switch": token_after_token(lambda l: chosen(l, softmax(l), 1)),
    "top_k": token_after_token(lambda l: chosen(l, softmax(l), K)),
    "top_k-renormalized": token_after_token(lambda l: chosen(l, softmax(l), K, True)),
    "gshard-all": gshard_by_loop(threshold=-1, renormalize=True),
    "gshard-threshold": gshard_by_loop(threshold=0.2, renormalize=True),
    "gshard-raw": gshard_by_loop(threshold=0.2, renormalize=False),
    "loss_free": loss_free_by_loop(sigmoid, renormalize=True),
    "loss_free-raw": loss_free_by_loop(sigmoid, renormalize=False),
    "loss_free-softmax": loss_free_by_loop(softmax, renormalize=True),
    "sentence": sentence_by_loop(renormalize=False),
    "sentence-renormalized": sentence_by_loop(renormalize=True),
    "sinkhorn": sinkhorn_by_loop,
    "sinkhorn-evaluation": token_after_token(lambda l: chosen(l, softmax(l), 1)),
    "base-evaluation": token_after_token(lambda l: chosen(l, sigmoid(l), 1)),
    "expert_choice": expert_choice_by_loop(C),
    "expert_choice-everybody": expert_choice_by_loop(M),
    "soft_moe": soft_moe_by_loop,
}


@pytest.mark.parametrize("name", LOOPS)
def test_equals_loop(name):
    logits_GME, mask_GM = example_of(name)
    actual, probs_GME = weights(name, logits_GME, mask_GM)
    expected = np.zeros(actual.shape)
    for g in range(G):
        real = np.flatnonzero(mask_GM[g])
        logits_NE = np.asarray(logits_GME, np.float64)[g, real]
        loop = LOOPS[name](logits_NE, np.asarray(SEQUENCE_GM)[g, real]) if len(real) else []
        for m, gates in zip(real, loop, strict=True):
            for e, gate in gates.items():
                expected[g, m, e] = gate
            if name not in ("loss_free", "loss_free-raw", "sentence", "sentence-renormalized"):
                p_E = np.reshape(softmax(np.float64(logits_GME[g, m])), (E, -1)).sum(axis=-1)
                np.testing.assert_allclose(probs_GME[g, m], p_E, rtol=2e-5)
    np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=1e-9)
    assert np.any(expected[2:] > 0)


@pytest.mark.parametrize("name", [name for name in ROUTES if name not in RANDOM])
def test_permuted_experts_are_permuted_weights(name):
    logits_GME, mask_GM = example_of(name)
    order_E = np.random.default_rng(1).permutation(E)
    slots_GMEC = logits_GME.reshape(G, M, E, -1)
    permuted_GME = slots_GMEC[:, :, order_E].reshape(logits_GME.shape)
    expected = weights(name, logits_GME, mask_GM)
    actual = weights(name, permuted_GME, mask_GM, bias_E=BIAS_E[order_E])
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(one, other[:, :, order_E], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ROUTES)
def test_logits_of_padding_change_nothing(name):
    logits_GME, mask_GM = example_of(name)
    noise_GME = 100 * np.random.default_rng(1).normal(size=logits_GME.shape).astype(np.float32)
    noisy_GME = jnp.where(mask_GM[..., None], logits_GME, noise_GME)
    expected = weights(name, logits_GME, mask_GM)
    for one, other in zip(weights(name, noisy_GME, mask_GM), expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)
        assert np.any(other != 0)


@pytest.mark.parametrize("name", ROUTES)
def test_experts_are_distinct_and_weights_in_0_1(name):
    logits_GME, mask_GM = example_of(name)
    routed = ROUTES[name](logits_GME, mask_GM, SEQUENCE_GM, BIAS_E)
    np.testing.assert_allclose(routed.probs_GME.sum(-1), 1, rtol=1e-5)
    gates = [leaf for leaf in jax.tree.leaves(routed.decision) if leaf.dtype == jnp.float32]
    assert gates and all(np.all((gate >= 0) & (gate <= 1)) for gate in gates)
    if isinstance(routed.decision, Choice):
        experts = np.asarray(routed.decision.expert_index_GMK)
        skips = name in ("gshard-random", "gshard-threshold", "gshard-raw", "base")
        assert experts.dtype == np.int32
        assert experts.min() >= 0
        assert experts.max() == E if skips else experts.max() < E
        assert all(len(set(token)) == len(token) for token in experts.reshape(G * M, -1))


@pytest.mark.parametrize("name", ROUTES)
def test_nothing_but_padding_has_no_gradient(name):
    # Group 1 of the example has no real token.
    logits_GME, mask_GM = example_of(name)

    def total(logits_GME, bias_E):
        weight, probs_GME = weights(name, logits_GME, mask_GM, bias_E=bias_E)
        return jnp.square(weight).sum() + jnp.square(probs_GME).sum()

    value, gradients = jax.value_and_grad(total, argnums=(0, 1))(logits_GME, BIAS_E)
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradients[0])) and np.any(gradients[0] != 0)
    np.testing.assert_array_equal(gradients[0][1], np.zeros(logits_GME.shape[1:]))
    np.testing.assert_array_equal(gradients[1], np.zeros(E))  # of any scheme, loss_free or not


@pytest.mark.parametrize("name", ROUTES)
def test_gradient_of_the_gates_equals_finite_differences(name):
    with jax.enable_x64(True):
        rng = np.random.default_rng(4)
        logits_GME = rng.normal(size=(1, 4, 6 if name == "soft_moe" else 3))
        factors = jnp.asarray(rng.normal(size=100))
        mask_GM, sequence_GM = jnp.asarray([[True, True, False, True]]), jnp.asarray([[0, 0, 0, 1]])
        soft = {"soft_moe": lambda l, m, s, b: routing.soft_moe(l, m, 3)}
        everybody = {"expert_choice-everybody": lambda l, m, s, b: routing.expert_choice(l, m, 4)}
        route = (soft | everybody).get(name, ROUTES[name])

        def total(logits_GME):
            decision = route(logits_GME, mask_GM, sequence_GM, jnp.asarray([0.3, 0, -0.3])).decision
            leaves = jax.tree.leaves(decision)
            gates = [leaf.reshape(-1) for leaf in leaves if leaf.dtype == jnp.float64]
            choices = [leaf for leaf in leaves if leaf.dtype == jnp.int32]
            gate = jnp.concatenate(gates)
            return jnp.sum(gate * factors[: gate.size]), choices

        gradient, choices = jax.jit(jax.grad(total, has_aux=True))(jnp.asarray(logits_GME))
        step, size = 1e-6, logits_GME.size
        steps = step * np.eye(size).reshape(size, *logits_GME.shape)
        nearby = jnp.asarray(logits_GME + np.concatenate([steps, -steps]))
        totals, nearby_choices = jax.jit(jax.vmap(total))(nearby)
        for here, there in zip(choices, nearby_choices, strict=True):
            np.testing.assert_array_equal(there, np.broadcast_to(here, there.shape))
        expected = ((totals[:size] - totals[size:]) / (2 * step)).reshape(logits_GME.shape)
        np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-8)
        assert np.abs(expected).max() > 1e-2


# Through the layer ------------------------------------------------------------------------------

B, T, D, F, VOCAB, TASKS = 2, 7, 6, 8, 31, 3

CONFIGS = {
    "switch": {},
    "top_k": {"top_k": 2},
    "gshard": {},
    "cosine": {"top_k": 2, "cosine_dim": 4},
    "loss_free": {"top_k": 2},
    "hash": {},
    "task": {"top_k": 2, "num_tasks": TASKS},
    "sentence": {"top_k": 2},
    "no_token_left_behind": {},
    "sinkhorn": {},
    "base": {},
    "expert_choice": {},
    "soft_moe": {"expert_capacity": 2},
}
CAUSAL = [name for name, scheme in ROUTERS.items() if scheme.causal]
LOOKING_AHEAD = [name for name, scheme in ROUTERS.items() if not scheme.causal]


def make_layer(router, train=False, factor=float(E), **options):
    """One row per group, and room for everybody unless `factor` says otherwise."""
    if router != "soft_moe":
        options |= {"capacity_factor": factor, "eval_capacity_factor": factor, "min_capacity": 0}
    options = {"jitter_noise": 0.0, "group_size": "row"} | CONFIGS[router] | options
    config = MoeConfig(num_experts=E, router=router, **options)
    modes = {"vocab_size": VOCAB, "train": train, "capture_router": True}
    return MoeLayer(config, F, ("gelu",), init_scale=1.0, **modes)


def layer_inputs(seed=0):
    """States and everything that is known of tokens; some of them are padding."""
    rng = np.random.default_rng(seed)
    x_BTD = jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32)
    tokens = Tokens(
        mask=jnp.asarray([[True] * T, [True, True, False, True, True, True, False]]),
        ids=jnp.asarray(rng.integers(0, VOCAB, size=(B, T))),
        sequence=jnp.asarray([[1, 1, 1, 1, 1, 2, 2], [2, 2, 2, 3, 3, 3, 3]]),
        task_ids=jnp.asarray(rng.integers(0, TASKS, size=(B, T))),
    )
    return x_BTD, tokens


def replaced(x_BTD, tokens, where_BT, seed=9):
    """Other states, ids and tasks of some tokens; masks and sequences stay."""
    other_BTD, other = layer_inputs(seed)
    ids = jnp.where(where_BT, other.ids, tokens.ids)
    task_ids = jnp.where(where_BT, other.task_ids, tokens.task_ids)
    changed_BTD = jnp.where(where_BT[..., None], other_BTD, x_BTD)
    return changed_BTD, tokens.replace(ids=ids, task_ids=task_ids)


def random_params(layer):
    """Parameters of the layer's shapes, drawn by NumPy, with lively routers."""
    rngs = {"params": KEY, "jitter": KEY}
    shapes = jax.eval_shape(layer.init, rngs, *layer_inputs())["params"]
    rng = np.random.default_rng(5)

    def draw(leaf):
        fan_in = leaf.shape[-2] if leaf.ndim > 1 else 1
        return jnp.asarray(rng.normal(0, fan_in**-0.5, leaf.shape), jnp.float32)

    return jax.tree.map(draw, nn.unbox(shapes))


@functools.partial(jax.jit, static_argnums=0)
def apply(layer, params, x_BTD, tokens, seed=0):
    rngs = {"jitter": jax.random.key(seed)} if layer.train else None
    return layer.apply({"params": params}, x_BTD, tokens, rngs=rngs)


def test_every_scheme_is_here():
    assert set(CONFIGS) == set(ROUTERS)
    assert {name.split("-")[0] for name in ROUTES} | {"cosine", "hash", "task"} == set(ROUTERS)


def test_task_by_hand():
    # p = (1, 2, 5, 1, 1) / 10, (6, 1, 1, 1, 3) / 12 and a tie, which goes to experts 0 and 1.
    layer = make_layer("task")
    x_BTD, tokens = layer_inputs()
    tokens = tokens.replace(task_ids=jnp.asarray([[0, 1, 2, 0, 1, 0, 0], [1] * T]))
    params = random_params(layer)
    table_NE = log_odds([[1, 2, 5, 1, 1], [6, 1, 1, 1, 3], [1] * E])[0]
    _, stats = apply(layer, params | {"router": {"embedding": table_NE}}, x_BTD, tokens)
    a, b, c = [2, 1], [0, 4], [0, 1]
    np.testing.assert_array_equal(stats.expert_index, [[a, b, c, a, b, a, a], [b] * T])
    p, q, r = [0.5, 0.2], [0.5, 0.25], [0.2, 0.2]
    np.testing.assert_allclose(stats.gate, [[p, q, r, p, q, p, p], [q] * T], rtol=1e-6)


@pytest.mark.parametrize("name", ROUTERS)
def test_every_token_says_where_it_goes(name):
    layer = make_layer(name, factor=1.0)
    x_BTD, tokens = layer_inputs()
    _, stats = apply(layer, random_params(layer), x_BTD, tokens)
    mask_BT = np.asarray(tokens.mask)
    entropy_BT = -np.sum(jax.scipy.special.xlogy(stats.probs, stats.probs), axis=-1)
    np.testing.assert_allclose(entropy_BT[mask_BT].sum(), stats.entropy, rtol=1e-5, atol=1e-6)
    confidence_BT = np.max(stats.probs, axis=-1)
    np.testing.assert_allclose(confidence_BT[mask_BT].sum(), stats.confidence, rtol=1e-5)
    weight_BTK = np.asarray(stats.gate) if name == "soft_moe" else np.ones(stats.gate.shape)
    load_E = np.zeros(E)
    for b, t, k in np.argwhere(np.asarray(stats.expert_index) < E):
        load_E[stats.expert_index[b, t, k]] += weight_BTK[b, t, k] * mask_BT[b, t]
    np.testing.assert_allclose(load_E, stats.tokens_per_expert_E, rtol=1e-5)


def test_what_experts_took_is_told_by_token():
    # Every expert takes its four best of seven, or as many as are real.
    layer = make_layer("expert_choice", factor=4 * E / T)
    x_BTD, tokens = layer_inputs()
    _, stats = apply(layer, random_params(layer), x_BTD, tokens)
    for b, e in np.ndindex(B, E):
        p_T = np.where(tokens.mask[b], stats.probs[b, :, e], -1)
        best = set(np.argsort(-p_T)[:4].tolist())
        for t in range(T):
            assert stats.expert_index[b, t, e] == (e if t in best else E)
            assert stats.kept[b, t, e] == (t in best)
            assert stats.gate[b, t, e] == (pytest.approx(p_T[t]) if t in best else 0)


def test_cosine_equals_loop():
    layer = make_layer("cosine", renormalize="before_dropping")
    x_BTD, tokens = layer_inputs()
    params = random_params(layer)
    params["router"]["temperature"] = jnp.asarray(0.3)
    _, stats = apply(layer, params, x_BTD, tokens)
    kernel_DP, embedding_EP = (
        np.float64(params["router"][name]) for name in ("kernel", "embedding")
    )
    for row, t in np.ndindex(B, T):
        point_P = np.float64(x_BTD[row, t]) @ kernel_DP
        lengths = [np.linalg.norm(point_P) * np.linalg.norm(e_P) for e_P in embedding_EP]
        logits = [point_P @ e_P / lengths[e] / 0.3 for e, e_P in enumerate(embedding_EP)]
        gates = chosen(logits, softmax(logits), 2, renormalize=True)
        assert list(stats.expert_index[row, t]) == list(gates)
        np.testing.assert_allclose(stats.gate[row, t], list(gates.values()), rtol=1e-4)


@pytest.mark.parametrize("packed", [False, True])
def test_sentences_end_with_their_row(packed):
    # Row 0 ends with sequence 2 and row 1 begins with another 2; both rows are one group.
    layer = make_layer("sentence", group_size=B * T)
    x_BTD, tokens = layer_inputs()
    sequence_BT = tokens.sequence if packed else jnp.zeros((B, T), int)
    _, stats = apply(
        layer, random_params(layer), x_BTD, tokens if packed else tokens.replace(sequence=None)
    )
    for row, t in np.ndindex(B, T):
        same_T = (sequence_BT[row] == sequence_BT[row, t]) & tokens.mask[row]
        p = softmax(np.asarray(stats.logits, np.float64)[row, same_T].mean(axis=0))
        gates = chosen(p, p, 2)
        assert list(stats.expert_index[row, t]) == list(gates)
        np.testing.assert_allclose(stats.gate[row, t], list(gates.values()), rtol=2e-5)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", ROUTERS)
def test_layers_take_padding_and_other_groups_for_nothing(name, train):
    layer = make_layer(name, train=train, factor=1.0)
    x_BTD, tokens = layer_inputs()
    params = random_params(layer)
    y_BTD, _ = apply(layer, params, x_BTD, tokens)
    padding_BT = ~tokens.mask
    other_BTD, _ = apply(layer, params, *replaced(x_BTD, tokens, padding_BT))
    np.testing.assert_allclose(other_BTD, y_BTD, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(y_BTD[padding_BT], 0)
    if not layer.config.draws_choices:
        turned = jax.tree.map(lambda leaf: leaf[::-1], (x_BTD, tokens))
        other_BTD, _ = apply(layer, params, *turned)
        np.testing.assert_allclose(other_BTD[::-1], y_BTD, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", CAUSAL)
def test_no_causal_scheme_looks_at_later_tokens(name, train):
    # With a fixed key, noise and draws are the same for the same place.
    layer = make_layer(name, train=train, jitter_noise=0.1)
    x_BTD, tokens = layer_inputs()
    params = random_params(layer)

    @jax.jit
    def run(x_BTD, tokens):
        y_BTD, vjp = jax.vjp(lambda x_BTD: apply(layer, params, x_BTD, tokens)[0], x_BTD)
        rows = jnp.zeros((T * D, B, T * D)).at[:, 0].set(jnp.eye(T * D))
        (jacobian,) = jax.vmap(vjp)(rows.reshape(T * D, B, T, D))
        return y_BTD, jacobian[:, 0].reshape(T, D, T, D)

    y_BTD, jacobian_TDTD = run(x_BTD, tokens)
    for first in (1, 3, 6):
        later_BT = jnp.broadcast_to(jnp.arange(T) >= first, (B, T))
        other_BTD, _ = run(*replaced(x_BTD, tokens, later_BT))
        np.testing.assert_array_equal(other_BTD[:, :first], y_BTD[:, :first])
        assert np.any(other_BTD[:, first:] != y_BTD[:, first:])
    # Row 0's outputs to all inputs.
    size_TT = np.abs(jacobian_TDTD).max(axis=(1, 3))
    np.testing.assert_array_equal(np.triu(size_TT, 1), np.zeros((T, T)))
    assert np.all(np.diag(size_TT) > 0)


@pytest.mark.parametrize("name", LOOKING_AHEAD)
def test_other_schemes_look_at_later_tokens(name):
    # Slots are scarce, so that tokens meet in them.
    layer = make_layer(name, train=True, factor=0.6)
    params = random_params(layer)
    later_BT = jnp.broadcast_to(jnp.arange(T) >= 4, (B, T))
    differences = []
    for seed in range(8):
        x_BTD, tokens = layer_inputs(seed)
        y_BTD, _ = apply(layer, params, x_BTD, tokens)
        other_BTD, _ = apply(layer, params, *replaced(x_BTD, tokens, later_BT, seed + 20))
        differences.append(np.abs(other_BTD[0, :4] - y_BTD[0, :4]).max())
    assert max(differences) > 1e-3


@pytest.mark.parametrize("name", ROUTERS)
def test_a_decoder_takes_causal_schemes_only(name):
    moe = MoeConfig(num_experts=E, router=name, **CONFIGS[name])
    if name in CAUSAL:
        several = {"priority": "token"} if moe.num_choices > 1 else {}
        assert ModelConfig(moe=moe).stack_moe["decoder"] == dataclasses.replace(moe, **several)
        return
    with pytest.raises(UserError, match=f"moe: router = '{name}'.*set decoder_moe"):
        ModelConfig(moe=moe)
    with pytest.raises(UserError, match=f"decoder_moe: router = '{name}'"):
        ModelConfig(moe=MoeConfig(), decoder_moe=moe)
    assert ModelConfig(moe=moe, decoder_moe=MoeConfig()).stack_moe["encoder"] == moe
    assert set(ModelConfig(moe=moe, decoder_sparse_layers=()).stack_moe) == {"encoder"}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gshard", {"second_expert_policy": "random"}),
        ("gshard", {"second_expert_policy": "sampling"}),
        *((name, {"exploration": "sample"}) for name in ("switch", "top_k", "cosine", "task")),
    ],
)
def test_draws_are_for_training_only(name, options):
    layer, trained = make_layer(name, **options), make_layer(name, train=True, **options)
    sure = {"second_expert_policy": "all"} if name == "gshard" else {}
    x_BTD, tokens = layer_inputs()
    params = random_params(layer)
    y_BTD, _ = apply(layer, params, x_BTD, tokens)  # without rngs
    np.testing.assert_array_equal(y_BTD, apply(make_layer(name, **sure), params, x_BTD, tokens)[0])
    one, two, again = (apply(trained, params, x_BTD, tokens, seed)[0] for seed in (0, 1, 0))
    assert np.any(one != two)
    np.testing.assert_array_equal(one, again)
