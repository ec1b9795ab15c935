"""Both ways of moving tokens: against loops, against each other, and what they compile to."""

import functools
from collections.abc import Iterator

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from switchx.moe import placement, routing
from switchx.moe.assignment import Assignment, Choice, Mixture
from switchx.moe.dispatch import DISPATCHERS, MIXTURE

G, M, D, E, C = 3, 11, 6, 5, 4


def routings():
    """Expert choices [G, M, K] and masks [G, M], by name; C slots overflow in most of them."""
    rng = np.random.default_rng(0)
    everyone = np.ones((G, M), bool)
    some = rng.random((G, M)) < 0.7
    some[1] = False  # a group of nothing but padding
    for top_k in (1, 2, 3):
        scores_GME = rng.normal(size=(G, M, E)) - 0.4 * np.arange(E)
        experts_GMK = np.argsort(-scores_GME, axis=-1)[..., :top_k]
        yield f"K{top_k}", experts_GMK, everyone
        yield f"K{top_k}-padded", experts_GMK, some
    yield "all-to-one", np.full((G, M, 1), 2), everyone
    yield "all-to-the-same-two", np.broadcast_to(np.asarray([4, 0]), (G, M, 2)), some
    # Experts take tokens: no table by token, some tokens in many slots and some in none.
    yield "experts-choose", None, some


place = jax.jit(placement.place, static_argnames=("num_experts", "capacity"))
ROUTINGS = {name: (experts_GMK, mask_GM) for name, experts_GMK, mask_GM in routings()}


@pytest.fixture(params=ROUTINGS, scope="module")
def case(request):
    """Slots, gates, tokens, expert outputs and cotangents (float64, NumPy) of one routing."""
    experts_GMK, mask_GM = ROUTINGS[request.param]
    rng = np.random.default_rng(1)
    if experts_GMK is None:
        logits_GME = jnp.asarray(rng.normal(size=(G, M, E)) + np.arange(M)[:, None] % 4)
        slots = routing.expert_choice(logits_GME, jnp.asarray(mask_GM), C).decision
        assert isinstance(slots, Assignment) and slots.slot_GMK is None
    else:
        choice = Choice(
            expert_index_GMK=jnp.asarray(experts_GMK, jnp.int32),
            gate_GMK=jnp.ones(experts_GMK.shape),
        )
        slots = place(choice, jnp.asarray(mask_GM), num_experts=E, capacity=C)
    return {
        "slots": slots,
        "gate_GEC": rng.uniform(0.1, 1, size=(G, E, C)),
        "x_GMD": rng.normal(size=(G, M, D)),
        "y_GECD": rng.normal(size=(G, E, C, D)),
        "slots_cotangent": rng.normal(size=(G, E, C, D)),
        "tokens_cotangent": rng.normal(size=(G, M, D)),
    }


@functools.partial(jax.jit, static_argnames="name")
def transport(name, x_GMD, y_GECD, gate_GEC, slots, slots_cotangent, tokens_cotangent):
    """What a backend computes, forward and backward, each in a program of its own."""
    dispatcher = DISPATCHERS[name]
    slots_GECD, dispatch_vjp = jax.vjp(lambda x: dispatcher.dispatch(x, slots), x_GMD)
    tokens_GMD, combine_vjp = jax.vjp(
        lambda y, gate: dispatcher.combine(y, slots.replace(gate_GEC=gate), M), y_GECD, gate_GEC
    )
    y_gradient, gate_gradient = combine_vjp(tokens_cotangent)
    return {
        "slots": slots_GECD,
        "x_gradient": dispatch_vjp(slots_cotangent)[0],
        "tokens": tokens_GMD,
        "y_gradient": y_gradient,
        "gate_gradient": gate_gradient,
    }


