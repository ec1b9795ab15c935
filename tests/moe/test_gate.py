"""The gates: hand-worked logits, what training disturbs, precision and parameters."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchx.moe.gate import GATES

G, M, D, E, P, N, C = 2, 9, 6, 5, 3, 4, 7


@functools.partial(jax.jit, static_argnums=0)
def apply(gate, params, x_GMD, *more, rngs=None):
    return gate.apply({"params": params}, x_GMD, *more, rngs=rngs)


def logits_of(name, params, x_GMD, *more, num_experts, seed=None, **options):
    """Logits with literal parameters; a seed means training."""
    train = seed is not None
    rngs = {"jitter": jax.random.key(seed)} if train else None
    params = {key: jnp.asarray(value, jnp.float32) for key, value in params.items()}
    gate = GATES[name](num_experts, train=train, **options)
    return apply(gate, params, jnp.asarray(x_GMD), *more, rngs=rngs)


class TestLinear:
    KERNEL_DE = [[1, 0, 2, -1], [0, 1, 3, 1], [5, -2, 0, 0]]
    X_GMD = np.float32([[[1, 2, 3], [-1, 0, 4]]])

    @pytest.mark.parametrize("bias_E", [None, [100, 0, -1, 0.5]])
    def test_hand_worked(self, bias_E):
        # Token 0: (1 + 15, 2 - 6, 2 + 6, -1 + 2). Token 1: (-1 + 20, -8, -2, 1).
        expected_GME = np.asarray([[[16, -4, 8, 1], [19, -8, -2, 1]]]) + (bias_E or 0)
        params = {"kernel": self.KERNEL_DE} | ({"bias": bias_E} if bias_E else {})
        options = {"num_experts": 4, "bias": bias_E is not None}
        logits_GME = logits_of("linear", params, self.X_GMD, **options)
        np.testing.assert_array_equal(logits_GME, expected_GME)

    def test_starts_with_a_standard_deviation_of_2_in_100(self):
        params = GATES["linear"](64).init(jax.random.key(0), jnp.ones((1, 1, 512)))["params"]
        kernel_DE = np.asarray(nn.unbox(params)["kernel"])
        # 32,768 numbers: a standard error of 0.02 / √65,536 of the deviation.
        np.testing.assert_allclose(kernel_DE.std(), 0.02, atol=5 * 0.02 / 256)


class TestCosine:
    # x → (x_0, x_1), so that (3, 4, 7) points to (3/5, 4/5): cosines with the axes 3/5 and 4/5,
    # with the opposite direction -1. Lengths do not matter.
    PARAMS = {"kernel": [[1, 0], [0, 1], [0, 0]], "embedding": [[2, 0], [0, 5], [-3, -4]]}
    X_GMD = np.float32([[[3, 4, 7], [300, 400, 0]]])

    @pytest.mark.parametrize(
        ("temperature", "expected"),
        [
            (1.0, [0.6, 0.8, -1]),
            (0.5, [1.2, 1.6, -2]),
            (0.001, [60, 80, -100]),  # no smaller than 0.01
            (-1.0, [60, 80, -100]),
        ],
    )
    def test_hand_worked(self, temperature, expected):
        params = self.PARAMS | {"temperature": temperature}
        logits_GME = logits_of("cosine", params, self.X_GMD, num_experts=3, cosine_dim=2)
        np.testing.assert_allclose(logits_GME, [[expected, expected]], rtol=1e-5)

    def test_bias(self):
        params = self.PARAMS | {"temperature": 0.5, "bias": [0, 1, 2]}
        options = {"num_experts": 3, "cosine_dim": 2, "bias": True}
        logits_GME = logits_of("cosine", params, self.X_GMD, **options)
        np.testing.assert_allclose(logits_GME, [[[1.2, 2.6, 0]] * 2], rtol=1e-5, atol=1e-6)

    def test_zeros_have_finite_logits_and_gradients(self):
        def total(x_GMD):
            params = self.PARAMS | {"temperature": 0.5}
            return logits_of("cosine", params, x_GMD, num_experts=3, cosine_dim=2).sum()

        value, gradient_GMD = jax.value_and_grad(total)(jnp.zeros((1, 2, 3)))
        assert value == 0
        assert np.all(np.isfinite(gradient_GMD))


class TestTask:
    TABLE_NE = [[1, 2, 3], [4, 5, 6]]

    @pytest.mark.parametrize("bias_E", [None, [10, 20, 30]])
    def test_hand_worked(self, bias_E):
        # Out of range is the nearest row. What x holds does not matter.
        task_ids_GM = jnp.asarray([[1, 0, 1, 2, -1]])
        rows = [[4, 5, 6], [1, 2, 3], [4, 5, 6], [4, 5, 6], [1, 2, 3]]
        params = {"embedding": self.TABLE_NE} | ({"bias": bias_E} if bias_E else {})
        options = {"num_experts": 3, "num_tasks": 2, "bias": bias_E is not None}
        for x in (0, 7):
            x_GMD = np.full((1, 5, 4), x, np.float32)
            logits_GME = logits_of("task", params, x_GMD, task_ids_GM, **options)
            np.testing.assert_array_equal(logits_GME[0], np.asarray(rows) + (bias_E or 0))


class TestSoft:
    # 2 experts of 2 slots. Columns of unit length: (1, 0), (0, -1), (1, 1) / √2, (0.8, 0.6).
    KERNEL_DS = [[3, 0, 1, 4], [0, -2, 1, 3]]

    @pytest.mark.parametrize("scale", [1, 2.5, -1])
    def test_hand_worked(self, scale):
        # (3, 4) becomes (0.6, 0.8), and so does (0.3, 0.4). The last is 0.48 + 0.48.
        x_GMD = np.float32([[[3, 4], [0.3, 0.4], [0, 0]]])
        params = {"kernel": self.KERNEL_DS, "scale": scale}
        logits_GMS = logits_of("soft", params, x_GMD, num_experts=2, capacity=2)
        expected_S = scale * np.asarray([0.6, -0.8, 1.4 / np.sqrt(2), 0.96])
        expected_GMS = [[expected_S, expected_S, np.zeros(4)]]
        np.testing.assert_allclose(logits_GMS, expected_GMS, rtol=1e-5, atol=1e-6)


def options_of(name):
    return {"cosine": {"cosine_dim": P}, "task": {"num_tasks": N}, "soft": {"capacity": C}}.get(
        name, {}
    )


def example(name, dtype=np.float32, **options):
    """A gate with random parameters, and its arguments."""
    gate = GATES[name](E, **options_of(name), **options)
    rng = np.random.default_rng(0)
    arguments = [jnp.asarray(rng.normal(size=(G, M, D)), dtype)]
    if name == "task":
        arguments.append(jnp.asarray(rng.integers(0, N, size=(G, M))))
    rngs = {"params": jax.random.key(0), "jitter": jax.random.key(1)}
    params = nn.unbox(gate.init(rngs, *arguments)["params"])
    return gate, params, arguments


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("linear", {"kernel": (D, E)}),
        ("cosine", {"kernel": (D, P), "embedding": (E, P), "temperature": ()}),
        ("task", {"embedding": (N, E)}),
        ("soft", {"kernel": (D, E * C), "scale": ()}),
    ],
)
def test_parameters(name, shapes, bias):
    _, params, _ = example(name, jnp.bfloat16, bias=bias)
    if bias and name != "soft":  # a bias of slots is not in the paper
        shapes = shapes | {"bias": (E,)}
        np.testing.assert_array_equal(params["bias"], np.zeros(E))
    assert {key: value.shape for key, value in params.items()} == shapes
    assert all(value.dtype == jnp.float32 for value in params.values())
    if name == "cosine":
        assert params["temperature"] == np.float32(0.07)
    if name == "soft":
        assert params["scale"] == 1


@pytest.mark.parametrize("name", GATES)
def test_logits_of_bfloat16_are_float32(name):
    gate, params, (x_GMD, *more) = example(name, jnp.bfloat16)
    # Parameters that bfloat16 would round: the same as for the same input in float32.
    logits = apply(gate, params, x_GMD, *more)
    assert logits.dtype == jnp.float32
    np.testing.assert_array_equal(logits, apply(gate, params, x_GMD.astype(jnp.float32), *more))
    rounded = jax.tree.map(lambda p: p.astype(jnp.bfloat16).astype(jnp.float32), params)
    assert np.any(logits != apply(gate, rounded, x_GMD, *more))


@pytest.mark.parametrize("name", GATES)
def test_a_narrow_gate_rounds_its_input_and_its_logits(name):
    rng = np.random.default_rng(11)
    x_GMD = jnp.asarray(rng.normal(size=(G, M, D)), jnp.float32)
    more = [jnp.zeros((G, M), jnp.int32)] if name == "task" else []
    wide, narrow = (GATES[name](E, dtype=dtype) for dtype in ("float32", "bfloat16"))
    params = wide.init(jax.random.key(0), x_GMD, *more)["params"]
    expected_GME = apply(wide, params, x_GMD, *more)
    logits_GME = apply(narrow, params, x_GMD, *more)
    assert logits_GME.dtype == jnp.bfloat16
    assert not np.array_equal(logits_GME.astype(jnp.float32), expected_GME)
    scale = np.abs(expected_GME).max()
    np.testing.assert_allclose(logits_GME.astype(jnp.float32), expected_GME, atol=0.03 * scale)


@pytest.mark.parametrize("name", GATES)
def test_logits_of_float64_are_float64(name):
    with jax.enable_x64(True):
        gate, params, arguments = example(name, np.float64)
        assert apply(gate, params, *arguments).dtype == jnp.float64


# Gates through which the disturbed input can be seen: two features, two experts, and logits that
# are the features, in "cosine" and "soft" those of unit length.
SEEN = {
    "linear": ({"kernel": np.eye(2)}, {}),
    "cosine": (
        {"kernel": np.eye(2), "embedding": np.eye(2), "temperature": 1},
        {"cosine_dim": 2},
    ),
    "soft": ({"kernel": np.eye(2), "scale": 1}, {}),
}
TOKENS = 5000


def features(name, **options):
    """What is left of features (1, 1); a constant of a token times it where it has unit length."""
    params, more = SEEN[name]
    x_GMD = jnp.ones((1, TOKENS, 2))
    return np.asarray(logits_of(name, params, x_GMD, num_experts=2, **more, **options))[0]


@pytest.mark.parametrize("name", SEEN)
def test_jitter(name):
    noise = 0.25
    seen_MD = features(name, jitter_noise=noise, seed=0)
    if name == "linear":
        assert 0.75 <= seen_MD.min() < 0.76 and 1.24 < seen_MD.max() <= 1.25
        # A uniform number has the deviation 2 ε / √12 = 0.144.
        np.testing.assert_allclose(seen_MD.mean(), 1, atol=5 * 0.145 / np.sqrt(2 * TOKENS))
    else:
        ratio_M = seen_MD[:, 0] / seen_MD[:, 1]
        assert 0.75 / 1.25 <= ratio_M.min() < 0.65 and 1.55 < ratio_M.max() <= 1.25 / 0.75
        np.testing.assert_allclose(np.square(seen_MD).sum(-1), 1, rtol=1e-5)
    # The same key, the same noise; another key, other noise; none without noise or training.
    np.testing.assert_array_equal(features(name, jitter_noise=noise, seed=0), seen_MD)
    assert np.mean(features(name, jitter_noise=noise, seed=1) == seen_MD) < 0.01
    still_MD = features(name)
    np.testing.assert_array_equal(features(name, jitter_noise=noise), still_MD)
    np.testing.assert_array_equal(features(name, seed=0), still_MD)


@pytest.mark.parametrize("name", SEEN)
def test_input_dropout(name):
    rate = 0.25
    seen_MD = features(name, input_dropout_rate=rate, seed=0)
    share = np.mean(seen_MD == 0)
    np.testing.assert_allclose(share, rate, atol=5 * np.sqrt(0.25 * 0.75 / (2 * TOKENS)))
    if name == "linear":  # what is left weighs 1 / (1 - rate)
        np.testing.assert_allclose(np.unique(seen_MD), [0, 4 / 3], rtol=1e-6)
    np.testing.assert_array_equal(features(name, input_dropout_rate=rate), features(name))


def test_nothing_disturbs_a_task():
    gate, params, arguments = example("task", jitter_noise=0.5, input_dropout_rate=0.5)
    trained = gate.clone(train=True)
    np.testing.assert_array_equal(
        apply(trained, params, *arguments), apply(gate, params, *arguments)
    )
