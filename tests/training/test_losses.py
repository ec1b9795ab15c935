"""Cross-entropy: hand-worked numbers, a materialising reference, and the compiled program."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchx.errors import UserError
from switchx.training import losses
from switchx.training.losses import CrossEntropySums, LossConfig, cross_entropy

B, T, D, V = 3, 10, 6, 13


def example(dtype=np.float32, shape=(B, T, D, V), seed=0):
    """Hidden states, head, targets and weights (some 0, some not 1) from NumPy."""
    batch, length, width, vocabulary = shape
    rng = np.random.default_rng(seed)
    weights_BT = rng.choice([0.0, 1.0, 1.0, 0.5], size=(batch, length))
    weights_BT[0, 0], weights_BT[-1, -1] = 0.0, 1.0
    return (
        jnp.asarray(rng.normal(size=(batch, length, width)), dtype),
        jnp.asarray(rng.normal(size=(vocabulary, width)), dtype),
        jnp.asarray(rng.integers(0, vocabulary, (batch, length)), jnp.int32),
        jnp.asarray(weights_BT, jnp.promote_types(dtype, jnp.float32)),
    )


def cross_entropy_reference(
    hidden_BTD, head_VD, targets_BT, weights_BT, *, z_loss, label_smoothing
):
    """The definition, with all logits and the whole smoothed target distribution."""
    vocabulary = head_VD.shape[0]
    dtype = jnp.promote_types(hidden_BTD.dtype, jnp.float32)
    logits_BTV = jnp.einsum("btd,vd->btv", hidden_BTD, head_VD, preferred_element_type=dtype)
    off = label_smoothing / (vocabulary - 1)
    one_hot_BTV = jax.nn.one_hot(targets_BT, vocabulary, dtype=dtype)
    q_BTV = (1 - label_smoothing) * one_hot_BTV + off * (1 - one_hot_BTV)
    entropy_BT = -jnp.sum(jax.scipy.special.xlogy(q_BTV, q_BTV), axis=-1)
    cross_entropy_BT = -jnp.sum(q_BTV * jax.nn.log_softmax(logits_BTV), axis=-1) - entropy_BT
    z_BT = z_loss * jax.nn.logsumexp(logits_BTV, axis=-1) ** 2
    sums = CrossEntropySums(
        cross_entropy=jnp.sum(weights_BT * cross_entropy_BT),
        z_loss=jnp.sum(weights_BT * z_BT),
        correct=jnp.sum(weights_BT * (jnp.argmax(logits_BTV, axis=-1) == targets_BT)),
        weight=jnp.sum(weights_BT),
    )
    return sums.cross_entropy + sums.z_loss, sums


@functools.cache
def jitted(function, **options):
    """One compiled program for each function, options and shapes in this file."""
    return jax.jit(jax.value_and_grad(functools.partial(function, **options), (0, 1), has_aux=True))


def value_and_gradients(function, arguments, **options):
    """((loss, sums), gradients of hidden and head)."""
    return jitted(function, **options)(*arguments)


def assert_close(actual, expected, rtol, atol):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        np.testing.assert_allclose(
            np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=rtol, atol=atol
        )


def test_hand_worked():
    # One token, logits (0, ln 2, ln 5): Z = 8, probabilities 1/8, 1/4, 5/8. Target 2.
    head_VD = jnp.log(jnp.asarray([[1.0], [2.0], [5.0]]))
    hidden_BTD = jnp.ones((1, 1, 1))
    targets_BT, weights_BT = jnp.asarray([[2]]), jnp.asarray([[3.0]])
    arguments = (hidden_BTD, head_VD, targets_BT, weights_BT)

    (loss, sums), (d_hidden_BTD, d_head_VD) = value_and_gradients(
        cross_entropy, arguments, z_loss=0.5, label_smoothing=0.0
    )
    log_z = math.log(8)
    np.testing.assert_allclose(sums.cross_entropy, 3 * math.log(8 / 5), rtol=1e-6)
    np.testing.assert_allclose(sums.z_loss, 3 * 0.5 * log_z**2, rtol=1e-6)
    np.testing.assert_allclose(loss, 3 * math.log(8 / 5) + 1.5 * log_z**2, rtol=1e-6)
    assert (sums.correct, sums.weight) == (3, 3)
    d_logits = 3 * ((1 + log_z) * np.array([1, 2, 5]) / 8 - np.array([0, 0, 1]))
    np.testing.assert_allclose(d_head_VD[:, 0], d_logits, rtol=1e-6)
    expected = d_logits @ np.log([1, 2, 5])
    np.testing.assert_allclose(d_hidden_BTD[0, 0, 0], expected, rtol=1e-6)

    # Smoothing 0.2: q = (0.1, 0.1, 0.8). The cost is the divergence of p from q.
    loss, sums = cross_entropy(*arguments, z_loss=0.0, label_smoothing=0.2)
    p, q = np.array([1, 2, 5]) / 8, np.array([0.1, 0.1, 0.8])
    np.testing.assert_allclose(loss, 3 * np.sum(q * np.log(q / p)), rtol=1e-5)
    assert sums.z_loss == 0


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.7])
def test_a_perfect_prediction_costs_nothing(label_smoothing):
    off = max(label_smoothing / (V - 1), 1e-12)
    q_V = np.full(V, off)
    q_V[4] = 1 - label_smoothing
    loss, _ = cross_entropy(
        jnp.ones((1, 1, 1)),
        jnp.log(jnp.asarray(q_V, jnp.float32))[:, None],
        jnp.asarray([[4]]),
        jnp.ones((1, 1)),
        z_loss=1e-4,
        label_smoothing=label_smoothing,
    )
    np.testing.assert_allclose(loss, 0, atol=1e-6)


@pytest.mark.parametrize(
    ("chunk_length", "label_smoothing"),
    [(None, 0.0), (4, 0.0), (None, 0.1), (4, 0.1), (1, 0.1), (5, 0.1), (9, 0.1)],
)
def test_equals_the_reference(chunk_length, label_smoothing):
    arguments = example()
    options = {"z_loss": 1e-2, "label_smoothing": label_smoothing}
    expected = value_and_gradients(cross_entropy_reference, arguments, **options)
    actual = value_and_gradients(cross_entropy, arguments, chunk_length=chunk_length, **options)
    assert_close(actual, expected, rtol=1e-6, atol=2e-6)
    # Evaluation runs another program: the same sums, and none of the gradients.
    undifferentiated = jax.jit(lambda *a: cross_entropy(*a, chunk_length=chunk_length, **options))(
        *arguments
    )
    assert_close(undifferentiated, expected[0], rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("chunk_length", [10, 4])
def test_equals_the_reference_in_float64(chunk_length):
    with jax.enable_x64(True):
        arguments = example(np.float64)
        options = {"z_loss": 1e-2, "label_smoothing": 0.1}
        expected = value_and_gradients(cross_entropy_reference, arguments, **options)
        actual = value_and_gradients(cross_entropy, arguments, chunk_length=chunk_length, **options)
        assert actual[1][1].dtype == jnp.float64
        assert_close(actual, expected, rtol=1e-12, atol=1e-13)


def transposed_head(hidden_BTD, kernel_DV, *rest, **options):
    return cross_entropy(hidden_BTD, kernel_DV.T, *rest, **options)


@pytest.mark.parametrize(("chunk_length", "transposed"), [(10, True), (10, False), (4, True)])
def test_bfloat16(chunk_length, transposed):
    arguments = example(jnp.bfloat16)
    options = {"z_loss": 1e-2, "label_smoothing": 0.1}
    actual = value_and_gradients(
        transposed_head if transposed else cross_entropy,
        (arguments[0], arguments[1].T if transposed else arguments[1], *arguments[2:]),
        chunk_length=chunk_length,
        **options,
    )
    if transposed:
        actual = (actual[0], (actual[1][0], actual[1][1].T))
    exact = [x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for x in arguments]
    expected = value_and_gradients(cross_entropy_reference, exact, **options)
    # bfloat16 products are exact in float32: only gradients are rounded.
    assert_close(actual[0], expected[0], rtol=1e-5, atol=1e-5)
    for actual_gradient, expected_gradient in zip(actual[1], expected[1], strict=True):
        assert actual_gradient.dtype == jnp.bfloat16
        error = jnp.abs(actual_gradient.astype(jnp.float32) - expected_gradient)
        assert error.max() < 0.01 * jnp.abs(expected_gradient).max()


def test_the_head_gradient_is_summed_in_float32():
    # 4096 equal contributions, one chunk each: a bfloat16 sum would stall at 256 of them.
    length = 4096
    arguments = (
        jnp.ones((1, length, 1), jnp.bfloat16),
        jnp.zeros((2, 1), jnp.bfloat16),
        jnp.zeros((1, length), jnp.int32),
        jnp.ones((1, length)),
    )
    _, (_, d_head_VD) = value_and_gradients(
        cross_entropy, arguments, z_loss=0.0, label_smoothing=0.0, chunk_length=1
    )
    np.testing.assert_array_equal(d_head_VD.astype(jnp.float32)[:, 0], [-length / 2, length / 2])


def test_mixed_dtypes():
    hidden_BTD, head_VD, *rest = example()
    arguments = (hidden_BTD.astype(jnp.bfloat16), head_VD, *rest)
    _, (d_hidden_BTD, d_head_VD) = value_and_gradients(
        cross_entropy, arguments, z_loss=0.0, label_smoothing=0.0, chunk_length=4
    )
    assert (d_hidden_BTD.dtype, d_head_VD.dtype) == (jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize("chunk_length", [None, 4])
def test_weight_zero_is_no_token(chunk_length):
    hidden_BTD, head_VD, targets_BT, weights_BT = example()
    options = {"z_loss": 1e-2, "label_smoothing": 0.1, "chunk_length": chunk_length}
    elsewhere_BT = jnp.where(weights_BT == 0, -100, targets_BT)
    one = value_and_gradients(
        cross_entropy, (hidden_BTD, head_VD, targets_BT, weights_BT), **options
    )
    two = value_and_gradients(
        cross_entropy, (hidden_BTD, head_VD, elsewhere_BT, weights_BT), **options
    )
    assert_close(one, two, rtol=0, atol=0)
    (_, sums), (d_hidden_BTD, _) = one
    assert float(sums.weight) == float(weights_BT.sum())
    assert not d_hidden_BTD[weights_BT == 0].any() and d_hidden_BTD[weights_BT > 0].all()

    (loss, sums), gradients = value_and_gradients(
        cross_entropy, (hidden_BTD, head_VD, targets_BT, jnp.zeros_like(weights_BT)), **options
    )
    assert loss == 0 and not any(g.any() for g in gradients)
    assert all(x == 0 for x in jax.tree.leaves(sums))


def test_equal_logits_predict_nothing():
    targets_BT = jnp.arange(V)[None] % V
    arguments = (jnp.ones((1, V, D)), jnp.zeros((V, D)), targets_BT, jnp.ones((1, V)))
    (_, sums), _ = value_and_gradients(cross_entropy, arguments, z_loss=0.0, label_smoothing=0.0)
    assert float(sums.correct) == 0
    np.testing.assert_allclose(sums.cross_entropy, V * math.log(V), rtol=1e-6)


def test_a_tie_of_the_largest_logits_counts():
    head_VD = jnp.zeros((V, D)).at[:2].set(1.0)
    targets_BT = jnp.array([[0, 1, 2]])
    arguments = (jnp.ones((1, 3, D)), head_VD, targets_BT, jnp.ones((1, 3)))
    (_, sums), _ = value_and_gradients(cross_entropy, arguments, z_loss=0.0, label_smoothing=0.0)
    assert float(sums.correct) == 2


def test_microbatches_add_up():
    arguments = example(shape=(4, T, D, V))
    options = {"z_loss": 1e-2, "label_smoothing": 0.1, "chunk_length": 4}
    (loss, sums), (d_hidden_BTD, d_head_VD) = value_and_gradients(
        cross_entropy, arguments, **options
    )
    halves = []
    for rows in (slice(0, 2), slice(2, 4)):
        half = (arguments[0][rows], arguments[1], arguments[2][rows], arguments[3][rows])
        halves.append(value_and_gradients(cross_entropy, half, **options))
    added = jax.tree.map(jnp.add, halves[0][0], halves[1][0])
    assert_close(added, (loss, sums), rtol=1e-6, atol=0)
    joined_BTD = jnp.concatenate([half[1][0] for half in halves])
    np.testing.assert_allclose(joined_BTD, d_hidden_BTD, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(halves[0][1][1] + halves[1][1][1], d_head_VD, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("chunk_length", "remat"), [(10, True), (4, True), (4, False)])
def test_inside_a_larger_differentiated_program(remat, chunk_length):
    # The loss divided by the weight, a head that is a transposed kernel, layers before, remat.
    hidden_BTD, head_VD, targets_BT, weights_BT = example()
    kernel_DV = head_VD.T

    def mean_loss(function, **options):
        def mean(hidden_BTD, kernel_DV):
            loss, sums = function(
                jnp.tanh(hidden_BTD) * D**-0.5, kernel_DV.T, targets_BT, weights_BT,
                z_loss=1e-2, label_smoothing=0.1, **options,
            )  # fmt: skip
            return 7 * loss / sums.weight

        return jax.jit(jax.value_and_grad(jax.checkpoint(mean) if remat else mean, (0, 1)))

    actual = mean_loss(cross_entropy, chunk_length=chunk_length)(hidden_BTD, kernel_DV)
    expected = mean_loss(cross_entropy_reference)(hidden_BTD, kernel_DV)
    assert_close(actual, expected, rtol=2e-6, atol=1e-6)


def test_the_sums_carry_no_gradient():
    hidden_BTD, *rest = example()

    @jax.jit
    @jax.grad
    def parts_gradient(hidden_BTD):
        _, sums = cross_entropy(hidden_BTD, *rest, z_loss=1e-2, label_smoothing=0.0)
        return sums.cross_entropy + sums.z_loss

    assert not np.any(parts_gradient(hidden_BTD))


def array_sizes(text):
    """Elements of every array in a compiled program's text."""
    shapes = re.findall(r"\b(?:f32|bf16|s32|pred|u32|f64)\[([0-9,]+)\]", text)
    return {math.prod(int(n) for n in shape.split(",")) for shape in shapes}