def transport_by_loop(case):
    """The same in NumPy: copy what has a slot, and copy or add back along the same ways."""
    result = {
        "slots": np.zeros((G, E, C, D)),
        "x_gradient": np.zeros((G, M, D)),
        "tokens": np.zeros((G, M, D)),
        "y_gradient": np.zeros((G, E, C, D)),
        "gate_gradient": np.zeros((G, E, C)),
    }
    for (g, e, c), m in np.ndenumerate(case["slots"].token_GEC):
        if m == M:
            continue
        gate, y, cotangent = (
            case["gate_GEC"][g, e, c],
            case["y_GECD"][g, e, c],
            case["tokens_cotangent"][g, m],
        )
        result["slots"][g, e, c] = case["x_GMD"][g, m]
        result["x_gradient"][g, m] += case["slots_cotangent"][g, e, c]
        result["tokens"][g, m] += gate * y
        result["y_gradient"][g, e, c] = gate * cotangent
        result["gate_gradient"][g, e, c] = y @ cotangent
    return result


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-5), ("bfloat16", 2e-2)]
)
@pytest.mark.parametrize("name", DISPATCHERS)
def test_equals_loop_forward_and_backward(case, name, dtype, tolerance):
    gate_dtype = jnp.promote_types(dtype, jnp.float32)
    with jax.enable_x64(True):
        activations = ("x_GMD", "y_GECD", "slots_cotangent", "tokens_cotangent")
        arrays = {key: jnp.asarray(case[key], dtype) for key in activations}
        arrays["gate_GEC"] = jnp.asarray(case["gate_GEC"], gate_dtype)
        result = transport(name, slots=case["slots"], **arrays)
    for key, expected in transport_by_loop(case).items():
        assert result[key].dtype == (gate_dtype if key == "gate_gradient" else dtype), key
        np.testing.assert_allclose(
            np.asarray(result[key], np.float64),
            expected,
            rtol=tolerance,
            atol=4 * tolerance,
            err_msg=key,
        )


@functools.partial(jax.jit, static_argnames="name")
def value_and_gradients(name, x_GMD, w_EDD, logits_GME, mask_GM):
    """A whole layer around a backend: top-2 routing, one matrix and a sine per expert."""
    dispatcher = DISPATCHERS[name]

    def loss(x_GMD, w_EDD, logits_GME):
        choice = routing.top_k(logits_GME, 2).decision
        slots = placement.place(choice, mask_GM, num_experts=E, capacity=C)
        slots_GECD = jnp.einsum("gecd,edf->gecf", dispatcher.dispatch(x_GMD, slots), w_EDD)
        y_GMD = dispatcher.combine(jnp.sin(slots_GECD), slots, M)
        return jnp.sum(jnp.square(y_GMD - 1)), y_GMD

    return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(x_GMD, w_EDD, logits_GME)


def test_gather_equals_einsum_through_experts():
    rng = np.random.default_rng(2)
    with jax.enable_x64(True):
        arguments = (
            jnp.asarray(rng.normal(size=(G, M, D))),
            jnp.asarray(rng.normal(size=(E, D, D))),
            jnp.asarray(rng.normal(size=(G, M, E))),
            jnp.asarray(rng.random((G, M)) < 0.8),
        )
        gather = value_and_gradients("gather", *arguments)
        einsum = value_and_gradients("einsum", *arguments)
    for a, b in zip(jax.tree.leaves(gather), jax.tree.leaves(einsum), strict=True):
        assert a.dtype == jnp.float64
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
    assert all(np.abs(gradient).max() > 0.1 for gradient in gather[1])


@pytest.mark.parametrize("name", DISPATCHERS)
def test_identity_experts_with_gate_1_give_back_the_kept_tokens(case, name):
    dispatcher, token_GEC = DISPATCHERS[name], case["slots"].token_GEC
    slots = case["slots"].replace(gate_GEC=jnp.where(token_GEC < M, 1.0, 0.0))
    x_GMD = jnp.asarray(case["x_GMD"], jnp.float32)
    tokens_GMD = jax.jit(lambda x: dispatcher.combine(dispatcher.dispatch(x, slots), slots, M))(
        x_GMD
    )
    # Once for every slot it is in; exactly zero where that is none.
    times_GM1 = np.asarray(jax.nn.one_hot(token_GEC, M).sum(axis=(1, 2)))[..., None]
    assert (times_GM1 == 0).any()
    np.testing.assert_allclose(tokens_GMD, times_GM1 * np.asarray(x_GMD), rtol=1e-6)


