"""Parameters for model tests, drawn by NumPy in the shapes that a module asks for."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest


@pytest.fixture(scope="session")
def random_params():
    """Function from a module and its arguments to float32 parameters.

    Kernels have variance 1 / fan_in, so that every layer matters; norm scales lie around 1.
    """

    def draw(module, *arguments, seed=0, **keywords):
        init = jax.eval_shape(lambda: module.init(jax.random.key(0), *arguments, **keywords))
        rng = np.random.default_rng(seed)

        def leaf(path, shape):
            values = rng.normal(size=shape.shape)
            if path[-1].key == "kernel" or path[-1].key.startswith("w"):
                values *= shape.shape[-2] ** -0.5
            if path[-1].key == "scale":
                values = 1 + 0.1 * values
            return jnp.asarray(values, jnp.float32)

        return jax.tree_util.tree_map_with_path(leaf, nn.unbox(init)["params"])

    return draw
