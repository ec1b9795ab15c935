"""The structs between router, dispatch and losses: what their properties say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchx.moe.assignment import Assignment, RouterStats

L, E = 3, 4


def stats(**fields):
    """Statistics of 8 tokens with 2 choices each, 4 of the 16 without a slot."""
    values = {
        "num_tokens": 8.0,
        "num_choices_K": [8.0, 8.0],
        "num_dropped_K": [1.0, 3.0],
        "load_balance": 12.0,
        "importance": 4.0,
        "router_z": 2.0,
        "entropy": 6.0,
        "confidence": 5.0,
        "tokens_per_expert_E": [8.0, 4.0, 0.0, 4.0],
    }
    return RouterStats(**{name: jnp.asarray(value) for name, value in (values | fields).items()})


def test_kept():
    # 2 experts of 3 slots: 6 is one past the last slot. 3 tokens of 2 choices: empty
    # slots hold token 3.
    slots = Assignment(
        token_GEC=jnp.asarray([[[0, 2, 3], [1, 2, 3]]]),
        gate_GEC=jnp.ones((1, 2, 3)),
        slot_GMK=jnp.asarray([[[0, 6], [6, 3], [1, 4]]]),
    )
    np.testing.assert_array_equal(slots.kept_GMK, [[[True, False], [False, True], [True, True]]])


def test_means_are_sums_over_tokens_and_choices():
    s = stats()
    assert s.load_balance_loss == 1.5  # 12 / 8 tokens
    assert s.router_z_loss == 0.25  # 2 / 8 tokens
    assert s.router_entropy == 0.75  # 6 / 8 tokens
    assert s.router_confidence == 0.625  # 5 / 8 tokens
    assert s.importance_loss == 0.5  # 4 / 8 tokens
    assert s.dropped_fraction == 0.25  # 4 / 16 choices
    np.testing.assert_array_equal(s.dropped_fraction_by_rank, [1 / 8, 3 / 8])
    assert s.max_violation == 1  # half of the load on one of four experts
    np.testing.assert_array_equal(s.expert_load, [0.5, 0.25, 0, 0.25])  # of 16 choices


def test_means_of_nothing_are_zero():
    nothing = jax.tree.map(jnp.zeros_like, stats())
    assert nothing.load_balance_loss == nothing.router_z_loss == nothing.dropped_fraction == 0
    assert nothing.router_entropy == nothing.router_confidence == 0
    np.testing.assert_array_equal(nothing.expert_load, np.zeros(E))


def test_means_of_stacked_layers_are_per_layer():
    layers = [stats(load_balance=8.0 * n, num_choices_K=[8.0 * n, 8.0 * n]) for n in (1, 2, 4)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    np.testing.assert_array_equal(stacked.load_balance_loss, [1, 2, 4])
    np.testing.assert_array_equal(stacked.dropped_fraction, [1 / 4, 1 / 8, 1 / 16])
    assert stacked.expert_load.shape == (L, E)
    np.testing.assert_array_equal(stacked.expert_load[2], [0.5, 0.25, 0, 0.25])
    assert stacked.dropped_fraction_by_rank.shape == (L, 2)
    np.testing.assert_array_equal(stacked.max_violation, [1, 1, 1])


def test_sums_of_microbatches_give_the_mean_of_the_batch():
    # 1 token of loss 4 and 7 tokens of loss 8 in sum: (4 + 8) / 8, not (4 + 8/7) / 2.
    small = stats(num_tokens=1.0, load_balance=4.0)
    large = stats(num_tokens=7.0, load_balance=8.0)
    assert jax.tree.map(jnp.add, small, large).load_balance_loss == 1.5


@pytest.mark.parametrize("name", ["logits", "expert_index", "gate", "kept"])
def test_token_level_fields_are_absent_by_default(name):
    assert getattr(stats(), name) is None
    assert len(jax.tree.leaves(stats())) == 9
