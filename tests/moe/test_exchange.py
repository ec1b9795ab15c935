"""Dropless experts across devices: the same numbers on every mesh, and what travels."""

import collections
import functools
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from switchx import sharding
from switchx.moe import exchange
from switchx.moe.assignment import Tokens
from switchx.moe.config import MoeConfig
from switchx.moe.layer import MoeLayer

B, T, D, F, E = 8, 6, 12, 16, 8
CONFIG = MoeConfig(
    num_experts=E,
    router="top_k",
    top_k=2,
    renormalize="after_dropping",
    capacity_factor=None,
    eval_capacity_factor=None,
    group_size="row",
    jitter_noise=0.1,
    expert_dropout_rate=0.3,
    expert_bias=True,
)
LAYER = MoeLayer(CONFIG, F, ("gelu", "linear"), init_scale=1.0, train=True)


@functools.cache
def outputs_and_gradients(**shape):
    """((loss, (outputs, statistics)), gradients) and the compiled program, on a mesh."""
    rng = np.random.default_rng(0)
    x_BTD = rng.standard_normal((B, T, D)).astype(np.float32)
    mask_BT = np.arange(T)[None] < rng.integers(2, T + 1, (B, 1))
    keys = {name: jax.random.key(n) for n, name in enumerate(("params", "dropout", "jitter"))}
    known = Tokens(jnp.asarray(mask_BT))
    boxed = jax.eval_shape(LAYER.init, keys, x_BTD, known)["params"]
    params = jax.tree.map(
        lambda leaf: 0.3 * rng.standard_normal(leaf.shape).astype(np.float32), nn.unbox(boxed)
    )

    def loss(params, x_BTD, mask_BT):
        y_BTD, stats = LAYER.apply({"params": params}, x_BTD, Tokens(mask_BT), rngs=keys)
        return jnp.sum(jnp.sin(y_BTD)) + stats.load_balance_loss, (y_BTD, stats)

    mesh = sharding.make_mesh(shape, jax.devices()[: math.prod(shape.values())])
    places, _ = sharding.shardings(sharding.logical_axes(boxed), params, mesh)
    params = jax.device_put(params, places)
    x_BTD, mask_BT = jax.device_put((x_BTD, mask_BT), sharding.batch_sharding(mesh))
    with sharding.use(mesh):
        function = jax.value_and_grad(loss, (0, 1), has_aux=True)
        compiled = jax.jit(function).lower(params, x_BTD, mask_BT).compile()
    return jax.device_get(compiled(params, x_BTD, mask_BT)), compiled.as_text()


@pytest.mark.parametrize(
    "shape",
    [{"expert": 8}, {"data": 2, "expert": 2, "model": 2}, {"fsdp": 2, "expert": 4}],
    ids=str,
)
def test_every_mesh_gives_what_one_device_gives(shape):
    expected, _ = outputs_and_gradients(data=1)
    found, _ = outputs_and_gradients(**shape)
    for (path, a), b in zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        error = np.linalg.norm(np.asarray(a) - b)
        assert error <= 1e-5 * np.linalg.norm(b), jax.tree_util.keystr(path)
    stats = expected[0][1][1]
    assert stats.num_dropped_K.sum() == 0 and stats.num_tokens < B * T


def test_rows_travel_by_all_to_all_and_nothing_is_gathered():
    text = re.sub(r"/\*.*?\*/", "", outputs_and_gradients(expert=8)[1])
    sizes = collections.defaultdict(list)
    kinds = "all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute"
    for result, kind in re.findall(rf"= ([^=\n]*?) ({kinds})(?:-start)?\(", text):
        arrays = re.findall(r"[a-z]+\d*\[([\d,]*)\]", result)
        sizes[kind].append(sum(math.prod(int(n) for n in a.split(",") if n) for a in arrays))
    # There and back, in both passes: room for all choices of a device on every other one.
    rows = 8 * (B // 8) * T * CONFIG.top_k * D
    assert [size for size in sizes["all-to-all"] if size >= rows] == [rows] * 4
    assert max(sizes["all-gather"], default=0) <= B * T
    assert not sizes["reduce-scatter"] and not sizes["collective-permute"]


def test_only_what_is_there_is_sent_where_the_platform_can(monkeypatch):
    """`ragged_all_to_all` as documented, made of what the CPU has, against an all-to-all."""
    devices, room = 4, 3
    mesh = sharding.make_mesh({"expert": 4}, jax.devices()[:4])
    rng = np.random.default_rng(1)
    sizes_FT = rng.integers(0, room + 1, (devices, devices)).astype(np.int32)
    filled = np.arange(room) < sizes_FT[..., None]
    x = rng.standard_normal((devices, devices, room, D)) * filled[..., None]

    def ragged(operand, output, starts, sent, there, received, *, axis_name):
        me = jax.lax.axis_index(axis_name)
        gather = functools.partial(jax.lax.all_gather, axis_name=axis_name)
        operands, starts, sent, there = map(gather, (operand, starts, sent, there))
        for source in range(devices):
            offset = jnp.arange(len(output)) - there[source, me]
            mine = (offset >= 0) & (offset < sent[source, me])
            rows = operands[source][jnp.clip(starts[source, me] + offset, 0, len(operand) - 1)]
            output = jnp.where(mine[:, None], rows, output)
        return output

    def send(x_SD, sizes_P, received_P):
        y_SD, vjp = jax.vjp(lambda x: exchange._send(x, sizes_P, received_P, "expert"), x_SD)
        return y_SD, vjp(y_SD)[0]

    def run():
        with sharding.use(mesh):
            mapped = jax.shard_map(
                send, in_specs=P("expert"), out_specs=P("expert"), check_vma=False
            )
            flat = jnp.asarray(x.reshape(-1, D), jnp.float32)
            sizes = jnp.asarray(sizes_FT.reshape(-1)), jnp.asarray(sizes_FT.T.reshape(-1))
            return jax.device_get(jax.jit(mapped)(flat, *sizes))

    plain = run()
    expected = x.swapaxes(0, 1).reshape(-1, D).astype(np.float32)
    np.testing.assert_array_equal(plain[0], expected)
    np.testing.assert_array_equal(plain[1], x.reshape(-1, D).astype(np.float32))
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged)
    monkeypatch.setattr(sharding, "platform", lambda: "tpu")
    for found, wanted in zip(run(), plain, strict=True):
        np.testing.assert_array_equal(found, wanted)