def test_the_compiled_program_holds_one_chunk_of_logits():
    batch, length, width, vocabulary, chunk_length = 2, 24, 16, 1000, 4
    arguments = example(shape=(batch, length, width, vocabulary))

    def compiled(function, **options):
        def loss(hidden_BTD, head_VD):
            return function(
                hidden_BTD, head_VD, *arguments[2:], z_loss=1e-4, label_smoothing=0.1, **options
            )[0]

        grad = jax.jit(jax.value_and_grad(loss, (0, 1)))
        return grad.lower(*arguments[:2]).compile()

    whole = batch * length * vocabulary
    reference = compiled(cross_entropy_reference)
    chunked = compiled(cross_entropy, chunk_length=chunk_length)
    # The largest array is the head or its gradient, not logits.
    assert max(array_sizes(reference.as_text())) == whole
    assert max(array_sizes(chunked.as_text())) == width * vocabulary
    temporary = chunked.memory_analysis().temp_size_in_bytes
    assert temporary < reference.memory_analysis().temp_size_in_bytes / 2
    # Logits and their gradient, the head's gradient, and change.
    chunk = batch * chunk_length * vocabulary
    assert temporary < 4 * (2 * chunk + 2 * width * vocabulary + 2 * batch * length * width)


def test_evaluation_computes_no_gradients():
    arguments = example(shape=(2, 24, 16, 1000))

    def loss(*arguments):
        options = {"z_loss": 1e-4, "label_smoothing": 0.0, "chunk_length": 6}
        return cross_entropy(*arguments, **options)[0]

    def compiled_matmuls(function):
        # Each chunk's matmuls stand in the loop's body once.
        return jax.jit(function).lower(*arguments).as_text().count("stablehlo.dot_general")

    assert compiled_matmuls(loss) == 1
    assert compiled_matmuls(jax.grad(loss, (0, 1))) == 3