def test_gather_keeps_a_broken_token_in_its_own_slot():
    # No product with a one-hot mask, in which 0 · nan would spread to every slot.
    choice = Choice(expert_index_GMK=jnp.asarray([[[0], [1], [0]]]), gate_GMK=jnp.ones((1, 3, 1)))
    slots = place(choice, jnp.ones((1, 3), bool), num_experts=2, capacity=2)
    x_GMD = jnp.ones((1, 3, D)).at[0, 1].set(jnp.nan)
    slots_GECD = np.asarray(DISPATCHERS["gather"].dispatch(x_GMD, slots))
    np.testing.assert_array_equal(slots_GECD[..., 0], [[[1, 1], [np.nan, 0]]])


def equations(jaxpr: jax.extend.core.Jaxpr) -> Iterator[jax.extend.core.JaxprEqn]:
    """All equations of a jaxpr, those of the functions it calls included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(inner, jax.extend.core.ClosedJaxpr):
                    inner = inner.jaxpr
                if isinstance(inner, jax.extend.core.Jaxpr):
                    yield from equations(inner)


def primitives_and_largest(function, *arguments):
    found = list(equations(jax.make_jaxpr(function)(*arguments).jaxpr))
    sizes = [variable.aval.size for equation in found for variable in equation.outvars]
    return {equation.primitive.name for equation in found}, max(sizes)


@pytest.mark.parametrize("top_k", [1, 2])
def test_gather_has_no_scatter_add_and_no_mask_forward_or_backward(top_k):
    groups, tokens, width, experts, capacity = 2, 64, 3, 4, 20
    rng = np.random.default_rng(3)
    choice = Choice(
        expert_index_GMK=jnp.asarray(rng.integers(0, experts, (groups, tokens, top_k)), jnp.int32),
        gate_GMK=jnp.ones((groups, tokens, top_k)),
    )
    mask_GM = jnp.ones((groups, tokens), bool)

    def loss(x_GMD, gate_GMK, name):
        dispatcher = DISPATCHERS[name]
        asked = choice.replace(gate_GMK=gate_GMK)
        slots = placement.place(asked, mask_GM, num_experts=experts, capacity=capacity)
        slots_GECD = jnp.sin(dispatcher.dispatch(x_GMD, slots))
        y_GMD = dispatcher.combine(slots_GECD, slots, tokens)
        return jnp.sum(jnp.square(y_GMD))

    def look(name):
        gradient = jax.value_and_grad(functools.partial(loss, name=name), (0, 1))
        return primitives_and_largest(gradient, jnp.ones((groups, tokens, width)), choice.gate_GMK)

    primitives, largest = look("gather")
    assert "gather" in primitives
    assert not {name for name in primitives if "scatter" in name}
    assert largest <= groups * max(tokens * top_k, experts * capacity) * width
    # What the test would see otherwise: the one-hot mask, and the transpose of a plain gather.
    assert look("einsum")[1] >= groups * tokens * experts * capacity
    plain = jax.grad(lambda x: jnp.sum(jnp.square(x[jnp.asarray([0, 1])])))
    assert "scatter-add" in primitives_and_largest(plain, jnp.ones((tokens, width)))[0]


def test_mixtures_are_weighted_means_both_ways():
    rng = np.random.default_rng(4)
    dispatch_GMEC = rng.random((G, M, E, C))
    combine_GMEC = rng.random((G, M, E, C))
    x_GMD, y_GECD = rng.normal(size=(G, M, D)), rng.normal(size=(G, E, C, D))
    with jax.enable_x64(True):
        mixture = Mixture(
            dispatch_GMEC=jnp.asarray(dispatch_GMEC), combine_GMEC=jnp.asarray(combine_GMEC)
        )
        slots_GECD = MIXTURE.dispatch(jnp.asarray(x_GMD), mixture)
        tokens_GMD = MIXTURE.combine(jnp.asarray(y_GECD), mixture, M)
    for g, e, c in np.ndindex(G, E, C):
        expected = sum(dispatch_GMEC[g, m, e, c] * x_GMD[g, m] for m in range(M))
        np.testing.assert_allclose(slots_GECD[g, e, c], expected, rtol=1e-12, atol=1e-12)
    for g, m in np.ndindex(G, M):
        weights = combine_GMEC[g, m][..., None]
        expected = (weights * y_GECD[g]).sum(axis=(0, 1))
        np.testing.assert_allclose(tokens_GMD[g, m], expected, rtol=1e-12, atol=1e-12)
