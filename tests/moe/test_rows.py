"""Rows to slots and back: literal tables, and that each map is the other's transpose."""

import jax
import jax.numpy as jnp
import numpy as np

from switchx.moe.rows import from_slots, take, to_slots

# Four tokens of two choices, five slots; slot 2 is empty, token 3 is nowhere.
TOKEN_S = jnp.asarray([1, 0, 4, 2, 1])
SLOT_MK = jnp.asarray([[1, 5], [4, 0], [5, 3], [5, 5]])


def test_take_gives_zeros_one_past_the_end():
    rows = take(jnp.asarray([[1.0, 2], [3, 4]]), jnp.asarray([1, 2, 0]))
    np.testing.assert_array_equal(rows, [[3, 4], [0, 0], [1, 2]])


def test_hand_worked():
    x_MD = jnp.asarray([[1.0], [2], [3], [4]])
    slots_SD = to_slots(x_MD, TOKEN_S, SLOT_MK, 4)
    np.testing.assert_array_equal(slots_SD[:, 0], [2, 1, 0, 3, 2])
    y_SD = jnp.asarray([[10.0], [20], [30], [40], [50]])
    for table in (SLOT_MK, None):
        tokens_MD = from_slots(y_SD, TOKEN_S, table, 4)
        np.testing.assert_array_equal(tokens_MD[:, 0], [20, 60, 40, 0])


def test_each_is_the_others_transpose():
    rng = np.random.default_rng(0)
    x_MD, y_SD = jnp.asarray(rng.normal(size=(4, 3))), jnp.asarray(rng.normal(size=(5, 3)))
    for table in (SLOT_MK, None):
        _, to_transpose = jax.vjp(lambda x, table=table: to_slots(x, TOKEN_S, table, 4), x_MD)
        _, from_transpose = jax.vjp(lambda y, table=table: from_slots(y, TOKEN_S, table, 4), y_SD)
        np.testing.assert_array_equal(to_transpose(y_SD)[0], from_slots(y_SD, TOKEN_S, table, 4))
        np.testing.assert_array_equal(from_transpose(x_MD)[0], to_slots(x_MD, TOKEN_S, table, 4))