def test_automatic_chunks(monkeypatch):
    seen = []

    def record(*arguments):
        seen.append(arguments[-1])
        return jnp.zeros(()), CrossEntropySums(0, 0, 0, 0)

    monkeypatch.setattr(losses, "AUTOMATIC_CHUNK_ELEMENTS", B * V * 4)
    monkeypatch.setattr(losses, "_cross_entropy", record)
    for length in (4, 5, 10, 12, 13):
        arguments = example(shape=(B, length, D, V))
        cross_entropy(*arguments, z_loss=0.0, label_smoothing=0.0)
    assert seen == [1, 2, 3, 3, 4]
    # More rows than fit: one position at a time, no fewer.
    cross_entropy(*example(shape=(B * 5, 7, D, V)), z_loss=0.0, label_smoothing=0.0)
    assert seen[-1] == 7


def test_sharded_equals_unsharded():
    if jax.device_count() < 4:
        pytest.skip("needs 4 devices")
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=auto, devices=jax.devices()[:4])
    spec = jax.sharding.PartitionSpec
    arguments = example(shape=(4, T, D, 14))
    options = {"z_loss": 1e-2, "label_smoothing": 0.1, "chunk_length": 4}
    expected = value_and_gradients(cross_entropy, arguments, **options)
    specs = (spec("data"), spec("model"), spec("data"), spec("data"))
    sharded = [
        jax.device_put(x, jax.sharding.NamedSharding(mesh, s))
        for x, s in zip(arguments, specs, strict=True)
    ]
    with jax.set_mesh(mesh):
        actual = value_and_gradients(cross_entropy, sharded, **options)
    assert_close(actual, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"label_smoothing": 1.0}, "LossConfig.label_smoothing = 1.0: should be in"),
        ({"label_smoothing": -0.1}, "LossConfig.label_smoothing = -0.1: should be in"),
        ({"z_loss": -1e-4}, "LossConfig.z_loss = -0.0001: should be 0 or more"),
        ({"z_loss": math.nan}, "LossConfig.z_loss = nan: should be 0 or more"),
    ],
)
def test_bad_configs(fields, message):
    with pytest.raises(UserError, match=re.escape(message)):
        LossConfig(**fields)


def test_bad_chunk_length():
    with pytest.raises(UserError, match="chunk_length = 0: should be 1 or more"):
        cross_entropy(*example(), z_loss=0.0, label_smoothing=0.0, chunk_length=0)


def test_default_config():
    assert LossConfig() == LossConfig(label_smoothing=0.0, z_loss=1e-4)
