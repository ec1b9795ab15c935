import jax
import numpy as np

from switchx import sharding
from switchx.models.t5 import T5
from switchx.training.optimizer import OptimizerConfig, make_optimizer
from switchx.training.state import create_state, num_bytes
from tests.training.conftest import small_config


def plan(shape: dict[str, int], devices: int, **optimizer):
    config = small_config(num_heads=2, vocab_size=62, d_ff=128, d_model=128)
    mesh = sharding.make_mesh(shape, jax.devices()[:devices])
    return create_state(
        T5(config),
        lambda axes: make_optimizer(OptimizerConfig(**optimizer), axes),
        seed=5,
        mesh=mesh,
    )


def test_the_mesh_does_not_change_the_state():
    create, abstract, *_ = plan({"data": 1}, 1)
    state = create()
    create, _, *_ = plan({"data": 2, "expert": 1, "model": 2}, 4)
    sharded = create()
    for leaf, other in zip(jax.tree.leaves(state), jax.tree.leaves(sharded), strict=True):
        np.testing.assert_array_equal(leaf, other)
    assert int(state.step) == 0
    assert jax.tree.map(lambda leaf: leaf.shape, state) == jax.tree.map(
        lambda leaf: leaf.shape, abstract
    )


def test_optimizer_state_lies_like_its_parameters():
    _, abstract, *_ = plan({"data": 1, "expert": 5}, 5)
    expert = abstract.params["encoder"]["layers_1"]["mlp"]["expert"]["wi"]
    assert expert.sharding.spec[0] == "expert"
    state = next(
        each for each in jax.tree.leaves(abstract.opt_state, is_leaf=has_rows) if has_rows(each)
    )
    row = state.v_row["encoder"]["layers_1"]["mlp"]["expert"]["wi"]
    assert row.shape == (5, 128) and row.sharding.spec[0] == "expert"


def has_rows(node) -> bool:
    return hasattr(node, "v_row")


def test_num_bytes():
    assert num_bytes({"a": np.zeros((3, 5), np.float32), "b": np.zeros((2,), np.int16)}) == 64
