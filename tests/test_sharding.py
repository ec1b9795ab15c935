"""Mesh and logical axes; the same numbers on every mesh; what crosses between devices."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from switchx import sharding
from switchx.errors import UserError
from switchx.models.config import ModelConfig
from switchx.models.t5 import T5
from switchx.moe.assignment import Tokens
from switchx.moe.config import MoeConfig
from switchx.moe.layer import MoeLayer


class TestMakeMesh:
    @pytest.mark.parametrize(
        ("shape", "expected"),
        [
            ({"data": 8}, (8, 1, 1)),
            ({"expert": 8}, (1, 8, 1)),
            ({"data": 2, "expert": 2, "model": 2}, (2, 2, 2)),
            ({"model": 2, "data": 4}, (4, 1, 2)),
            ({"data": -1}, (8, 1, 1)),
            ({"data": 2, "expert": -1}, (2, 4, 1)),
            ({"data": 2, "expert": 4, "model": -1}, (2, 4, 1)),
        ],
        ids=str,
    )
    def test_shapes(self, shape, expected):
        mesh = sharding.make_mesh(shape)
        assert mesh.axis_names == ("data", "expert", "model")
        assert mesh.devices.shape == expected
        assert sharding.batch_shards(mesh) == expected[0] * expected[1]

    def test_devices_in_order_model_fastest(self):
        mesh = sharding.make_mesh({"data": 2, "expert": 2, "model": 2})
        assert mesh.devices.ravel().tolist() == jax.devices()
        assert mesh.devices[0, 1, 0] == jax.devices()[2]

    def test_some_devices(self):
        assert sharding.make_mesh({}, jax.devices()[:1]).devices.shape == (1, 1, 1)
        mesh = sharding.make_mesh({"data": -1}, jax.devices()[2:5])
        assert mesh.devices.ravel().tolist() == jax.devices()[2:5]

    @pytest.mark.parametrize(
        ("shape", "message"),
        [
            ({"expart": 8}, "MESH: unknown axis 'expart'; did you mean 'expert'?"),
            ({"pipeline": 8}, "MESH: unknown axis 'pipeline'; valid: data, expert, model"),
            ({"data": -1, "expert": -1}, "only one axis may be -1"),
            ({"data": 0}, "sizes are positive integers, or -1"),
            ({"data": -2}, "sizes are positive integers, or -1"),
            ({}, "does not fill 8 cpu device(s); sizes must multiply to 8"),
            ({"data": 4}, "MESH = {'data': 4} does not fill 8 cpu device(s)"),
            ({"data": 16}, "does not fill 8"),
            ({"data": 3, "expert": -1}, "does not fill 8"),
            ({"data": 16, "expert": -1}, "does not fill 8"),
        ],
        ids=str,
    )
    def test_errors(self, shape, message):
        with pytest.raises(UserError) as error:
            sharding.make_mesh(shape)
        assert message in str(error.value)


class TestLogicalAxes:
    def test_an_initializer_names_the_dimensions(self):
        init = sharding.axes(nn.initializers.ones, ("embed", None))
        boxed = {"kernel": init(jax.random.key(0), (2, 3)), "bias": jnp.zeros(3)}
        names = sharding.logical_axes(boxed)
        assert names["kernel"] == P("embed", None)
        assert not any(names["bias"])
        np.testing.assert_array_equal(nn.unbox(boxed)["kernel"], np.ones((2, 3)))

    def test_rules_put_names_on_mesh_axes(self):
        mesh = sharding.make_mesh({"data": 2, "expert": 2, "model": 2})
        names = {
            "wi": P("expert", "embed", "mlp"),
            "scanned": P("layers", "expert", "mlp", "embed"),
            "embedding": P("vocab", "embed"),
            "query": P("embed", "heads"),
            "router": P("embed", "experts"),
            "step": P(),
            "unnamed": P(None, "mlp"),
        }
        specs = {name: s.spec for name, s in sharding.shardings(names, mesh).items()}
        assert specs == {
            "wi": P("expert", None, "model"),
            "scanned": P(None, "expert", "model", None),
            "embedding": P("model", None),
            "query": P(None, "model"),
            "router": P(None, None),
            "step": P(),
            "unnamed": P(None, "model"),
        }

    def test_constrain_does_nothing_without_a_mesh(self):
        x = jnp.ones((8, 3))
        assert "sharding" not in str(
            jax.make_jaxpr(lambda x: sharding.constrain(x, "batch", None))(x)
        )

    def test_constrain_splits_the_batch_over_data_and_expert(self):
        mesh = sharding.make_mesh({"data": 2, "expert": 2, "model": 2})
        with sharding.use(mesh):
            x = jax.jit(lambda x: sharding.constrain(x, "batch", "mlp"))(jnp.ones((8, 4)))
        assert x.sharding.is_equivalent_to(
            jax.sharding.NamedSharding(mesh, P(("data", "expert"), "model")), 2
        )
        assert sharding.batch_sharding(mesh).spec == P(("data", "expert"))

    @pytest.mark.parametrize("scan_layers", [False, True])
    def test_every_parameter_of_a_model_has_its_place(self, scan_layers):
        config = ModelConfig(
            d_model=32,
            num_encoder_layers=4,
            num_decoder_layers=2,
            activations=("gelu", "linear"),
            tie_embeddings=False,
            scan_layers=scan_layers,
            moe=MoeConfig(router_bias=True),
        )
        tokens = jnp.zeros((1, 1), jnp.int32)
        boxed = jax.eval_shape(lambda: T5(config).init(jax.random.key(0), tokens, tokens))["params"]
        mesh = sharding.make_mesh({"data": 2, "expert": 2, "model": 2})
        specs = sharding.shardings(sharding.logical_axes(boxed), mesh)
        flat = jax.tree.leaves_with_path(specs)
        assert len(flat) == len(jax.tree.leaves(nn.unbox(boxed)))
        shapes = jax.tree.leaves(nn.unbox(boxed))
        for (path, leaf), shape in zip(flat, shapes, strict=True):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            leading = (None,) if scan_layers and "blocks_" in name else ()
            assert len(leaf.spec) == len(shape.shape), name
            if "expert/wo" in name:
                assert leaf.spec == P(*leading, "expert", "model", None)
            elif "expert/wi" in name:
                assert leaf.spec == P(*leading, "expert", None, "model")
            elif "router" in name or "norm" in name:
                assert not any(leaf.spec), name
            else:  # each of the others is split over the model axis, once
                assert [axis for axis in leaf.spec if axis] == ["model"], name


B, S, T, E = 8, 6, 4, 8
CONFIG = ModelConfig(
    vocab_size=38,
    d_model=12,
    d_ff=16,
    num_heads=2,
    head_dim=5,
    num_encoder_layers=1,
    num_decoder_layers=1,
    encoder_sparse_layers=(0,),
    moe=MoeConfig(
        num_experts=E, capacity_factor=1.0, min_capacity=0, group_size="row", jitter_noise=0.0
    ),
)


@functools.cache
def random_problem():
    """Parameters, their axes and a batch with padding, drawn by NumPy."""
    rng = np.random.default_rng(0)
    tokens = jnp.zeros((1, 1), jnp.int32)
    boxed = jax.eval_shape(lambda: T5(CONFIG).init(jax.random.key(0), tokens, tokens))["params"]
    params = jax.tree.map(
        lambda leaf: rng.normal(0, leaf.shape[0] ** -0.5, leaf.shape).astype(np.float32),
        nn.unbox(boxed),
    )
    batch = {
        "encoder_tokens": rng.integers(1, 38, (B, S), dtype=np.int32),
        "decoder_input_tokens": rng.integers(1, 38, (B, T), dtype=np.int32),
        "encoder_mask": np.arange(S)[None] < rng.integers(2, S + 1, (B, 1)),
        "decoder_mask": np.arange(T)[None] < rng.integers(1, T + 1, (B, 1)),
    }
    return params, sharding.logical_axes(boxed), batch


@functools.cache
def loss_and_gradients(**shape):
    """Loss, statistics and gradients on a mesh of this shape."""
    num_devices = int(np.prod(list(shape.values())))
    mesh = sharding.make_mesh(shape, jax.devices()[:num_devices])
    params, names, batch = random_problem()
    params = jax.device_put(params, sharding.shardings(names, mesh))
    batch = jax.device_put(batch, sharding.batch_sharding(mesh))

    def loss(params, batch):
        output = T5(CONFIG).apply({"params": params}, **batch, train=True)
        layers = output.router["encoder"] + output.router["decoder"]
        router = sum(layer.load_balance_loss + layer.router_z_loss for layer in layers)
        weights_BT1 = batch["decoder_mask"][..., None]
        return jnp.sum(jnp.sin(output.logits) * weights_BT1) + router, (
            [layer.tokens_per_expert_E for layer in layers],
            [layer.num_dropped_K for layer in layers],
        )

    with sharding.use(mesh):
        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params, batch)


class TestMeshIndependence:
    @pytest.mark.parametrize(
        "shape",
        [{"data": 8}, {"expert": 8}, {"data": 2, "expert": 2, "model": 2}],
        ids=str,
    )
    def test_loss_and_gradients(self, shape):
        (loss, routing), gradients = loss_and_gradients(data=1)
        (other_loss, other_routing), other_gradients = loss_and_gradients(**shape)
        np.testing.assert_allclose(other_loss, loss, rtol=1e-5)
        # Who went where and who was dropped is the same to the token.
        jax.tree.map(np.testing.assert_array_equal, other_routing, routing)
        assert sum(routing[1]) > 0
        for (path, a), b in zip(
            jax.tree.leaves_with_path(gradients), jax.tree.leaves(other_gradients), strict=True
        ):
            error = np.linalg.norm(np.asarray(b) - np.asarray(a)) / np.linalg.norm(a)
            assert error < 1e-5, jax.tree_util.keystr(path)

    def test_gradients_lie_where_their_parameters_lie(self):
        _, gradients = loss_and_gradients(data=2, expert=2, model=2)
        wi = gradients["encoder"]["layers_0"]["mlp"]["expert"]["wi"]
        assert wi.addressable_shards[0].data.shape == (E // 2, 12, 16 // 2)


class TestCommunication:
    """What one MoE layer, forward and backward, sends between 8 devices."""

    @staticmethod
    def collectives(shape):
        """Collective operations of the compiled program: [(name, shape of the result)]."""
        rows, length, width = 16, 4, 12
        config = MoeConfig(num_experts=E, group_size="row", jitter_noise=0.0)
        layer = MoeLayer(config, 24, ("relu",), init_scale=0.1, train=True)
        mesh = sharding.make_mesh(shape)
        x_BTD = jax.ShapeDtypeStruct(
            (rows, length, width), jnp.float32, sharding=sharding.batch_sharding(mesh)
        )
        mask_BT = jax.ShapeDtypeStruct(
            (rows, length), jnp.bool, sharding=sharding.batch_sharding(mesh)
        )
        boxed = jax.eval_shape(
            lambda x, mask: layer.init(jax.random.key(0), x, Tokens(mask)), x_BTD, mask_BT
        )["params"]
        params = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            nn.unbox(boxed),
            sharding.shardings(sharding.logical_axes(boxed), mesh),
        )

        def loss(params, x_BTD, mask_BT):
            y_BTD, stats = layer.apply({"params": params}, x_BTD, Tokens(mask_BT))
            return jnp.sum(jnp.sin(y_BTD)) + stats.load_balance_loss + stats.router_z_loss

        with sharding.use(mesh):
            step = jax.jit(jax.value_and_grad(loss, (0, 1)))
            text = step.lower(params, x_BTD, mask_BT).compile().as_text()
        names = "all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute"
        return re.findall(rf"= (.*?) ({names})(?:-start)?\(", text)

    def test_experts_exchange_slots_by_all_to_all_and_gather_nothing(self):
        names = [name for _, name in self.collectives({"expert": 8})]
        # Slots to experts and back, and their gradients the same ways.
        assert names.count("all-to-all") == 4
        assert set(names) <= {"all-to-all", "all-reduce"}

    def test_data_parallel_layers_only_sum(self):
        names = {name for _, name in self.collectives({"data": 8})}
        assert names == {"all-reduce"}
