"""The experts on their own: networks by hand, biases, widths and names."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from switchx.moe.experts import Experts
from switchx.sharding import logical_axes

E, N, D, F = 2, 3, 4, 5


def draw(module, x, seed=0):
    shapes = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), x)["params"])
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)


def test_every_expert_has_its_own_network_and_biases():
    x_END = np.random.default_rng(1).normal(size=(E, N, D)).astype(np.float32)
    module = Experts(E, F, ("relu",), 0.0, 0.1, bias=True)
    params = draw(module, x_END)
    shapes = {name: leaf.shape for name, leaf in params.items()}
    assert shapes == {"wi": (E, D, F), "wi_bias": (E, F), "wo": (E, F, D), "wo_bias": (E, D)}
    y_END = jax.jit(module.apply)({"params": params}, x_END)
    for e in range(E):
        hidden = np.maximum(x_END[e] @ params["wi"][e] + params["wi_bias"][e], 0)
        expected = hidden @ params["wo"][e] + params["wo_bias"][e]
        np.testing.assert_allclose(y_END[e], expected, rtol=1e-4, atol=1e-5)


def test_biases_of_gated_experts_are_inside_the_activation():
    x_END = np.random.default_rng(1).normal(size=(1, N, D)).astype(np.float32)
    module = Experts(1, F, ("relu", "linear"), 0.0, 0.1, bias=True)
    params = draw(module, x_END)
    gate = np.maximum(x_END[0] @ params["wi_0"][0] + params["wi_0_bias"][0], 0)
    hidden = gate * (x_END[0] @ params["wi_1"][0] + params["wi_1_bias"][0])
    y_END = jax.jit(module.apply)({"params": params}, x_END)
    expected = hidden @ params["wo"][0] + params["wo_bias"][0]
    np.testing.assert_allclose(y_END[0], expected, rtol=1e-4, atol=1e-5)


def test_one_network_is_not_split_over_expert_devices():
    x_END = jnp.ones((1, N, D))
    for num_experts, axis in ((1, None), (E, "expert")):
        module = Experts(num_experts, F, ("relu",), 0.0, 0.1)
        variables = jax.eval_shape(
            module.init, jax.random.key(0), jnp.broadcast_to(x_END, (num_experts, N, D))
        )
        assert tuple(logical_axes(variables["params"])["wi"]) == (axis, "expert_embed", "mlp")
