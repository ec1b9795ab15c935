"""Mesh and logical axes; the same numbers on every mesh; what crosses between devices."""

import ast
import collections
import functools
import math
import pathlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from switchx import sharding
from switchx.batch import Batch
from switchx.errors import UserError
from switchx.models.config import ModelConfig
from switchx.models.t5 import T5
from switchx.moe.config import MoeConfig
from switchx.training.losses import LossConfig
from switchx.training.optimizer import OptimizerConfig, make_optimizer
from switchx.training.state import create_state
from switchx.training.step import make_train_step


class TestMakeMesh:
    @pytest.mark.parametrize(
        ("shape", "expected"),
        [
            ({"data": 8}, (8, 1, 1, 1)),
            ({"expert": 8}, (1, 1, 8, 1)),
            ({"data": 2, "expert": 2, "model": 2}, (2, 1, 2, 2)),
            ({"model": 2, "data": 4}, (4, 1, 1, 2)),
            ({"data": -1}, (8, 1, 1, 1)),
            ({"fsdp": 4, "expert": -1}, (1, 4, 2, 1)),
            ({"data": 2, "expert": -1}, (2, 1, 4, 1)),
            ({"data": 2, "expert": 4, "model": -1}, (2, 1, 4, 1)),
        ],
        ids=str,
    )
    def test_shapes(self, shape, expected):
        mesh = sharding.make_mesh(shape)
        assert mesh.axis_names == ("data", "fsdp", "expert", "model")
        assert mesh.devices.shape == expected
        assert sharding.batch_shards(mesh) == math.prod(expected[:3])

    def test_devices_in_order_model_fastest(self):
        mesh = sharding.make_mesh({"data": 2, "expert": 2, "model": 2})
        assert mesh.devices.ravel().tolist() == jax.devices()
        assert mesh.devices[0, 0, 1, 0] == jax.devices()[2]

    def test_some_devices(self):
        assert sharding.make_mesh({}, jax.devices()[:1]).devices.shape == (1, 1, 1, 1)
        mesh = sharding.make_mesh({"data": -1}, jax.devices()[2:5])
        assert mesh.devices.ravel().tolist() == jax.devices()[2:5]

    @pytest.mark.parametrize(
        ("shape", "message"),
        [
            ({"expart": 8}, "MESH: unknown axis 'expart'; did you mean 'expert'?"),
            ({"pipeline": 8}, "MESH: unknown axis 'pipeline'; valid: data, expert, fsdp, model"),
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

    NAMES = {
        "wi": P("expert", "expert_embed", "mlp"),
        "scanned": P("layers", "expert", "mlp", "expert_embed"),
        "embedding": P("vocab", "embed"),
        "query": P("embed", "heads"),
        "router": P("embed", "experts"),
        "scale": P("norm"),
        "step": P(),
        "unnamed": P(None, "mlp"),
    }
    SHAPES = {
        "wi": (4, 6, 8),
        "scanned": (3, 4, 8, 6),
        "embedding": (10, 6),
        "query": (6, 12),
        "router": (6, 4),
        "scale": (6,),
        "step": (),
        "unnamed": (5, 8),
    }

    def lay(self, shape, changes=None):
        """Mesh axes by parameter, and what was dropped."""
        mesh = sharding.make_mesh(shape)
        shapes = {
            name: jax.ShapeDtypeStruct(sizes, jnp.float32) for name, sizes in self.SHAPES.items()
        }
        rules = sharding.change_rules(changes or {})
        placed, dropped = sharding.shardings(self.NAMES, shapes, mesh, rules)
        return {name: each.spec for name, each in placed.items()}, dropped

    def test_rules_put_names_on_mesh_axes(self):
        specs, dropped = self.lay({"fsdp": 2, "expert": 2, "model": 2})
        assert specs == {
            "wi": P("expert", "fsdp", "model"),
            "scanned": P(None, "expert", "model", "fsdp"),
            "embedding": P("model", "fsdp"),
            "query": P("fsdp", "model"),
            "router": P("fsdp", None),
            "scale": P(None),
            "step": P(),
            "unnamed": P(None, "model"),
        }
        assert not dropped

    def test_a_width_that_does_not_divide_stays_whole_and_is_reported(self):
        specs, dropped = self.lay({"fsdp": 4, "expert": 2})
        assert specs["wi"] == P("expert", None, "model") and specs["query"] == P(None, "model")
        assert {each.parameter for each in dropped} == {
            "wi",
            "scanned",
            "embedding",
            "query",
            "router",
        }
        assert str(dropped[0]) == "embedding: embed = 6 does not divide by fsdp = 4"

    def test_rules_can_be_changed(self):
        changes = {"embed": ["fsdp", "expert"], "vocab": None}
        specs, dropped = self.lay({"fsdp": 2, "expert": 4}, changes)
        assert specs["embedding"] == P(None, "fsdp")  # 6 divides by 2, not by 8
        assert str(dropped[0]) == "embedding: embed = 6 does not divide by fsdp x expert = 8"

    @pytest.mark.parametrize(
        ("shape", "changes", "message"),
        [
            (
                {"expert": 8},
                {},
                "'expert' = 4 of scanned does not divide by mesh axis expert = 8, on which the "
                "rules put it; what fits: 1, 2, 4",
            ),
            (
                {"data": 4, "model": 2},
                {"embed": "model"},
                "Experiment.sharding_rules: 'vocab' and 'embed', two dimensions of embedding, both "
                "lie on mesh axis 'model'; change the rule of one",
            ),
            ({"data": 8}, {"embd": "model"}, "unknown logical axis 'embd'; did you mean 'embed'?"),
            (
                {"data": 8},
                {"mlp": ("model", "exprt")},
                "Experiment.sharding_rules: 'mlp' lies on unknown mesh axis 'exprt'; did you mean "
                "'expert'?",
            ),
            ({"data": 8}, {"mlp": 3}, "'mlp' lies on unknown mesh axis 3"),
            ({"fsdp": 8}, {"embed": ["fsdp", "fsdp"]}, "'embed' lies on a mesh axis twice"),
        ],
    )
    def test_rules_that_cannot_hold(self, shape, changes, message):
        with pytest.raises(UserError) as error:
            self.lay(shape, changes)
        assert message in str(error.value)

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
            jax.sharding.NamedSharding(mesh, P(("data", "fsdp", "expert"), "model")), 2
        )
        assert sharding.batch_sharding(mesh).spec == P(("data", "fsdp", "expert"))

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
        mesh = sharding.make_mesh({"fsdp": 2, "expert": 2, "model": 2})
        specs, _ = sharding.shardings(sharding.logical_axes(boxed), nn.unbox(boxed), mesh)
        flat = jax.tree.leaves_with_path(specs)
        assert len(flat) == len(jax.tree.leaves(nn.unbox(boxed)))
        shapes = jax.tree.leaves(nn.unbox(boxed))
        for (path, leaf), shape in zip(flat, shapes, strict=True):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            leading = (None,) if scan_layers and "blocks_" in name else ()
            assert len(leaf.spec) == len(shape.shape), name
            if "expert/wo" in name:
                assert leaf.spec == P(*leading, "expert", "model", "fsdp")
            elif "expert/wi" in name:
                assert leaf.spec == P(*leading, "expert", "fsdp", "model")
            elif "norm" in name or "router/bias" in name:
                assert not any(leaf.spec), name
            elif "router" in name:
                assert leaf.spec == P(*leading, "fsdp", None)
            elif "rel_embedding" in name:
                assert leaf.spec == P("model", None)
            else:  # each of the others is split over both, once
                assert sorted(axis for axis in leaf.spec if axis) == ["fsdp", "model"], name


B, S, T, E = 8, 6, 4, 8
CONFIG = ModelConfig(
    vocab_size=40,
    d_model=24,
    d_ff=32,
    num_heads=8,
    head_dim=3,
    num_encoder_layers=1,
    num_decoder_layers=1,
    encoder_sparse_layers=(0,),
    dropout_rate=0.1,
    moe=MoeConfig(
        num_experts=E,
        capacity_factor=1.0,
        min_capacity=0,
        group_size="row",
        jitter_noise=0.1,
        expert_dropout_rate=0.2,
    ),
)
# The presets of gin_configs/meshes, and data parallelism that shares out parameters beside experts.
MESHES = {
    path.stem: ast.literal_eval(path.read_text().split("MESH = ")[1])
    for path in sorted(pathlib.Path("gin_configs/meshes").glob("*.gin"))
}
MESHES |= {"expert": {"expert": -1}, "fsdp_expert": {"fsdp": 4, "expert": 2}}


@functools.cache
def compiled_step(name):
    """A training step of the model on a mesh, with its plan and a batch's places."""
    shape = MESHES.get(name, {"data": 1})
    mesh = sharding.make_mesh(shape, None if name in MESHES else jax.devices()[:1])
    with sharding.use(mesh):
        plan = create_state(
            T5(CONFIG),
            lambda axes: make_optimizer(OptimizerConfig(name="adamw", learning_rate=1e-3), axes),
            seed=0,
            mesh=mesh,
        )
        step = make_train_step(T5(CONFIG), LossConfig(), plan.optimizer, log_norms=name == "fsdp")
        places = jax.tree.map(lambda leaf: leaf.sharding, plan.abstract)
        batch = jax.device_put(random_batch(), sharding.batch_sharding(mesh))
        jitted = jax.jit(step, out_shardings=(places, None))
        return plan, batch, jitted.lower(plan.abstract, batch).compile()


def random_batch():
    """Rows with padding, drawn by NumPy."""
    rng = np.random.default_rng(0)
    sides = {}
    for side, length in (("encoder", S), ("decoder", T)):
        real_BT = np.arange(length)[None] < rng.integers(2, length + 1, (B, 1))
        sides[f"{side}_segment_ids"] = real_BT.astype(np.int32)
        sides[f"{side}_positions"] = np.tile(np.arange(length, dtype=np.int32), (B, 1))
        sides[f"{side}_task_ids"] = np.zeros((B, length), np.int32)
    tokens = {
        name: rng.integers(1, 40, (B, length), dtype=np.int32)
        for name, length in (
            ("encoder_tokens", S),
            ("decoder_input_tokens", T),
            ("decoder_target_tokens", T),
        )
    }
    weights = sides["decoder_segment_ids"].astype(np.float32)
    return Batch(**tokens, **sides, decoder_loss_weights=weights)


@functools.cache
def five_steps(name):
    """Metrics of five training steps, dropout and jitter on, and the state after the last."""
    plan, batch, step = compiled_step(name)
    state, metrics = plan.create(), []
    for _ in range(5):
        state, each = step(state, batch)
        metrics.append(jax.device_get(each))
    return metrics, jax.device_get(state)


class TestMeshIndependence:
    @pytest.mark.parametrize("name", MESHES)
    def test_five_steps(self, name):
        expected, expected_state = five_steps("one device")
        found, state = five_steps(name)
        for a, b in zip(found, expected, strict=True):
            # Who went where and who was dropped is the same to the token.
            for field in ("num_choices_K", "num_dropped_K", "tokens_per_expert_E", "num_tokens"):
                for stack, router in b.sums.router.items():
                    np.testing.assert_array_equal(
                        getattr(a.sums.router[stack], field), getattr(router, field)
                    )
            np.testing.assert_allclose(a.grad_norm, b.grad_norm, rtol=1e-5)
            for x, y in zip(jax.tree.leaves(a.sums), jax.tree.leaves(b.sums), strict=True):
                np.testing.assert_allclose(x, y, rtol=1e-5)
        assert sum(each.sums.router["encoder"].num_dropped_K.sum() for each in expected) > 0
        for (path, a), b in zip(
            jax.tree.leaves_with_path(state.params),
            jax.tree.leaves(expected_state.params),
            strict=True,
        ):
            error = np.linalg.norm(a - b) / np.linalg.norm(b)
            assert error < 1e-5, jax.tree_util.keystr(path)

    def test_parameters_lie_where_they_should(self):
        plan, _, _ = compiled_step("fsdp_expert")
        state = plan.create()
        expert = state.params["encoder"]["layers_0"]["mlp"]["expert"]["wi"]
        assert expert.addressable_shards[0].data.shape == (E // 2, 24 // 4, 32)


class TestCommunication:
    """What a training step sends between 8 devices, read from the compiled program."""

    @staticmethod
    def collectives(name):
        """Kind → bytes of the results of every such operation on one device."""
        text = re.sub(r"/\*.*?\*/", "", compiled_step(name)[2].as_text())
        kinds = "all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute"
        found = collections.defaultdict(list)
        for result, kind in re.findall(rf"= ([^=\n]*?) ({kinds})(?:-start)?\(", text):
            arrays = re.findall(r"[a-z]+\d*\[([\d,]*)\]", result)
            elements = sum(math.prod(int(n) for n in a.split(",") if n) for a in arrays)
            found[kind].append(4 * elements)
        return dict(found)

    # Bytes of the sparse layer's slots on one device (rows · E · capacity · d_model), of all
    # gradients, and of parameters whose `embed` can be shared out.
    SLOTS = B * E * 1 * 24 * 4

    @staticmethod
    def parameter_bytes(wanted=()):
        plan, _, _ = compiled_step("fsdp")
        leaves = jax.tree.leaves(plan.abstract.params)
        return sum(4 * leaf.size for leaf in leaves if set(wanted) <= set(leaf.sharding.spec))

    @pytest.mark.parametrize(
        ("name", "devices"), [("expert", 8), ("expert_data", 8), ("expert_model_data", 4)]
    )
    def test_experts_exchange_slots_by_all_to_all_and_gather_nothing(self, name, devices):
        found = self.collectives(name)
        # Slots to experts and back, and their gradients the same ways.
        assert found["all-to-all"] == [self.SLOTS // devices] * 4
        assert set(found) == {"all-to-all", "all-reduce"}

    @pytest.mark.parametrize("name", ["data", "model", "model_data"])
    def test_without_expert_parallelism_there_are_only_sums(self, name):
        assert set(self.collectives(name)) == {"all-reduce"}

    def test_data_parallelism_sums_gradients_once(self):
        (gradients,) = [n for n in self.collectives("data")["all-reduce"] if n > 100]
        # The embedding's three uses and the position bias before its table are summed apart.
        assert self.parameter_bytes() <= gradients <= 1.25 * self.parameter_bytes()

    def test_expert_parallelism_does_not_sum_experts_gradients(self):
        dense = self.parameter_bytes() - 2 * 4 * E * 24 * 32
        summed = sum(self.collectives("expert")["all-reduce"])
        assert dense <= summed <= 1.5 * dense

    def test_fsdp_gathers_each_parameter_once(self):
        found = self.collectives("fsdp")
        assert set(found) == {"all-gather", "all-reduce"}
        assert sum(found["all-gather"]) == self.parameter_bytes({"fsdp"})
        plan, _, _ = compiled_step("fsdp")
        on_one = sum(
            4 * math.prod(leaf.sharding.shard_shape(leaf.shape))
            for leaf in jax.tree.leaves(plan.abstract.params)
        )
        assert on_one < self.parameter_bytes() / 6

    def test_model_parallelism_sums_activations(self):
        # Forward and backward: the output or the gradient of the input of attention and
        # feed-forward layers (the products that share an input are summed apart), [rows, D] each.
        encoder, decoder = B * S * 24 * 4, B * T * 24 * 4
        per_layer = 2 + 4 + 1  # out and wo; query, key, value and wi; the router's input
        upper = encoder * (2 * per_layer + 2) + decoder * (per_layer + 4) + encoder * 2
        sums = self.collectives("model")["all-reduce"]
        assert sum(each for each in sums if each > 1000) <= upper + 4 * self.parameter_bytes() / 8
