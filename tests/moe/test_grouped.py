"""Products of rows sorted by expert: against a loop over rows, forward and backward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchx.moe import grouped

I, O = 5, 3
SIZES = {
    "uneven": [7, 0, 12, 1, 30],
    "one-has-all": [0, 0, 50, 0, 0],
    "nobody": [0, 0, 0, 0, 0],
    "rows-of-nobody": [3, 9, 0, 8, 1],
    "many-experts": [1] * 20 + [0] * 17 + [10],
}


def by_loop(x_NI, kernel_EIO, sizes_E, cotangent_NO):
    """Row after row in NumPy; rows of nobody are zeros."""
    y_NO = np.zeros((len(x_NI), O))
    grad_x_NI, grad_EIO = np.zeros_like(x_NI), np.zeros_like(kernel_EIO)
    for n, e in enumerate(np.repeat(np.arange(len(sizes_E)), sizes_E)):
        y_NO[n] = x_NI[n] @ kernel_EIO[e]
        grad_x_NI[n] = kernel_EIO[e] @ cotangent_NO[n]
        grad_EIO[e] += np.outer(x_NI[n], cotangent_NO[n])
    return y_NO, grad_x_NI, grad_EIO


@functools.partial(jax.jit, static_argnums=0)
def compute(name, x_NI, kernel_EIO, sizes_E, cotangent_NO):
    product = grouped.IMPLEMENTATIONS[name]
    y_NO, vjp = jax.vjp(lambda x, kernel: product(x, kernel, sizes_E), x_NI, kernel_EIO)
    return y_NO, *vjp(cotangent_NO)


# The TPU's kernels know no float64.
CASES = [
    (name, *case)
    for name in grouped.IMPLEMENTATIONS
    for case in (("float64", 1e-12), ("float32", 2e-6), ("bfloat16", 3e-2))
    if (name, case[0]) != ("megablox", "float64")
]


@pytest.mark.parametrize(("name", "dtype", "tolerance"), CASES)
@pytest.mark.parametrize("sizes", SIZES)
def test_equals_loop_forward_and_backward(name, sizes, dtype, tolerance):
    sizes_E = np.asarray(SIZES[sizes])
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=shape) for shape in ((50, I), (len(sizes_E), I, O), (50, O))]
    with jax.enable_x64(dtype == "float64"):
        x_NI, kernel_EIO, cotangent_NO = (jnp.asarray(each, dtype) for each in arrays)
        found = compute(name, x_NI, kernel_EIO, jnp.asarray(sizes_E), cotangent_NO)
    rounded = [np.asarray(each, np.float64) for each in (x_NI, kernel_EIO, cotangent_NO)]
    expected = by_loop(*rounded[:2], sizes_E, rounded[2])
    found = [np.array(each, np.float64) for each in found]
    found[0][sizes_E.sum() :] = 0  # undefined
    for actual, desired in zip(found, expected, strict=True):
        np.testing.assert_allclose(actual, desired, rtol=tolerance, atol=10 * tolerance)


def test_blocks_of_the_loop():
    assert grouped.block_rows(4096, 8) == 512
    assert grouped.block_rows(4096, 128) == 32
    assert grouped.block_rows(64, 64) == 8
    assert grouped.block_rows(32, 64) == grouped.block_rows(1, 2) == 1
    assert grouped.block_rows(10**6, 2) == 512
